"""Writing a checkpoint tensor by tensor: what plain loaders read is what was given."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bmkit import place
from bmkit.errors import ResourceError, machine_refusal
from bmkit.model import ShardWriter


def write(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    """Write `tensors` with shards of this size."""
    writer = ShardWriter(folder, shard_bytes=shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


def stored(folder: Path) -> dict[str, Tensor]:
    """Return what plain safetensors reads from every file of `folder`."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not set(part) & set(found), "a tensor is stored twice"
        found |= part
    return found


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Tensors of several dtypes, one of them not contiguous."""
    torch.manual_seed(0)
    return {
        "a": torch.randn(8, 4),  # 128 bytes
        "b": torch.randn(6, 4).to(torch.bfloat16),  # 48 bytes
        "c": torch.arange(16, dtype=torch.int32).reshape(4, 4).T,  # 64 bytes
        "d": torch.tensor(3.0),
        "e": torch.zeros(0, 4),
        "f": torch.randn(50),  # 200 bytes: more than a shard by itself
    }


def test_one_shard_has_the_plain_name_and_no_index(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    write(tmp_path, tensors, 2**20)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_several_shards_have_numbered_names_and_an_index(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    write(tmp_path, tensors, 130)
    # a | b c d e | f: none but a single tensor is larger than 130 bytes
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"] == {
        name: next(f for f in names if name in load_file(tmp_path / f)) for name in tensors
    }
    assert [len(load_file(tmp_path / name)) for name in names] == [1, 4, 1]


@pytest.mark.parametrize("shard_bytes", [1, 130, 300, 2**20])
def test_plain_safetensors_reads_what_was_written(
    tmp_path: Path, tensors: dict[str, Tensor], shard_bytes: int
) -> None:
    write(tmp_path, tensors, shard_bytes)
    found = stored(tmp_path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("shard_bytes", [2**12, 2**30])
def test_plain_transformers_loads_what_was_written(tmp_path: Path, shard_bytes: int) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=False,
        )
    ).eval()
    model.config.save_pretrained(tmp_path)
    write(tmp_path, model.state_dict(), shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes == 2**30)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(20).reshape(2, 10)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_no_more_than_a_shard_is_kept_in_memory(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_bytes=1000)
    for i in range(10):
        writer.add(f"t{i}", torch.zeros(100))  # 400 bytes
        files = list(tmp_path.glob("*.safetensors"))
        assert len(files) == i // 2, "two tensors make a full shard"
    writer.close()
    assert len(stored(tmp_path)) == 10


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """Let no file grow beyond `count` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def by_shards(folder: Path) -> None:
    writer = ShardWriter(folder)
    writer.add("a", torch.zeros(100_000))
    writer.close()


WRITERS = {
    "shards": by_shards,
    "safetensors": lambda folder: save_file({"a": torch.zeros(100_000)}, folder / "x"),
    "torch": lambda folder: torch.save(torch.zeros(100_000), folder / "x"),
    "text": lambda folder: (folder / "x").write_text("x" * 100_000),
    "cause": lambda folder: wrapped(folder / "x"),
}


def wrapped(file: Path) -> None:
    try:
        file.write_text("x" * 100_000)
    except OSError as exc:
        raise RuntimeError("saving failed") from exc


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_is_an_error_of_the_machine(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(ResourceError, match="cannot write") as caught,
        place.create(tmp_path / "out") as scratch,
        files_of_at_most(4096),
    ):
        WRITERS[name](scratch)
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_our_own_stays_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), place.create(tmp_path / "out"):
        raise RuntimeError("a bug")


def test_a_refused_allocation_is_an_error_of_the_machine() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert machine_refusal(caught.value) == "out of memory"
