"""What a stage will need, from safetensors headers alone: no torch, no weights read."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from bmkit import env
from bmkit.artifact import QUANTO, WEIGHTS, Artifact, deltas
from bmkit.errors import InputError, ResourceError
from bmkit.recipe import Recipe
from bmkit.report import Reporter

DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
MAX_HEADER_BYTES = 100_000_000
RUNTIME_BYTES = 700 * 2**20  # torch, transformers and their code, as measured on CPU
"""Resident memory of a process that has imported torch, transformers and peft."""


Task = Literal["generate", "classify", "tag", "embed"]
ENCODERS = (
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie"),
    *("esm", "modernbert", "mpnet", "nomic_bert", "roberta", "roformer", "xlm-roberta"),
    *("eurobert", "jina_embeddings_v3", "megatron-bert", "mobilebert", "rembert", "xmod"),
)
"""Model types that read a text and don't go on with it."""


def task(config: Mapping[str, Any]) -> Task:
    """Tell what a checkpoint is for, by its `config.json`."""
    names = config.get("architectures") or [""]
    if names[0].endswith("ForSequenceClassification"):
        return "classify"
    if names[0].endswith("ForTokenClassification"):
        return "tag"
    if names[0].endswith("EncoderModel"):  # of an encoder-decoder, the encoder alone
        return "embed"
    return "embed" if config.get("model_type") in ENCODERS else "generate"


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a checkpoint, by its header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: Path
    start: int
    """Where in `file` its bytes begin."""

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Headers:
    """The headers of all tensors in a checkpoint, and its `config.json`."""

    path: Path
    tensors: tuple[TensorHeader, ...]
    config: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Return the size of all tensors on disk."""
        return sum(t.bytes for t in self.tensors)

    @cached_property
    def modules(self) -> dict[str, TensorHeader]:
        """Return the modules that own a matrix [out, in], by name: linears and embeddings."""
        found = {}
        for t in self.tensors:
            for suffix in (".weight", ".weight_packed", ".weight_kept"):
                if t.name.endswith(suffix) and len(t.shape) == 2:
                    found[t.name.removesuffix(suffix)] = t
        return found

    def numel(self, module: TensorHeader) -> int:
        """Return the number of weights of a module, packed or not."""
        if module.name.endswith("_kept"):  # two of four: bytes of 8 bits, else nibbles
            return module.numel * (2 if self.bits_of(module.name) == 8 else 4)
        if module.name.endswith(".qweight"):  # GPTQ's words
            return module.numel * 32 // int(self._quantization.get("bits") or 8)
        if module.name.endswith("._data._data"):  # quanto's bytes
            return module.numel * (4 if self._quantization.get("weights") == "int2" else 2)
        if not module.name.endswith("_packed"):
            return module.numel
        return module.numel * 32 // self.bits_of(module.name)

    @property
    def _quantization(self) -> Mapping[str, Any]:
        return self.config.get("quantization_config") or {}

    @cached_property
    def _schemes(self) -> list[tuple[list[str], int]]:
        """Return what the quantization config says: module names or patterns, and their bits."""
        groups = self._quantization.get("config_groups") or {}
        return [
            (list(g.get("targets") or []), int(g["weights"]["num_bits"]))
            for g in groups.values()
            if g.get("weights")
        ]

    def bits_of(self, tensor: str) -> int:
        """Return the bits of a packed weight, by the checkpoint's quantization config.

        A group that names the module, or a pattern (`re:…`) that it matches, goes before groups
        that name classes of layers.
        """
        module = tensor.rpartition(".")[0]
        rest = 8
        for targets, bits in reversed(self._schemes):
            for target in targets:
                pattern = target.removeprefix("re:")
                if target == module or (pattern != target and re.match(pattern, module)):
                    return bits
            rest = bits
        return rest

    @cached_property
    def dense_numel(self) -> int:
        """Return the number of weights that the model has once everything is unpacked."""
        return sum(self.numel(t) for t in self.tensors if not t.name.endswith(_BESIDE))


FOREIGN = ("gptq", "quanto")
"""Formats of other libraries, by their `quant_method`: unpacked as a whole."""
_BESIDE = (
    *("weight_scale", "weight_shape", "weight_zero_point", "weight_places"),
    *(".qzeros", ".scales", ".g_idx"),  # GPTQ's
    *("._scale", "._shift", ".input_scale", ".output_scale"),  # quanto's
)
"""What stands beside packed weights, and is no weight."""


def read_headers(path: Path) -> Headers:
    """Read the headers of the safetensors files that a loader would read in `path`.

    Those are `model.safetensors`, else what its index names, else an adapter's file. Raises
    InputError naming the file that is truncated, foreign or missing.
    """
    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    if (path / QUANTO).is_file():  # whose own writer says it nowhere else
        config.setdefault("quantization_config", {"quant_method": "quanto"})
    whole, index = (path / name for name in WEIGHTS)
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        found = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        named = [name for name in found if isinstance(name, str)]
        if len(named) < len(found):
            raise InputError(f"{index} has no weight_map of file names")
        for name in named:
            if Path(name).name != name:
                raise InputError(f"{index} names {name}, which is not a file beside it")
        files = [path / name for name in sorted(set(named))]
    else:
        files = [f for f in (path / "adapter_model.safetensors",) if f.is_file()]
    tensors = tuple(t for file in files for t in _file_headers(file))
    if not tensors:
        raise InputError(f"{path} holds no tensors")
    return Headers(path, tensors, config)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError if it is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise InputError(f"{path} cannot be read: {exc.strerror}") from None
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path} is not JSON: {exc}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object")
    return found


def _file_headers(file: Path) -> list[TensorHeader]:
    foreign = f"{file} is not a safetensors file"
    if not file.is_file():
        raise InputError(f"{file} is missing", hint="its index names it; fetch it again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise InputError(foreign, hint="was it damaged on its way?")
        text = stream.read(length)
    if len(text) < length:
        raise InputError(f"{file} is truncated: its header is cut off", hint="fetch it again")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = [_tensor_header(name, t, file, 8 + length) for name, t in header.items()]
        end = max((t["data_offsets"][1] for t in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise InputError(foreign, hint="was it damaged on its way?") from None
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "longer than its header says"
        raise InputError(
            f"{file} is {what}: {size} bytes instead of {8 + length + end}", hint="fetch it again"
        )
    for t in tensors:
        if t.dtype in DTYPE_BYTES and t.numel * DTYPE_BYTES[t.dtype] != t.bytes:
            raise InputError(f"{file}: tensor {t.name} has the wrong size", hint="fetch it again")
    return tensors


def _tensor_header(name: str, values: dict[str, Any], file: Path, base: int) -> TensorHeader:
    """Read one entry of a header. Raises ValueError, TypeError or KeyError if it makes no sense."""
    dtype, shape = values["dtype"], values["shape"]
    start, end = values["data_offsets"]
    numbers = [*shape, start, end]
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError
    return TensorHeader(name, dtype, tuple(shape), end - start, file, base + start)


@dataclass(frozen=True)
class Peak:
    """The most that a stage will hold at one time."""

    ram_bytes: int
    gpu_bytes: int
    disk_bytes: int
    work_bytes: int = 0
    """Disk under BMKIT_HOME/work: the checkpoints of a training run."""


@dataclass(frozen=True)
class Estimate:
    """What an engine's `plan.estimate` answers."""

    steps: list[str]
    peak: Peak
    rates: Callable[[], Mapping[str, float]] | None = None
    """Measures this machine for a moment, and says how fast the stage should be."""


