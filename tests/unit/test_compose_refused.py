"""What can't be together on one model is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from transformers import LlamaConfig, LlamaForCausalLM

from bmkit.deltas import compose
from bmkit.deltas.own import AdapterConfig, BitFitConfig
from bmkit.errors import InputError, RecipeError

ADAPTER = AdapterConfig(target_modules=["mlp"], bottleneck_dim=4)


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def test_two_prompts_are_refused_and_so_are_two_names_alike() -> None:
    prompts = {
        "prefix": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        "soft": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }
    with pytest.raises(RecipeError, match="`soft` can't be beside"):
        compose.attach(llama(), prompts)
    model = compose.attach(llama(), {"a": LoraConfig(r=2, target_modules=["q_proj"])})
    with pytest.raises(RecipeError, match="two of the name `a`"):
        compose.attach(model, {"a": ADAPTER})


def test_two_deltas_that_train_one_module_whole_are_refused() -> None:
    one, other = (
        LoraConfig(r=2, target_modules=[name], modules_to_save=["lm_head"])
        for name in ("q_proj", "v_proj")
    )
    with pytest.raises(RecipeError, match="the same module whole"):
        compose.attach(llama(), {"one": one, "other": other})


def test_a_delta_that_would_copy_another_one_is_refused() -> None:
    every = {
        "bitfit": BitFitConfig(target_modules=["input_layernorm"]),
        "norms": LNTuningConfig(target_modules=["input_layernorm"]),
    }
    compose.attach(llama(), {"bitfit": every["bitfit"], "norms": every["norms"]})
    model = compose.attach(llama(), {"bitfit": every["bitfit"]})
    with pytest.raises(RecipeError, match="`norms` copies a module that another"):
        compose.attach(model, {"norms": every["norms"]})


def test_a_delta_that_begins_by_changing_the_base_goes_alone() -> None:
    pissa = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    assert compose.names(compose.attach(llama(), {"pissa": pissa})) == ["pissa"]
    with pytest.raises(RecipeError, match="`adapter` can't be beside the others"):
        compose.attach(llama(), {"pissa": pissa, "adapter": ADAPTER})


def test_a_config_that_names_no_module_is_refused() -> None:
    with pytest.raises(RecipeError, match="`a` doesn't fit the model: it has no module `q_prog`"):
        compose.attach(llama(), {"a": LoraConfig(target_modules=["q_prog"])})


def test_a_name_that_no_delta_has_is_an_input_error() -> None:
    model = compose.attach(llama(), {"adapter": ADAPTER})
    with pytest.raises(InputError, match="no delta `lora`"), compose.active(model, ["lora"]):
        pass
    with pytest.raises(InputError, match="no delta `lora`"):
        compose.unplug(model, "lora")
