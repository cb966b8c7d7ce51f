"""LoRA on experts whose matrices are one parameter: which there are, and against plain PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from pydantic import TypeAdapter
from torch import Tensor, nn

from bmkit.deltas import compose, configs
from bmkit.deltas.configs import Place
from bmkit.deltas.merge import merge
from bmkit.deltas.modules import modules_of_model
from bmkit.deltas.own import AdapterConfig
from bmkit.deltas.recipe import Delta
from bmkit.deltas.sizes import parameters
from bmkit.deltas.stacked import stacked_of_headers, stacked_of_model
from bmkit.deltas.targets import parameters_addressed
from bmkit.errors import RecipeError
from bmkit.plan import read_headers

IDS = torch.arange(12)[None]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
Build = Callable[..., Any]


def spec(**values: Any) -> Any:
    return TypeAdapter(Delta).validate_python({"type": "lora", "r": 2, **values})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def learn(model: Any, steps: int = 2) -> Any:
    torch.manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    "family", ["qwen2_moe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama", "t5"]
)
def test_headers_tell_the_same_parameters_as_the_model(
    family: str, architecture: Build, tmp_path: Path
) -> None:
    model = architecture(family, real=True)
    model.save_pretrained(tmp_path)
    found = stacked_of_model(model)
    assert stacked_of_headers(read_headers(tmp_path)) == found
    assert bool(found) == (family not in ("llama", "t5"))
    for name, module in found.items():
        assert tuple(model.get_parameter(name).shape) == module.shape
        assert name not in modules_of_model(model)


@pytest.mark.parametrize("beside", [[], ["model.layers.0.self_attn.q_proj"]])
def test_experts_get_an_update_that_peft_loads_switches_off_and_merges(
    beside: list[str], architecture: Build, tmp_path: Path
) -> None:
    base = architecture("qwen2_moe", real=True)
    plain, named = logits(base), {n: p.clone() for n, p in base.named_parameters()}
    found = parameters_addressed(
        spec(target_parameters=BOTH), modules_of_model(base), stacked_of_model(base)
    )
    assert len(found) == 4
    place = Place(beside, parameters=found, task_type="CAUSAL_LM")
    model = compose.attach(base, {"moe": configs.lora(spec(target_parameters=BOTH), place)})
    assert torch.equal(logits(model), plain)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shapes = [stacked_of_model(architecture("qwen2_moe"))[name].shape for name in found]
    shapes += [tuple(named[f"{name}.weight"].shape) for name in beside]
    assert parameters(spec(), shapes, 16, 2) == count
    learn(model)
    trained = logits(model)
    assert not torch.allclose(trained, plain, atol=1e-2)
    compose.save(model, "moe", tmp_path)

    theirs = PeftModel.from_pretrained(architecture("qwen2_moe", real=True), tmp_path).eval()
    assert torch.equal(logits(theirs), trained)
    with theirs.disable_adapter():
        assert torch.equal(logits(theirs), plain)
    ours = compose.load(architecture("qwen2_moe", real=True), {"moe": tmp_path})
    assert torch.equal(logits(ours), trained)
    with compose.active(ours, ()):
        assert torch.equal(logits(ours), plain)
    whole = merge(ours)
    assert not any("lora" in name for name, _ in whole.named_parameters())
    assert torch.allclose(logits(whole), trained, atol=1e-5)
    wanted = logits(theirs.merge_and_unload())
    assert torch.allclose(logits(whole), wanted, atol=1e-6)
    back = compose.unplug(model, "moe")
    assert all(torch.equal(p, named[n]) for n, p in back.named_parameters())


def on(*names: str) -> PeftConfig:
    targets = [f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in names]
    return LoraConfig(r=2, target_modules=[], target_parameters=targets, task_type="CAUSAL_LM")


PAIRS: dict[str, dict[str, PeftConfig]] = {
    "the same": {"a": on(*BOTH), "b": on(*BOTH)},
    "one each": {"a": on(BOTH[0]), "b": on(BOTH[1])},
    "both and one": {"a": on(*BOTH), "b": on(BOTH[0])},
    "one and both": {"a": on(BOTH[1]), "b": on(*BOTH)},
    "an adapter behind": {
        "a": on(*BOTH),
        "b": AdapterConfig(target_modules=["mlp.experts"], bottleneck_dim=4),
    },
}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_deltas_on_experts_are_saved_each_without_the_other(
    pair: str, architecture: Build, tmp_path: Path
) -> None:
    model = learn(compose.attach(architecture("qwen2_moe", real=True), PAIRS[pair]))
    together = logits(model)
    for name in "ab":
        compose.save(model, name, tmp_path / name)
        with compose.active(model, [name]):
            alone = logits(model)
        theirs = PeftModel.from_pretrained(
            architecture("qwen2_moe", real=True), tmp_path / name
        ).eval()
        assert torch.allclose(logits(theirs), alone, atol=1e-5)
        assert not torch.allclose(alone, together, atol=1e-3)
    folders = {name: tmp_path / name for name in "ab"}
    again = compose.load(architecture("qwen2_moe", real=True), folders)
    assert torch.allclose(logits(again), together, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"target_parameters": ["experts.gate_up_prj"]}, "experts.gate_up_proj"),
        ({"target_parameters": ["nothing"]}, "there are: down_proj, gate_up_proj"),
        ({"target_parameters": ["q_proj"]}, "is a linear layer"),
        ({"target_parameters": ["mlp.experts"]}, "down_proj, gate_up_proj"),
        ({"target_parameters": BOTH, "layers": [7]}, "no layer 7"),
        ({"target_parameters": BOTH, "exclude_modules": ["mlp.experts"]}, "nothing is left"),
        ({"target_parameters": BOTH, "r": 20}, "20"),
    ],
)
def test_what_matches_no_parameter_is_told_with_what_there_is(
    values: dict[str, Any], said: str, architecture: Build
) -> None:
    model: nn.Module = architecture("qwen2_moe")
    with pytest.raises(RecipeError) as raised:
        parameters_addressed(spec(**values), modules_of_model(model), stacked_of_model(model))
    assert said in f"{raised.value} {raised.value.hint}"


def test_layers_and_exclusions_narrow_parameters_as_they_do_modules(architecture: Build) -> None:
    model: nn.Module = architecture("qwen2_moe")
    there = modules_of_model(model), stacked_of_model(model)
    last = spec(target_parameters=BOTH, last=1, exclude_modules=["attn.q"])
    wanted = [f"model.layers.1.mlp.{name}" for name in BOTH]
    assert parameters_addressed(last, *there) == wanted
    without = spec(target_parameters=["[r]experts.*"], exclude_modules=["layers.1"])
    wanted = [f"model.layers.0.mlp.{name}" for name in BOTH]
    assert parameters_addressed(without, *there) == wanted
    assert parameters_addressed(spec(), *there) == []
    dense = architecture("llama")
    with pytest.raises(RecipeError, match="no experts"):
        parameters_addressed(spec(target_parameters=BOTH), modules_of_model(dense), {})


@pytest.mark.parametrize(
    "values", [{"lora_dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "pissa"}]
)
def test_what_peft_cant_do_on_parameters_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="target_parameters"):
        spec(target_parameters=BOTH, **values)
