"""`bmkit compress moefy`: what is written, what is refused, and that distilling heals."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, OPTConfig

from bmkit.runtime import experts

Run = Callable[..., subprocess.CompletedProcess[str]]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps. " * 30
SHORT = ("-s", "data.sequence_length=64", "-s", "steps.0.size=4")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def taught(tiny: Path) -> Path:
    """The tiny model, when it knows the text: then every neuron that is missing costs."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tiny)(TEXT, add_special_tokens=False).input_ids
    rows = torch.tensor(ids[: len(ids) // 64 * 64]).reshape(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=rows[:16], labels=rows[:16]).loss.backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(tiny)
    return tiny


def steps(*lines: str) -> str:
    return "kind: compress\ndata: {calibration: text.txt, sequence_length: 64}\nsteps:\n" + "".join(
        f"  - {line}\n" for line in lines
    )


def perplexity(path: Path, tokenizer: Any, divided: experts.Experts | None) -> float:
    """Return the perplexity of every eighth row, as the loss of transformers says it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if divided is not None:
        experts.attach(model, divided)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    rows = [ids[i * 64 : (i + 1) * 64] for i in range(7, len(ids) // 64, 8)]
    with torch.no_grad():
        losses = [model(input_ids=(t := torch.tensor([r])), labels=t).loss for r in rows]
    return math.exp(float(torch.stack(losses).mean()))


def test_the_checkpoint_stays_dense_and_a_file_beside_it_says_who_computes(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    done = bmkit(
        *("compress", "moefy", "-m", tiny, "-o", "out", "-s", f"data.calibration={text}", *SHORT),
        *("-s", "steps.0.active=0.5", "-s", "steps.0.max_loss=1000", "--json"),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)["metrics"]
    out = tmp_path / "out"
    before, after = (load_file(p / "model.safetensors") for p in (tiny, out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        dim = 1 if "down_proj" in name else 0
        if "mlp" in name:  # the same neurons in another order
            assert not torch.equal(tensor, after[name])
            a, b = (sorted(t.float().movedim(dim, 0).tolist()) for t in (tensor, after[name]))
            assert a == b
        else:
            assert torch.equal(tensor, after[name])
    divided = experts.read(out)
    assert divided is not None
    assert (divided.size, divided.shared) == (4, 2)
    assert metrics["active"] == 0.5
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    dense = perplexity(out, tokenizer, None)
    assert metrics["perplexity_before"] == pytest.approx(dense, rel=1e-2)
    assert metrics["perplexity"] == pytest.approx(perplexity(out, tokenizer, divided), rel=1e-3)
    ratio = metrics["perplexity"] / metrics["perplexity_before"]
    assert metrics["perplexity_ratio"] == pytest.approx(ratio, rel=1e-3)
    again = bmkit(
        *("compress", "moefy", "-m", "out", "-o", "more", "-s", f"data.calibration={text}", *SHORT)
    )
    assert again.returncode == 3
    assert "divided into experts already" in again.stderr


def test_a_loss_above_the_bound_is_refused_with_its_measure(
    bmkit: Run, taught: Path, text: Path, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    done = bmkit(
        *("compress", "moefy", "-m", taught, "-o", "out", "-s", f"data.calibration={text}", *SHORT),
        *("-s", "steps.0.active=0.2", "-s", "steps.0.max_loss=1.2"),
    )
    assert done.returncode == 5
    assert done.stdout == ""
    assert "times as high" in done.stderr
    assert "max_loss is 1.2" in done.stderr
    assert not (tmp_path / "out").exists()
    nothing_left()


def test_distilling_heals_what_computing_by_experts_costs(
    bmkit: Run, taught: Path, text: Path, tmp_path: Path
) -> None:
    train = "{max_steps: 30, learning_rate: 3e-3, per_device_train_batch_size: 4}"
    hardly = "{max_steps: 1, learning_rate: 1e-9}"
    found = {}
    for name, learns, how in (
        ("bare", "false", hardly),
        ("frozen", "false", train),
        ("learned", "true", train),
    ):
        (tmp_path / f"{name}.yaml").write_text(
            steps(
                "{method: moefy, size: 4, active: 0.4, max_loss: 1000}",
                f"{{method: distill, train_routers: {learns}, train: {how}}}",
            )
        )
    rows = "".join(json.dumps({"text": TEXT[i : i + 120]}) + "\n" for i in range(0, 1800, 40))
    text.write_text(rows)
    text.rename(tmp_path / "rows.jsonl")
    for name in ("bare", "frozen", "learned"):
        done = bmkit(
            *("compress", f"{name}.yaml", "-m", taught, "-o", name, "--json"),
            *("-s", f"data.calibration={tmp_path / 'rows.jsonl'}"),
        )
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)["metrics"]
    assert found["frozen"]["agreement"] > found["frozen"]["agreement_before"]
    for name in ("frozen", "learned"):
        assert found[name]["perplexity"] < found["bare"]["perplexity"]
    files = {name: (tmp_path / name / experts.FILE).read_bytes() for name in found}
    assert files["bare"] == files["frozen"]
    assert files["learned"] != files["bare"]
    tensors = load_file(tmp_path / "learned" / "model.safetensors")
    assert tensors.keys() == load_file(taught / "model.safetensors").keys()


def test_layers_that_are_dropped_take_their_routers_along(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(
        steps("{method: moefy, size: 4, max_loss: 1e9}", "{method: drop_layers, keep: [1]}")
    )
    done = bmkit("compress", "r.yaml", "-m", tiny, "-o", "out")
    assert done.returncode == 0, done.stderr
    divided = experts.read(tmp_path / "out")
    assert divided is not None
    assert len(divided.chosen) == len(divided.routers) == 1


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("{method: wanda, pattern: '2:4'}", "{method: moefy}"), "comes before `wanda`"),
        (("{method: moefy}", "{method: moefy}"), "twice"),
        (("{method: quantize}", "{method: moefy}"), "comes last"),
        (("{method: moefy, active: 0.1}",), "more than `shared`"),
        (("{method: moefy, router: mpl}",), "mlp"),
        (("{method: distill, train_routers: true}",), "there are no routers"),
        (("{method: moefy, size: 5}",), "does not divide"),
    ],
)
def test_recipes_that_can_not_be_are_refused(
    lines: tuple[str, ...], said: str, bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(steps(*lines))
    done = bmkit("compress", "r.yaml", "-m", tiny, "-o", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "before",
    [
        "{method: wanda, pattern: '2:4', exclude_modules: [down_proj]}",
        "{method: wanda, sparsity: 0.3}",
    ],
)
def test_zeros_of_pruning_before_stay(
    before: str, bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(steps(before, "{method: moefy, size: 4, max_loss: 1e9}"))
    (tmp_path / "pruned.yaml").write_text(steps(before))
    zeros = {}
    for name in ("r", "pruned"):
        done = bmkit("compress", f"{name}.yaml", "-m", tiny, "-o", f"out-{name}")
        assert done.returncode == 0, done.stderr
        tensors = load_file(tmp_path / f"out-{name}" / "model.safetensors")
        zeros[name] = {n: int((t == 0).sum()) for n, t in tensors.items()}
    assert zeros["r"] == zeros["pruned"]
    assert sum(zeros["r"].values()) > 1000


def test_infer_computes_by_experts_what_is_not_run_on_packed_weights(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(
        OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            vocab_size=259,
            num_attention_heads=2,
            ffn_dim=48,
            word_embed_proj_dim=32,
            eos_token_id=2,
            pad_token_id=0,
        ),
        dtype=torch.float32,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    path = tmp_path / "opt"
    model.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(path)
    routers = tuple(experts.Router(torch.randn(11, 32), torch.randn(11)) for _ in range(2))
    divided = experts.Experts(4, 1, (2, 3), routers)
    ids = tokenizer("Hello there", return_tensors="pt").input_ids
    length = ids.shape[1]
    dense = model.generate(ids, max_new_tokens=20, do_sample=False)[0, length:].tolist()
    attached = experts.attach(model, divided)
    wanted = model.generate(ids, max_new_tokens=20, do_sample=False)[0, length:].tolist()
    attached.detach()
    assert wanted != dense
    experts.write(path, divided)
    done = bmkit(
        *("infer", "-m", path, "-p", "Hello there", "--raw", "--max-new-tokens", "20", "--json")
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] == wanted


def test_an_encoder_is_divided_with_a_warning_that_nothing_bounds_its_loss(
    bmkit: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, num_hidden_layers=2, vocab_size=259)).eval()
    path = tmp_path / "bert"
    model.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(path)
    done = bmkit(
        *("compress", "moefy", "-m", path, "-o", "out", "-s", f"data.calibration={text}", *SHORT),
        *("-s", "steps.0.active=0.3"),
    )
    assert done.returncode == 0, done.stderr
    assert "max_loss bounds nothing" in done.stderr
    ids = tokenizer("Hello there", return_tensors="pt").input_ids
    divided = BertModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        before = model(input_ids=ids).last_hidden_state
        dense = divided(input_ids=ids).last_hidden_state
        found = experts.read(tmp_path / "out")
        assert found is not None
        experts.attach(divided, found)
        by_experts = divided(input_ids=ids).last_hidden_state
    assert torch.allclose(before, dense, atol=1e-5)
    assert not torch.allclose(before, by_experts, atol=1e-4)


def test_tune_trains_what_infer_will_compute(
    bmkit: Run, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """The loss before training is that of the model by experts, with its adapter at zero."""
    torch.manual_seed(0)
    routers = tuple(experts.Router(torch.randn(15, 32), torch.randn(15)) for _ in range(2))
    found = {}
    for name in ("dense", "divided"):
        if name == "divided":
            experts.write(tiny, experts.Experts(4, 1, (3, 3), routers))
        done = bmkit(
            *("tune", "lora", "-m", tiny, "-o", name, "--json", "-s", f"data.train={chats}"),
            *("-s", f"data.dev={chats}", "-s", "train.max_steps=2", "-s", "data.max_length=64"),
        )
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)["metrics"]["dev_loss_before"]
    assert found["dense"] != pytest.approx(found["divided"], rel=1e-3)
