"""Folders of deltas that are damaged, or fit nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bmkit.deltas import compose
from bmkit.deltas.own import AdapterConfig
from bmkit.errors import InputError


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = compose.attach(llama(), {"adapter": AdapterConfig(target_modules=["mlp"])})
    compose.save(model, "adapter", tmp_path)
    return tmp_path


def test_a_damaged_file_is_an_input_error(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="is damaged"):
        compose.load(llama(), {"a": saved})


def test_a_tensor_that_fits_nowhere_is_an_input_error(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.layers.7.x": torch.ones(1)}, file)
    with pytest.raises(InputError, match=r"no place in it, as base_model.model.model.layers.7.x"):
        compose.load(llama(), {"a": saved})


def test_a_tensor_that_is_missing_is_an_input_error(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    values = load_file(file)
    gone = sorted(values)[0]
    del values[gone]
    save_file(values, file)
    with pytest.raises(InputError, match=f"1 tensor is missing, as {gone}"):
        compose.load(llama(), {"a": saved})


def test_a_tensor_of_another_size_is_an_input_error(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    values = load_file(file)
    changed = sorted(values)[0]
    save_file({**values, changed: torch.ones(99)}, file)
    with pytest.raises(InputError, match=r"has the shape \[99\], here it is"):
        compose.load(llama(), {"a": saved})


def test_an_unknown_type_and_a_folder_without_a_delta_are_input_errors(saved: Path) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "BRAND_NEW"}))
    with pytest.raises(InputError, match="type `BRAND_NEW`"):
        compose.load(llama(), {"a": saved})
    file.unlink()
    with pytest.raises(InputError, match="holds no delta"):
        compose.load(llama(), {"a": saved})


def test_a_folder_without_weights_or_with_pickled_ones_is_an_input_error(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    torch.save(load_file(file), saved / "adapter_model.bin")
    file.unlink()
    with pytest.raises(InputError, match="holds no weights"):
        compose.load(llama(), {"a": saved})


def test_a_delta_of_a_smaller_model_is_an_input_error(saved: Path) -> None:
    config = LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(InputError, match="4 of its tensors have no place"):
        compose.load(LlamaForCausalLM(config), {"a": saved})


def test_a_setting_that_makes_no_sense_is_an_input_error(saved: Path) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "non_linearity": "nothing"}))
    with pytest.raises(InputError, match="transformers has no activation `nothing`"):
        compose.load(llama(), {"a": saved})


def test_weights_of_other_sizes_are_not_swapped_in_and_change_nothing(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    values = {name: torch.ones_like(tensor) for name, tensor in load_file(file).items()}
    save_file({**values, sorted(values)[-1]: torch.ones(3, 3)}, file)
    model = compose.attach(llama(), {"x": AdapterConfig(target_modules=["mlp"])})
    before = {n: p.detach().clone() for n, p in compose.parameters(model, "x").items()}
    with pytest.raises(InputError, match="its tensors are others"):
        compose.swap(model, "x", saved)
    for name, parameter in compose.parameters(model, "x").items():
        assert torch.equal(parameter, before[name])
