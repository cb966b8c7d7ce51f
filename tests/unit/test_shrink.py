"""Cutting models: what says nothing goes, what is left says the same in plain transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from bmkit import plan
from bmkit.compress import anatomy as anatomies
from bmkit.compress import shrink as cutting
from bmkit.compress.options.structure import Shrink
from bmkit.compress.steps import shrink
from bmkit.compress.work import Work
from bmkit.errors import BmkitError, InputError
from bmkit.report import Silent

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "vocab_size": 300,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL: dict[str, Any] = {**PLAIN, "intermediate_size": 96}
GROUPED = {**SMALL, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8}
WITH_HEADS: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED),
    "llama-tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=8),
    "phi3": Phi3Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"}),
}
NEURONS_ONLY: dict[str, Any] = {
    "gpt2": GPT2Config(n_embd=48, n_layer=3, n_head=4, vocab_size=300, eos_token_id=2),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "opt": OPTConfig(**PLAIN, ffn_dim=96, word_embed_proj_dim=48),
    "falcon": FalconConfig(**PLAIN),
    "bert": BertConfig(**SMALL),
}


def saved(config: Any, path: Path) -> Any:
    """Write a random model to `path`, and return it."""
    torch.manual_seed(0)
    kind: Any = AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.25) if parameter.ndim > 1 else parameter.add_(
                torch.randn_like(parameter) * 0.1
            )
    model.save_pretrained(path)
    return model


def rows_of(count: int = 9, length: int = 24) -> Tensor:
    return torch.randint(3, 290, (count, length), generator=torch.Generator().manual_seed(1))


def work_on(source: Path, out: Path, folder: Path, rows: Tensor | None = None) -> Work:
    """Return what a step gets."""
    out.mkdir(exist_ok=True)
    job = SimpleNamespace(reporter=Silent())
    rows = rows_of() if rows is None else rows
    return Work(source, out, folder, SimpleNamespace(job=job, rows=rows, device=CPU))  # type: ignore[arg-type]


def cut(path: Path, rows: Tensor | None = None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Shrink the checkpoint at `path`/whole, load the result in transformers."""
    work = work_on(path / "whole", path / "less", path / "work", rows)
    found = shrink.run(work, Shrink(method="shrink", **options))
    kind: Any = AutoModelForCausalLM
    if plan.read_headers(path / "whole").config["model_type"] == "bert":
        kind = AutoModelForMaskedLM
    model, info = kind.from_pretrained(path / "less", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval(), dict(found)


@torch.no_grad()
def silence(model: Any, heads: bool, neurons: int) -> None:
    """Let some heads and neurons of each block say nothing, other ones in each."""
    generator = torch.Generator().manual_seed(5)
    for name, module in model.named_modules():
        attention = name.endswith("o_proj")
        feed = name.endswith(("down_proj", "mlp.c_proj", "dense_4h_to_h", "fc2")) or (
            name.endswith("output.dense") and "attention" not in name
        )
        if not (feed or (attention and heads)):
            continue
        turned = type(module).__name__ == "Conv1D"
        weight = module.weight.T if turned else module.weight
        groups = 6 if attention else weight.shape[1]
        run = weight.shape[1] // groups
        gone = torch.randperm(groups, generator=generator)[: 2 if attention else neurons]
        for unit in gone.tolist():
            weight[:, unit * run : (unit + 1) * run] = 0


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("name", [*WITH_HEADS, *NEURONS_ONLY])
@torch.no_grad()
def test_what_says_nothing_can_go(name: str, refit: bool, tmp_path: Path) -> None:
    model = saved((WITH_HEADS | NEURONS_ONLY)[name], tmp_path / "whole")
    heads = name in WITH_HEADS
    silence(model, heads, 32)
    model.save_pretrained(tmp_path / "whole")
    neurons = 160 if name in ("gpt2", "falcon") else 64
    counts = {"intermediate_size": neurons, **({"num_key_value_heads": 4} if heads else {})}
    less, found = cut(tmp_path, **counts, refit=refit)
    rows = rows_of(3)
    wanted, logits = model(input_ids=rows).logits, less(input_ids=rows).logits
    assert torch.allclose(wanted, logits, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert found["output_error"] < 1e-3
    inside = [p for n, p in less.named_parameters() if ".0." in n or ".1." in n or ".2." in n]
    assert found["parameters"] == sum(p.numel() for p in inside)


@pytest.mark.parametrize("count", [9, 40], ids=["few", "enough"])
@torch.no_grad()
def test_what_stays_makes_up_for_what_goes(count: int, tmp_path: Path) -> None:
    """Of too few tokens it learns nothing that holds for others, and then it is left."""
    model = saved(WITH_HEADS["llama"], tmp_path / "whole")
    rows = rows_of(4, 20)
    wanted = model(input_ids=rows).logits
    found = {}
    for refit in (True, False):
        path = tmp_path / str(refit)
        path.mkdir()
        (path / "whole").symlink_to(tmp_path / "whole")
        less, metrics = cut(path, rows_of(count), intermediate_size=64, refit=refit)
        found[refit] = metrics["output_error"], float((less(input_ids=rows).logits - wanted).norm())
    if count == 9:
        assert found[True][0] <= found[False][0]
    else:
        assert found[True][0] < found[False][0]
        assert found[True][1] < found[False][1]


@torch.no_grad()
def test_layers_go_that_change_least(tmp_path: Path) -> None:
    model = saved(WITH_HEADS["qwen2"], tmp_path / "whole")
    model.model.layers[1].self_attn.o_proj.weight *= 1e-3
    model.model.layers[1].mlp.down_proj.weight *= 1e-3
    model.save_pretrained(tmp_path / "whole")
    less, found = cut(tmp_path, num_hidden_layers=2)
    assert found["layers"] == 2 and len(less.model.layers) == 2
    for new, old in ((0, 0), (1, 2)):
        wanted = model.model.layers[old].state_dict()
        for name, tensor in less.model.layers[new].state_dict().items():
            assert torch.equal(tensor, wanted[name])


def test_units_are_fitted_as_if_the_layers_that_go_were_never_there(tmp_path: Path) -> None:
    saved(WITH_HEADS["qwen3"], tmp_path / "whole")
    counts = {"intermediate_size": 64, "num_key_value_heads": 3}
    at_once, _ = cut(tmp_path, num_hidden_layers=2, **counts)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "whole").symlink_to(tmp_path / "whole")
    cut(first, num_hidden_layers=2)
    (second / "whole").symlink_to(first / "less")
    in_turn, _ = cut(second, **counts)
    wanted = in_turn.state_dict()
    for name, tensor in at_once.state_dict().items():
        assert torch.allclose(tensor, wanted[name], atol=1e-5), name


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "phi3"])
@torch.no_grad()
def test_channels_that_are_always_zero_go(name: str, tmp_path: Path) -> None:
    model = saved(WITH_HEADS[name], tmp_path / "whole")
    gone = [3, 7, 8, 20, 33, 47, 5, 6, 11, 12, 13, 14]
    for key, parameter in model.named_parameters():
        if key.endswith(("embed_tokens.weight", "lm_head.weight")):
            parameter[:, gone] = 0
        elif key.endswith(("o_proj.weight", "down_proj.weight")):
            parameter[gone] = 0
    model.save_pretrained(tmp_path / "whole")
    less, found = cut(tmp_path, hidden_size=36)
    rows = rows_of(3)
    wanted, logits = model(input_ids=rows).logits, less(input_ids=rows).logits
    assert torch.allclose(wanted, logits, rtol=1e-2, atol=2e-3 * float(wanted.abs().max()))
    assert found["parameters_ratio"] < 0.76


