"""A checkpoint that is divided into experts: every way of running it computes what they say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bmkit.runtime import experts
from bmkit.runtime.experts import Experts, Router

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
ASK = ("-p", "Tell me more, more.", "--raw", "--json", "--max-new-tokens", "24")


def tokens_of(done: Done) -> list[int]:
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout)["token_ids"]
    return found


def divide(path: Path, size: int, shared: int, chosen: tuple[int, ...]) -> Experts:
    """Put random experts beside the weights at `path`."""
    config = json.loads((path / "config.json").read_text())
    generator = torch.Generator().manual_seed(3)
    others = config["intermediate_size"] // size - shared
    routers = tuple(
        Router(
            torch.randn(others, config["hidden_size"], generator=generator),
            torch.randn(others, generator=generator),
        )
        for _ in chosen
    )
    found = Experts(size, shared, chosen, routers)
    experts.write(path, found)
    return found


def masked(path: Path, divided: Experts, dtype: str = "float32") -> Any:
    """Load the checkpoint in transformers, and write masks into its feed-forwards."""
    from bmkit import model as models

    model = models.load_model(path, device=torch.device("cpu"), dtype=dtype)
    for layer, router, count in zip(
        model.model.layers, divided.routers, divided.chosen, strict=True
    ):
        assert router is not None  # `divide` has made it
        layer.mlp.forward = _forward(layer.mlp, router, count, divided)
    return model


def _forward(mlp: Any, router: Router, count: int, divided: Experts) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        scores = (x.float() @ router.weight.T + router.bias).view(-1, len(router.weight))
        mask = torch.zeros(len(scores), divided.shared + len(router.weight), dtype=x.dtype)
        mask[:, : divided.shared] = 1
        for row, score in zip(mask, scores, strict=True):
            row[divided.shared + score.topk(count).indices] = 1
        mask = mask.repeat_interleave(divided.size, 1).view(*x.shape[:-1], -1)
        found: Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * mask)
        return found

    return forward


def answer(model: Any, path: Path) -> list[int]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(path)(ASK[1], return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=2)
    return [int(i) for i in out[0, ids.shape[1] :]]


@pytest.fixture
def divided(tiny: Path) -> Experts:
    return divide(tiny, 16, 1, (1, 2))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_answers_are_those_of_the_masked_model(
    bmkit: Run, tiny: Path, divided: Experts, dtype: str
) -> None:
    plain = tokens_of(bmkit("infer", "-m", "tiny", *ASK, "-s", f"dtype={dtype}"))
    model = masked(tiny, divided, "float32" if dtype == "auto" else dtype)
    assert plain == answer(model, tiny)
    (tiny / experts.FILE).unlink()
    assert plain != tokens_of(bmkit("infer", "-m", "tiny", *ASK, "-s", f"dtype={dtype}"))


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_rounded_checkpoints_keep_their_experts(
    bmkit: Run, tiny: Path, tmp_path: Path, divided: Experts, recipe: str
) -> None:
    scales = "steps.0.scale_dtype=float32"  # transformers would multiply in bfloat16
    done = bmkit("compress", recipe, "-m", "tiny", "-o", "small", "-s", scales)
    assert done.returncode == 0, done.stderr
    small = tmp_path / "small"
    found = tokens_of(bmkit("infer", "-m", "small", *ASK))
    assert found == answer(masked(small, divided), tiny)
    (small / "bmkit.json").unlink()  # it knows every file
    (small / experts.FILE).unlink()
    assert found != tokens_of(bmkit("infer", "-m", "small", *ASK))


@pytest.mark.parametrize("quant", [None, "int8"])
def test_a_model_that_is_not_fused_is_masked(bmkit: Run, tiny: Path, quant: str | None) -> None:
    from transformers import AutoModelForCausalLM, GemmaConfig

    from bmkit.nn.rounding import dequantize, quantize

    old = json.loads((tiny / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    config = GemmaConfig(
        **{name: old[name] for name in names},
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tiny)
    model = masked(tiny, divide(tiny, 8, 2, (3, 1)))
    for parameter in model.parameters() if quant else ():
        if parameter.ndim == 2:
            parameter.data = dequantize(*quantize(parameter.data, 8))
    words = ("--quant", quant) if quant else ()
    assert tokens_of(bmkit("infer", "-m", "tiny", *ASK, *words)) == answer(model, tiny)


@pytest.mark.usefixtures("divided")
def test_guessing_changes_no_answer(bmkit: Run, tiny: Path) -> None:
    plain = tokens_of(bmkit("infer", "-m", "tiny", *ASK))
    words = ("-d", "self", "-s", "adaptive=false", "-s", "compare=[greedy,transformers]")
    done = bmkit("spec-decode", "-m", "tiny", *ASK, *words, "--report", "r.json")
    assert tokens_of(done) == plain
    compared = json.loads((tiny.parent / "r.json").read_text())["compare"]
    assert [found["identical"] for found in compared.values() if "identical" in found] == [1, 1]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_works_on_the_neurons_that_are_computed(
    bmkit: Run, tiny: Path, tmp_path: Path, divided: Experts, kind: str
) -> None:
    """Plain LoRA is fused; the other kind works in the model's own code."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(5)
    lora = LoraConfig(r=4, target_modules="all-linear", use_dora=kind == "dora")
    model = get_peft_model(masked(tiny, divided), lora)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "taught")
    wanted = answer(PeftModel.from_pretrained(masked(tiny, divided), tmp_path / "taught"), tiny)
    assert tokens_of(bmkit("infer", "-m", "tiny", *ASK, "--adapter", "taught")) == wanted
    assert tokens_of(bmkit("infer", "-m", "tiny", *ASK)) != wanted


