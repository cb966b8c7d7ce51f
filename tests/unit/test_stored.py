"""What a checkpoint's headers say about modules, against the model that transformers makes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from bmkit.deltas.modules import Module, modules_of_model
from bmkit.deltas.stored import modules_of_headers
from bmkit.nn import walk
from bmkit.plan import Headers, TensorHeader, read_headers
from bmkit.runtime.placed import load
from bmkit.runtime.placed.model import place_model

FAMILIES = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3", "gpt2", "gpt_neo"),
    *("gpt_neox", "gptj", "bloom", "opt", "falcon", "mpt", "qwen2_moe", "mixtral", "gpt_oss"),
    *("deepseek_v2", "deepseek_v3", "bert", "bert_classifier", "roberta", "roberta_classifier"),
    *("electra", "albert", "distilbert", "deberta_v2", "modernbert", "mpnet", "nomic_bert"),
    *("t5", "t5_gated", "t5_encoder", "bart", "m2m_100", "marian", "whisper", "vit", "clip"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_headers_say_what_the_model_is_made_of(
    name: str, architecture: Callable[..., Any], tmp_path: Path
) -> None:
    model = architecture(name, real=True)
    model.save_pretrained(tmp_path)
    assert modules_of_headers(read_headers(tmp_path)) == modules_of_model(model)


@pytest.mark.parametrize("name", ["llama", "phi", "gemma2", "bert", "gpt_neox", "mpt"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_there_whether_it_is_tied_or_stored(
    name: str, tied: bool, architecture: Callable[..., Any], tmp_path: Path
) -> None:
    model = architecture(name)
    values = model.config.to_dict() | {"tie_word_embeddings": tied}
    model = type(model)(type(model.config).from_dict(values))
    model.save_pretrained(tmp_path)
    stored = [t.name for t in read_headers(tmp_path).tensors]
    found = modules_of_headers(read_headers(tmp_path))
    assert found == modules_of_model(model)
    assert [n for n, m in found.items() if m.head] == walk.output_heads(model)
    assert (f"{walk.output_heads(model)[0]}.weight" in stored) <= (not tied)


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "llama", "opt", "bloom", "bert", "distilbert", "bart", "modernbert", "gpt_neox"),
        *("roberta", "bert_classifier", "roberta_classifier", "whisper", "vit", "mixtral"),
    ],
)
def test_names_that_lack_the_name_of_the_body_get_it(
    name: str, architecture: Callable[..., Any], tmp_path: Path
) -> None:
    whole = architecture(name, real=True)
    whole.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    start = f"{whole.base_model_prefix}."
    tensors = load_file(file)
    bare = {n.removeprefix(start): t for n, t in tensors.items()}
    save_file(bare, file, metadata={"format": "pt"})
    assert bare.keys() != tensors.keys()
    loaded, info = type(whole).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert modules_of_headers(read_headers(tmp_path)) == modules_of_model(loaded)


@pytest.mark.parametrize("name", ["distilbert", "electra", "gpt2", "llama", "modernbert", "t5"])
def test_a_checkpoint_with_a_head_can_be_asked_for_its_body(
    name: str, architecture: Callable[..., Any], tmp_path: Path
) -> None:
    architecture(name, real=True).save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    found = modules_of_headers(read_headers(tmp_path), type(body).__name__)
    assert found == modules_of_model(body)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2_moe", "t5"])
def test_a_model_on_packed_weights_is_made_of_the_same_modules(
    name: str, architecture: Callable[..., Any], tmp_path: Path
) -> None:
    model = architecture(name, real=True)
    model.save_pretrained(tmp_path)
    placed = place_model(
        tmp_path, load.empty(tmp_path), device=torch.device("cpu"), dtype=torch.float32
    )
    found = modules_of_model(placed.model)
    placed.close()
    assert found == modules_of_model(model)


def headers_of(config: dict[str, Any], **shapes: tuple[int, ...]) -> Headers:
    nowhere = Path("nowhere")
    tensors = (
        TensorHeader(n, "I32" if n.endswith("packed") else "F32", s, 0, nowhere, 0)
        for n, s in shapes.items()
    )
    return Headers(nowhere, tuple(tensors), config)


def test_packed_weights_have_the_shape_that_they_unpack_to() -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4}}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "quantization_config": {"config_groups": {"group_0": group}},
    }
    name = "model.layers.0.mlp.up_proj"
    found = modules_of_headers(
        headers_of(
            config,
            **{
                f"{name}.weight_packed": (24, 2),  # 8 values of 4 bits in an int32
                f"{name}.weight_scale": (24, 1),
                f"{name}.weight_shape": (2,),
                "model.embed_tokens.weight": (40, 16),
            },
        )
    )
    assert found[name] == Module("linear", (24, 16))
    assert found["lm_head"] == Module("linear", (40, 16), head=True)
    assert len([n for n in found if n.startswith("model.layers.0.mlp")]) == 2


def test_old_names_of_norms_and_buffers_make_no_other_modules() -> None:
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    found = modules_of_headers(
        headers_of(
            config,
            **{
                "bert.embeddings.word_embeddings.weight": (40, 16),
                "bert.embeddings.position_ids": (1, 34),
                "bert.embeddings.LayerNorm.gamma": (16,),
                "bert.embeddings.LayerNorm.beta": (16,),
                "bert.rotary.inv_freq": (4,),
            },
        )
    )
    assert found["bert.embeddings.LayerNorm"] == Module("norm", (16,))
    assert {n for n in found if n.startswith("bert")} == {
        *("bert", "bert.embeddings", "bert.embeddings.LayerNorm"),
        "bert.embeddings.word_embeddings",
    }


def test_planning_by_headers_needs_no_torch() -> None:
    code = "import sys, bmkit.deltas.stored, bmkit.deltas.address; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout == "False\n", done.stderr