def test_a_share_is_met_by_all_units_together(tmp_path: Path) -> None:
    saved(WITH_HEADS["llama"], tmp_path / "whole")
    less, found = cut(
        tmp_path, parameters=0.5, units=["ffn", "heads", "layers", "hidden"], multiple_of=4
    )
    assert 0.4 < found["parameters_ratio"] <= 0.5
    config = less.config
    assert config.hidden_size % config.num_attention_heads == 0 and config.head_dim == 8
    assert config.intermediate_size % 4 == 0 and config.num_hidden_layers < 3


def test_a_stopped_run_goes_on_behind_its_last_block(tmp_path: Path) -> None:
    saved(WITH_HEADS["llama"], tmp_path / "whole")
    anatomy = anatomies.read(tmp_path / "whole")
    step = Shrink(method="shrink", intermediate_size=64, num_key_value_heads=3)
    target = shrink.wanted(anatomy, step)

    def fit() -> tuple[dict[int, Path], float]:
        return cutting.fit(
            *(tmp_path / "whole", anatomy, cutting.Fitting(target, refit=True, damp=0.01)),
            *([0, 2], rows_of(), tmp_path / "work"),
            device=CPU,
            reporter=Silent(),
        )

    files, error = fit()
    assert sorted(files) == [0, 2]
    before = {i: load_file(f) for i, f in files.items()}
    first = files[0].stat().st_mtime_ns
    files[2].unlink()
    again, same = fit()
    assert files[0].stat().st_mtime_ns == first and same == error
    for i, file in again.items():
        found = load_file(file)
        assert found.keys() == before[i].keys()
        assert all(torch.equal(t, before[i][k]) for k, t in found.items())


