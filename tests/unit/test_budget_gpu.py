"""What is planned for a GPU, without one: bytes of tensors, and which device a process takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bmkit import model
from bmkit.errors import ResourceError
from bmkit.plan import Headers, TensorHeader
from bmkit.runtime import budget
from bmkit.train.together import own_device


def headers(*tensors: tuple[str, str, tuple[int, ...]], dtype: str | None = "bfloat16") -> Headers:
    file = Path("model.safetensors")
    made = tuple(TensorHeader(name, kind, shape, 0, file, 0) for name, kind, shape in tensors)
    return Headers(file.parent, made, {"vocab_size": 1000, "dtype": dtype})


@pytest.mark.parametrize(
    ("dtype", "device", "stored", "width"),
    [
        ("auto", "cpu", "bfloat16", 4),
        ("auto", "cuda", "bfloat16", 2),
        ("auto", "cuda:1", "float32", 4),
        ("auto", "cuda", None, 4),
        ("float32", "cuda", "bfloat16", 4),
        ("float16", "cuda", "float32", 2),
    ],
)
def test_the_bytes_of_a_number_are_those_of_the_dtype_that_is_computed_in(
    dtype: str, device: str, stored: str | None, width: int
) -> None:
    assert budget.computed_bytes(dtype, device, headers(dtype=stored)) == width


@pytest.mark.parametrize(
    ("name", "kind", "shape", "quant", "width", "least"),
    [
        ("model.layers.0.mlp.up_proj.weight", "BF16", (64, 64), None, 4, 64 * 64 * 4),
        ("model.layers.0.mlp.up_proj.weight", "BF16", (64, 64), None, 2, 64 * 64 * 2),
        ("model.embed_tokens.weight", "BF16", (1000, 64), "int4", 4, 1000 * 64),
        ("model.embed_tokens.weight", "BF16", (1000, 64), "int4", 2, 1000 * 64),
        ("model.layers.0.mlp.up_proj.weight_scale", "BF16", (64, 4), None, 2, 64 * 4 * 4),
    ],
)
def test_a_tensor_on_a_gpu_counts_with_what_a_slab_holds_of_it(
    name: str, kind: str, shape: tuple[int, ...], quant: str | None, width: int, least: int
) -> None:
    whole = headers((name, kind, shape))
    found = budget._any_bytes(whole.tensors[0], whole, quant, width, gpu=True)
    assert least <= found <= 1.3 * least + 200


LAUNCHED = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


def test_each_process_has_a_gpu_of_its_own_or_says_that_there_are_too_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device(torch.device("cuda", 0)) == torch.device("cuda", 1)
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ResourceError, match="no GPU for process 2 of this machine: it has 1"):
        own_device(torch.device("cuda", 0))


def test_cuda_is_the_first_gpu_and_others_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert model.pick_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setattr(model, "devices", lambda: ["cpu"])
    with pytest.raises(ResourceError, match="no device `cuda:1` here"):
        model.pick_device("cuda:1")
