"""Planning: safetensors headers read without torch, sizes as users write them, budgets."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from bmkit import env, plan
from bmkit.errors import InputError, ResourceError, UsageError
from bmkit.plan import RUNTIME_BYTES, Peak

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8": torch.float8_e4m3fn,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a tensor of every dtype, an empty one and a scalar."""
    tensors = {name: torch.zeros(3, 5, dtype=dtype) for name, dtype in DTYPES.items()}
    tensors |= {
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
        "cube": torch.ones(2, 3, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"hidden_size": 5}')
    return tmp_path


def test_headers_equal_what_safetensors_says(folder: Path) -> None:
    found = {t.name: t for t in plan.read_headers(folder).tensors}
    with safe_open(folder / "model.safetensors", framework="pt") as theirs:
        names = list(theirs.keys())
        assert set(found) == set(names)
        for name in names:
            tensor, entry = theirs.get_tensor(name), theirs.get_slice(name)
            ours = found[name]
            assert (ours.dtype, list(ours.shape)) == (entry.get_dtype(), entry.get_shape())
            assert ours.bytes == tensor.numel() * tensor.element_size()
            assert ours.numel == tensor.numel()
            assert ours.file == folder / "model.safetensors"


def test_a_checkpoint_knows_its_size_and_its_config(folder: Path) -> None:
    headers = plan.read_headers(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as theirs:
        sizes = [theirs.get_tensor(n).nbytes for n in theirs.keys()]  # noqa: SIM118
    assert headers.bytes == sum(sizes)
    assert headers.config == {"hidden_size": 5}


def test_modules_are_the_matrices_that_are_called_weight(tmp_path: Path) -> None:
    shapes = {
        "model.embed_tokens.weight": (10, 4),
        "model.layers.0.mlp.up_proj.weight": (8, 4),
        "model.layers.0.mlp.up_proj.bias": (8,),
        "model.norm.weight": (4,),
        "conv.weight": (2, 3, 4),
        "relative_bias": (3, 3),
    }
    save_file({n: torch.zeros(s) for n, s in shapes.items()}, tmp_path / "model.safetensors")
    headers = plan.read_headers(tmp_path)
    assert {n: t.shape for n, t in headers.modules.items()} == {
        "model.embed_tokens": (10, 4),
        "model.layers.0.mlp.up_proj": (8, 4),
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_count_as_the_weights_that_they_stand_for(tmp_path: Path, bits: int) -> None:
    packed = {
        "a.weight_packed": torch.zeros(6, 64 * bits // 32, dtype=torch.int32),
        "a.weight_scale": torch.zeros(6, 2),
        "a.weight_shape": torch.tensor([6, 64]),
        "b.weight": torch.zeros(7, 3),
        "b.bias": torch.zeros(7),
    }
    save_file(packed, tmp_path / "model.safetensors")
    groups = {"group_0": {"weights": {"num_bits": bits}}}
    config = {"quantization_config": {"config_groups": groups}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    headers = plan.read_headers(tmp_path)
    assert headers.dense_numel == 6 * 64 + 7 * 3 + 7
    assert headers.numel(headers.modules["a"]) == 6 * 64


# --- damage --------------------------------------------------------------------------------------


def cut(folder: Path, size: int) -> None:
    """Cut the checkpoint's file to `size` bytes (from its end, if negative)."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def test_a_file_truncated_anywhere_is_refused_and_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    inside_length = [0, 1, 7]
    inside_header = [8, 9, 8 + length // 2, 8 + length - 1]
    inside_data = [8 + length, 8 + length + 1, len(whole) - 1]
    for size in (*inside_length, *inside_header, *inside_data):
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"model\.safetensors") as caught:
            plan.read_headers(folder)
        assert caught.value.exit_code == 3
        assert caught.value.hint
    (folder / "model.safetensors").write_bytes(whole)
    plan.read_headers(folder)


def test_a_truncated_file_is_called_truncated(folder: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size
    cut(folder, -100)
    with pytest.raises(InputError, match=f" is truncated: {size - 100} bytes instead of {size}"):
        plan.read_headers(folder)
    cut(folder, 40)
    with pytest.raises(InputError, match=r"safetensors is truncated: its header"):
        plan.read_headers(folder)


def test_a_file_longer_than_its_header_says_is_refused(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(InputError, match="longer than its header says"):
        plan.read_headers(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html>404 Not Found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"PK\x03\x04" + bytes(100),
        b"\x80\x02}q\x00." + bytes(50),
        b"GGUF" + bytes(60),
        bytes(64),
        b"\xff" * 64,
    ],
)
def test_foreign_bytes_are_called_foreign(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"not a safetensors file|truncated"):
        plan.read_headers(folder)


def header(text: str | bytes, data: bytes = b"") -> bytes:
    """Return a file with this header."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + data


def entry(**changes: object) -> str:
    """Return a header with one tensor of 4 bytes, changed."""
    return json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}})


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        '"text"',
        "{",
        b"\xff\xfe{}",
        '{"w": 1}',
        '{"w": {}}',
        '{"w": {"dtype": "F32"}}',
        entry(shape=None),
        entry(shape=5),
        entry(shape=[None]),
        entry(shape=["1"]),
        entry(shape=[-1]),
        entry(shape=[0.5, 2]),
        entry(dtype=[]),
        entry(dtype=None),
        entry(data_offsets=None),
        entry(data_offsets=[0]),
        entry(data_offsets=["0", "4"]),
        entry(data_offsets=[4, 0]),
        entry(data_offsets=[-4, 0]),
        "[" * 200_000,
        '{"a":' * 200_000,
    ],
    ids=lambda text: str(text)[:50],
)
def test_a_header_that_makes_no_sense_is_an_input_error(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(header(text, bytes(4)))
    with pytest.raises(InputError, match=r"model\.safetensors"):
        plan.read_headers(tmp_path)


@given(st.binary(max_size=64) | st.text(max_size=32).map(lambda t: header(t, bytes(4))))
@settings(max_examples=200, deadline=None)
def test_no_bytes_at_all_crash_the_reader(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-bytes"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="any-bytes"):
        plan.read_headers(folder)


def test_a_tensor_whose_size_does_not_follow_from_its_shape_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(header(entry(shape=[2]), bytes(4)))
    with pytest.raises(InputError, match="tensor w"):
        plan.read_headers(tmp_path)


def sharded(folder: Path, weight_map: object) -> None:
    """Write one shard and an index."""
    save_file({"a": torch.zeros(2)}, folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_all_shards_that_the_index_names_are_read_and_no_other(tmp_path: Path) -> None:
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    sharded(tmp_path, {"a": first, "b": second, "c": second})
    save_file({"b": torch.zeros(3), "c": torch.zeros(4)}, tmp_path / second)
    save_file({"d": torch.zeros(5)}, tmp_path / "leftover.safetensors")
    found = plan.read_headers(tmp_path).tensors
    assert [(t.name, t.file.name) for t in found] == [("a", first), ("b", second), ("c", second)]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    sharded(tmp_path, names)
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors is missing") as caught:
        plan.read_headers(tmp_path)
    assert "index" in str(caught.value.hint)


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, {"a": 1, "b": "x"}, {"a": ["x"]}, {"a": None}, {"a": ""}]
)
def test_an_index_that_makes_no_sense_is_an_input_error(tmp_path: Path, weight_map: object) -> None:
    sharded(tmp_path, weight_map)
    with pytest.raises(InputError):
        plan.read_headers(tmp_path)


def test_an_index_cannot_lead_out_of_the_checkpoint(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"b": torch.zeros(3)}, tmp_path / "outside.safetensors")
    sharded(inside, {"a": "model-00001-of-00002.safetensors", "b": "../outside.safetensors"})
    with pytest.raises(InputError, match=r"outside\.safetensors"):
        plan.read_headers(inside)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 200_000, "\ud800"])