@dataclass(frozen=True)
class Job:
    """All that an engine gets: a checked recipe, its inputs, and a place to write."""

    recipe: Recipe
    model: Artifact
    base: Artifact | None
    """The model under `model` when that is a delta."""
    files: Mapping[str, Path]
    """The data files of the recipe, by dotted key."""
    out: Path
    """An empty directory; what the engine leaves there becomes the artifact."""
    work: Path
    """A directory that outlives a killed run: training checkpoints."""
    reporter: Reporter
    threads: int | None = None
    adapters: tuple[Artifact, ...] = ()
    cpu_memory: int | None = None
    """The budget in bytes for what comes on top of the libraries."""
    gpu_memory: int | None = None
    """The budget in bytes for everything that the process holds on the GPU."""
    rows: int | None = None
    """How many prompts there are to answer, if that is known."""
    longest: str | None = None
    """The text of the longest of them, if that is known."""
    draft: Artifact | None = None
    """A model that guesses what `model` will say."""
    models: Mapping[str, Artifact] = field(default_factory=dict)
    """Further models that the recipe names, by dotted key."""
    phrases: Path | None = None
    """Where the phrase pool is, or is to be."""
    is_draft: bool = False
    """Whether the model is opened beside another one, to guess for it."""
    tight: bool = False
    """Whether that one has a budget, which this one counts in."""
    prompt: Artifact | None = None
    """The prompt that is asked; `model` is what it was made on."""

    @property
    def deltas(self) -> tuple[Artifact, ...]:
        """Return the adapters to put on the model, that of `model` first."""
        return (self.model, *self.adapters) if self.base else self.adapters

    @property
    def adapter_paths(self) -> list[Path]:
        """Return the PEFT directories of `deltas`, in the order in which they go on the model."""
        return [folder for delta in self.deltas for folder in deltas(delta.path)]

    @property
    def checkpoint(self) -> Path:
        """Return the directory with the model's weights."""
        return (self.base or self.model).path