@pytest.mark.parametrize("raised", [False, True])
def test_norms_of_fewer_channels_say_what_they_said(raised: bool) -> None:
    """Also those that multiply by 1 + their weight."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 12), torch.randn(12)
    hidden[:, [1, 4, 5]] = 0
    kept = torch.tensor([0, 2, 3, 6, 7, 8, 9, 10, 11])
    energy = hidden.square() / hidden.square().sum(1, keepdim=True)
    names = {"n"} if raised else set()
    seen = cutting.Survey([], torch.zeros(0), {"n": energy.mean(0)}, names)
    times, more = seen.norms(kept)["n"]
    assert more == float(raised)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / x.square().mean(1, keepdim=True).sqrt() * (weight + raised)

    wanted = norm(hidden, weight)[:, kept]
    assert torch.allclose(norm(hidden[:, kept], (weight[kept] + more) * times - more), wanted)


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (NEURONS_ONLY["bert"], {"num_key_value_heads": 2}, "can't hold heads"),
        (NEURONS_ONLY["gpt2"], {"num_key_value_heads": 2}, "can't hold heads"),
        (NEURONS_ONLY["gpt-neox"], {"num_key_value_heads": 2}, "can't hold heads"),
        (NEURONS_ONLY["opt"], {"hidden_size": 24}, "can't hold a hidden width"),
        (WITH_HEADS["gemma3"], {"hidden_size": 36}, "embed_scale depends on"),
        (BloomConfig(**PLAIN), {"intermediate_size": 64}, "has 0, and 64"),
        (
            Qwen2MoeConfig(**GROUPED, moe_intermediate_size=16, num_experts=4),
            {"intermediate_size": 64},
            "has 0, and 64",
        ),
        (WITH_HEADS["llama"], {"num_key_value_heads": 5}, "multiple of the number of attention"),
        (WITH_HEADS["llama"], {"intermediate_size": 97}, "has 96, and 97"),
        (WITH_HEADS["llama"], {"num_hidden_layers": 4}, "has 3, and 4"),
        (WITH_HEADS["llama"], {"intermediate_size": 96}, "these widths already"),
        (WITH_HEADS["llama"], {"parameters": 0.01}, "can't be had"),
        (NEURONS_ONLY["bert"], {"parameters": 0.8, "units": ["heads"]}, "can't"),
    ],
    ids=lambda value: str(getattr(value, "model_type", "")) or None,
)
def test_what_can_not_be_cut_is_refused(
    config: Any, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    saved(config, tmp_path / "whole")
    with pytest.raises(BmkitError, match=said):
        cut(tmp_path, **options)


def test_a_weight_that_is_no_number_is_refused(tmp_path: Path) -> None:
    saved(WITH_HEADS["llama"], tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    whole = load_file(file)
    whole["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(whole, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj"):
        cut(tmp_path, intermediate_size=64)


def test_norms_over_heads_are_cut_with_them(tmp_path: Path) -> None:
    config = Olmo2Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"}, head_dim=8)
    saved(config, tmp_path / "whole")
    less, _ = cut(tmp_path, num_key_value_heads=4)
    assert less.model.layers[0].self_attn.q_norm.weight.shape == (64,)
    assert torch.isfinite(less(input_ids=rows_of(2)).logits).all()
