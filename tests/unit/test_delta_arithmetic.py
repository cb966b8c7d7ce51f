"""Sums of LoRA deltas, and deltas put into the weights, against the products written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from bmkit.deltas import compose
from bmkit.deltas.arithmetic import weighted
from bmkit.deltas.merge import merge
from bmkit.deltas.own import AdapterConfig, BitFitConfig
from bmkit.errors import InputError, RecipeError

IDS = torch.tensor([[5, 9, 3, 7, 2, 11]])


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def noise(model: Any, seed: int = 5) -> None:
    """Give what is trained values that change what the model says."""
    draws = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=draws) * 0.2


def lora(folder: Path, seed: int, **options: Any) -> Path:
    config = LoraConfig(fan_in_fan_out=True, base_model_name_or_path="base", **options)
    model = get_peft_model(gpt2(), config)
    model.peft_config["default"].base_model_name_or_path = "base"
    noise(model, seed)
    model.save_pretrained(folder)
    return folder


def update(folder: Path, layer: int, module: str, scale: float) -> Tensor:
    """Return scale · (B · A)ᵀ [in, out] of a block's module, or nothing."""
    values = load_file(folder / "adapter_model.safetensors")
    where = f"base_model.model.transformer.h.{layer}.{module}.lora_"
    if f"{where}A.weight" not in values:
        return torch.zeros(())
    return scale * (values[f"{where}B.weight"] @ values[f"{where}A.weight"]).T


def test_the_sum_of_three_deltas_is_the_sum_of_their_updates(tmp_path: Path) -> None:
    folders = [
        lora(tmp_path / "a", 1, r=2, lora_alpha=6, target_modules=["c_attn", "c_fc"]),
        lora(tmp_path / "b", 2, r=4, lora_alpha=8, use_rslora=True, target_modules=["c_attn"]),
        lora(
            tmp_path / "c",
            3,
            r=2,
            lora_alpha=2,
            target_modules=["c_attn"],
            rank_pattern={"h.1.attn.c_attn": 5},
            alpha_pattern={"h.1.attn.c_attn": 10},
        ),
    ]
    weighted(folders, [1.0, 0.25, -0.5], tmp_path / "sum")
    summed = PeftModel.from_pretrained(gpt2(), tmp_path / "sum")
    model = gpt2()
    for layer in (0, 1):
        last = 2.0 if layer else 1.0
        for module in ("attn.c_attn", "mlp.c_fc"):
            weight = model.transformer.h[layer].get_submodule(module).weight
            for folder, scale in zip(folders, (3.0, 0.25 * 4.0, -0.5 * last), strict=True):
                weight.data += update(folder, layer, module, scale)
    torch.testing.assert_close(logits(summed), logits(model), rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"]) == (11, False)
    assert config["base_model_name_or_path"] == "base"


def test_a_delta_less_itself_is_nothing(tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", 1, r=4, lora_alpha=8, target_modules=["c_attn", "wte"])
    assert not torch.equal(logits(PeftModel.from_pretrained(gpt2(), folder)), logits(gpt2()))
    weighted([folder, folder], [1, -1], tmp_path / "none")
    none = PeftModel.from_pretrained(gpt2(), tmp_path / "none")
    torch.testing.assert_close(logits(none), logits(gpt2()), rtol=0, atol=1e-5)


def test_one_delta_of_weight_one_is_itself(tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", 1, r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"])
    weighted([folder], [1], tmp_path / "same")
    same, one = (PeftModel.from_pretrained(gpt2(), f) for f in (tmp_path / "same", folder))
    assert torch.equal(logits(same), logits(one))  # its scale is a power of two


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "has use_dora"),
        ({"modules_to_save": ["ln_f"]}, "has modules_to_save"),
        ({"bias": "all"}, "has bias"),
        ({"init_lora_weights": "pissa"}, "was begun as pissa"),
    ],
    ids=str,
)
def test_more_than_plain_lora_is_refused(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = lora(tmp_path / "a", 1, r=2, target_modules=["c_attn"])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    with pytest.raises(InputError, match=said):
        weighted([folder], [1], tmp_path / "out")


def test_other_types_other_bases_and_too_few_weights_are_refused(tmp_path: Path) -> None:
    folder = lora(tmp_path / "a", 1, r=2, target_modules=["c_attn"])
    model = compose.attach(gpt2(), {"adapter": AdapterConfig(target_modules=["mlp"])})
    compose.save(model, "adapter", tmp_path / "adapter")
    with pytest.raises(InputError, match="is of type bmkit_adapter"):
        weighted([folder, tmp_path / "adapter"], [1, 1], tmp_path / "out")
    with pytest.raises(RecipeError, match="1 of them and 2 deltas"):
        weighted([folder, folder], [1], tmp_path / "out")
    other = lora(tmp_path / "b", 1, r=2, target_modules=["c_attn"])
    file = other / "adapter_config.json"
    file.write_text(file.read_text().replace('"base"', '"elsewhere"'))
    with pytest.raises(InputError, match="of another base"):
        weighted([folder, other], [1, 1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_deltas_of_several_types_are_merged_into_the_weights() -> None:
    configs = {
        "ia3": IA3Config(target_modules=["query"], feedforward_modules=[]),
        "lora": LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"]),
        "bitfit": BitFitConfig(target_modules=["query", "dense"]),
        "norms": LNTuningConfig(target_modules=["LayerNorm"]),
    }
    model = compose.attach(bert(), configs)
    noise(model)
    wanted = logits(model)
    assert not torch.allclose(wanted, logits(bert()), atol=1e-2)
    merged = merge(model)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert list(merged.state_dict()) == list(bert().state_dict())
    assert compose.names(merged) == []


@pytest.mark.parametrize("kind", ["adapter", "bias", "prefix"])
def test_what_has_no_place_in_the_weights_is_not_merged(kind: str) -> None:
    configs: dict[str, Any] = {
        "adapter": AdapterConfig(target_modules=["mlp"]),
        "bias": BitFitConfig(target_modules=["lm_head"]),
        "prefix": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }
    both = {"lora": LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)}
    model = compose.attach(gpt2(), {**both, kind: configs[kind]})
    noise(model)
    before = logits(model)
    with pytest.raises(RecipeError, match=r"no place|isn't linear|no bias"):
        merge(model)
    assert torch.equal(logits(model), before)
    with compose.active(model, ["lora"]):
        wanted = logits(model)
    merged = merge(compose.unplug(model, kind))
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