def test_a_config_that_is_no_json_object_is_an_input_error(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=r"config\.json"):
        plan.read_headers(folder)


def test_what_a_loader_would_not_read_is_not_counted(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    save_file({"b": torch.zeros(5)}, tmp_path / "consolidated.safetensors")
    assert [t.name for t in plan.read_headers(tmp_path).tensors] == ["a"]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no tensors"):
        plan.read_headers(tmp_path)


def test_a_folder_without_tensors_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tensors"):
        plan.read_headers(tmp_path)


# --- sizes and budgets ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("6 GB", 6_000_000_000),
        ("6GB", 6_000_000_000),
        ("6GiB", 6_442_450_944),
        ("6gib", 6_442_450_944),
        (" 6 GiB ", 6_442_450_944),
        ("512 MiB", 536_870_912),
        ("1.5KiB", 1536),
        ("1.5kB", 1500),
        ("2TB", 2_000_000_000_000),
        ("1TiB", 1_099_511_627_776),
        ("7", 7),
        ("7B", 7),
        ("1000000000001", 1_000_000_000_001),
    ],
)
def test_a_size_means_what_its_unit_says(text: str, count: int) -> None:
    assert env.parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "0", "0GiB", "0.1B", "-1", "-6GiB", "+6GB", "six", "GB", "6 G B", "6GBit"),
        *("6PiBB", "6e3", "0x10", "1_000", "6,5GB", "1.GB", ".5GB", "6GB 7", "nan", "inf"),
        "\u0666GB",
    ],
)
def test_what_is_no_size_is_a_usage_error_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        env.parse_bytes(text)
    assert caught.value.exit_code == 2
    assert "GiB" in str(caught.value.hint)