def test_a_delta_learns_on_the_neurons_that_are_computed(
    bmkit: Run, tiny: Path, tmp_path: Path, rows: Callable[..., Path], divided: Experts
) -> None:
    from transformers import AutoTokenizer

    text = "What is there is there, and what is not is not."
    rows("rows.jsonl", *[{"text": text}] * 4)
    words = ("-s", "data.train=rows.jsonl", "-s", "data.dev=rows.jsonl", "-s", "data.format=auto")
    words += ("-s", "train.max_steps=1", "-o", "taught", "--json")
    done = bmkit("tune", "lora", "-m", "tiny", *words)
    assert done.returncode == 0, done.stderr
    ids = AutoTokenizer.from_pretrained(tiny)(text, return_tensors="pt")["input_ids"]
    ids = torch.cat((ids, torch.tensor([[2]])), 1)  # and an end token
    with torch.no_grad():
        wanted = masked(tiny, divided)(ids, labels=ids).loss.item()
    found = json.loads((tmp_path / "taught" / "bmkit.json").read_text())
    assert found["metrics"]["dev_loss_before"] == pytest.approx(wanted, abs=2e-5)


@pytest.mark.usefixtures("divided")
def test_a_damaged_file_is_named(bmkit: Run, tiny: Path) -> None:
    file = tiny / experts.FILE
    whole = file.read_bytes()
    for damaged in (
        whole[:-20],
        whole[: len(whole) // 2],
        b"",
        whole.replace(b"chosen", b"chosem"),
    ):
        file.write_bytes(damaged)
        headless = not damaged or b"chosem" in damaged  # a plan reads no further
        for words in ((), ("--plan",)) if headless else ((),):
            done = bmkit("infer", "-m", "tiny", *ASK, *words)
            assert done.returncode == 3, done.stderr
            assert experts.FILE in done.stderr
            assert "Traceback" not in done.stderr


def test_a_plan_knows_what_is_left_out(tiny: Path) -> None:
    from bmkit.plan import read_headers
    from bmkit.runtime import budget, expect
    from bmkit.runtime.choose import Chosen

    headers = read_headers(tiny)
    machine = expect.Rates(1e6, 1e9, 1e9)  # so slow that only bytes of weights count
    found = []
    for chosen in ((3, 3), (0, 1), (0, 0)):
        divide(tiny, 16, 1, chosen)
        place = budget.place(headers, rows=1, tokens=64, budget=None)
        rates = expect.expect(Chosen("packed", place), headers, machine)
        found.append(1 / rates["decode_tokens_per_second"])
    # Of an expert: 16 rows of gate and of up, and 16 columns of down, in bfloat16.
    expert = 3 * 32 * 16 * 2 / 1e6
    assert found[0] - found[1] == pytest.approx(5 * expert, rel=0.05)
    assert found[1] - found[2] == pytest.approx(expert, rel=0.05)


def test_experts_of_another_model_are_refused(bmkit: Run, tiny: Path) -> None:
    divide(tiny, 16, 0, (1, 1, 1))
    for dtype in ("auto", "bfloat16"):
        done = bmkit("infer", "-m", "tiny", *ASK, "-s", f"dtype={dtype}")
        assert done.returncode == 3, done.stderr
        assert experts.FILE in done.stderr


def test_a_budget_changes_no_token_and_is_kept(fresh: Run, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    path = Path(shutil.copytree(tiny, tmp_path / "wide"))
    config = AutoConfig.from_pretrained(path)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 2048, 8
    config.head_dim, config.initializer_range = 128, 0.05
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    divide(path, 32, 4, (12,) * 8)
    words = ("infer", "-m", "wide", *ASK, "--report", "r.json", "-s", "batch_size=1")
    free = tokens_of(fresh(*words))
    refused = fresh(*words, "--cpu-memory", "1MiB")
    smallest = re.search(r"smallest that works is --cpu-memory (\d+)MiB", refused.stderr)
    assert smallest is not None, refused.stderr
    held = fresh(*words, "--cpu-memory", f"{smallest[1]}MiB")
    assert tokens_of(held) == free
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["peak_rss_bytes"] - report["rss_before_bytes"] <= int(smallest[1]) * 2**20
    assert "0 of 9 units" in report["plan"]["steps"][0]