@dataclass(frozen=True)
class Outcome:
    """What an engine says when it is done."""

    kind: str
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)
    loads_in: tuple[str, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    """What `--report` says besides, and the artifact doesn't: it is another each time."""
    table: Sequence[Mapping[str, float | int | str]] = ()
    """What was measured after each of several steps, a line each."""


def check_fits(
    peak: Peak, out: Path, work: Path, *, ram_limit: int | None, gpu_limit: int | None
) -> None:
    """Raise ResourceError if this machine, or a budget, can't hold `peak`.

    `ram_limit` bounds what comes on top of the libraries: the peak minus RUNTIME_BYTES, as the
    resident memory just before the model is opened isn't counted.
    """
    needs: dict[int, list[tuple[Path, int]]] = {}
    for where, need in ((out, peak.disk_bytes), (work, peak.work_bytes)):
        if need:
            needs.setdefault(env.disk_of(where), []).append((where, need))
    for parts in needs.values():
        free = env.free_disk_bytes(parts[0][0])
        if (need := sum(n for _, n in parts)) > free:
            raise ResourceError(
                f"{' and '.join(str(p) for p, _ in parts)} need{'s' * (len(parts) == 1)} "
                f"{env.format_bytes(need)} of disk, "
                f"{env.format_bytes(free)} are free there",
                hint="free some space, or name an --out and a BMKIT_HOME on another disk",
            )
    available = env.available_ram_bytes()
    if peak.ram_bytes > available:
        raise ResourceError(
            f"this needs about {env.format_bytes(peak.ram_bytes)} of memory, "
            f"{env.format_bytes(available)} are available",
            hint="close other programs, or take a smaller model",
        )
    for limit, need, flag in (
        (ram_limit, peak.ram_bytes - RUNTIME_BYTES, "--cpu-memory"),
        (gpu_limit, peak.gpu_bytes, "--gpu-memory"),
    ):
        if limit is not None and need > limit:
            raise ResourceError(
                f"{flag} {env.format_bytes(limit)} is too small: this needs "
                f"{env.format_bytes(need)}",
                hint=f"the smallest that works is {flag} {math.ceil(need / 2**20)}MiB",
            )