@given(st.text(max_size=12) | st.from_regex(r"[0-9]{1,30}(\.[0-9]{1,5})? ?[kmgtKMGT]?i?[bB]?"))
@settings(max_examples=200, deadline=None)
@example("9" * 400)
def test_any_text_is_a_positive_size_or_refused(text: str) -> None:
    with suppress(UsageError):
        assert env.parse_bytes(text) >= 1


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**40, "1024.0 GiB")],
)
def test_a_size_is_written_in_binary_units(count: int, text: str) -> None:
    assert env.format_bytes(count) == text


@pytest.mark.parametrize(
    ("peak", "flag"),
    [
        (Peak(RUNTIME_BYTES + 3_000_001, 0, 0), "--cpu-memory"),
        (Peak(0, 3_000_001, 0), "--gpu-memory"),
    ],
)
def test_a_budget_that_is_too_small_names_the_smallest_that_works(
    tmp_path: Path, peak: Peak, flag: str
) -> None:
    name = "ram_limit" if flag == "--cpu-memory" else "gpu_limit"
    other = {"ram_limit": None, "gpu_limit": None}
    with pytest.raises(ResourceError, match=f"{flag} .* is too small") as caught:
        plan.check_fits(peak, tmp_path, tmp_path, **{**other, name: 3_000_000})
    assert caught.value.exit_code == 4
    smallest = env.parse_bytes(str(caught.value.hint).rpartition(" ")[2])
    plan.check_fits(peak, tmp_path, tmp_path, **{**other, name: smallest})
    plan.check_fits(peak, tmp_path, tmp_path, **{**other, name: 3_000_001})


def test_more_disk_or_memory_than_there_is_is_refused(tmp_path: Path) -> None:
    for peak, what in ((Peak(0, 0, 2**60), "disk"), (Peak(2**60, 0, 0), "memory")):
        with pytest.raises(ResourceError, match=f" of {what}, "):
            there = tmp_path / "not" / "yet"
            plan.check_fits(peak, there, tmp_path, ram_limit=None, gpu_limit=None)


def test_the_disk_of_the_work_folder_counts_too(tmp_path: Path) -> None:
    free = env.free_disk_bytes(tmp_path)
    both = Peak(0, 0, disk_bytes=free * 2 // 3, work_bytes=free * 2 // 3)
    with pytest.raises(ResourceError, match=r"work .*of disk"):
        plan.check_fits(both, tmp_path / "x", tmp_path / "work", ram_limit=None, gpu_limit=None)
    if env.disk_of(Path("/dev/shm")) != env.disk_of(tmp_path):
        half = Peak(0, 0, disk_bytes=free * 2 // 3, work_bytes=1)
        plan.check_fits(half, tmp_path, Path("/dev/shm"), ram_limit=None, gpu_limit=None)


def test_a_containers_page_cache_counts_as_free(tmp_path: Path) -> None:
    assert env.container_free_bytes(tmp_path) is None
    for name, text in {
        "memory.max": "1000\n",
        "memory.current": "900\n",
        "memory.stat": "anon 300\ninactive_file 550\nactive_file 50\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert env.container_free_bytes(tmp_path) == 650
    (tmp_path / "memory.max").write_text("max\n")
    assert env.container_free_bytes(tmp_path) is None


def test_auto_is_resolved_without_torch_and_other_names_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert env.resolve_device("cuda:1") == "cuda:1"
    assert env.resolve_device("cpu") == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert env.resolve_device("auto") == "cpu"
