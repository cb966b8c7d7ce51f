"""Where a model's parameters come from: a checkpoint's files, by the names that the model uses."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmkit.errors import InputError
from bmkit.plan import TensorHeader
from bmkit.runtime.cpu import pack
from bmkit.runtime.cpu.pack import Packed, Shape
from bmkit.runtime.cpu.source import DTYPES, PART, Files
from bmkit.runtime.placed.matrix import Rounding

META_DTYPES = {**DTYPES, "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}
QUANTISED = (
    ".weight_packed",
    ".weight_kept",
    ".weight_places",
    ".weight_scale",
    ".weight_shape",
    ".weight_zero_point",
    ".input_scale",
)


@dataclass(frozen=True)
class _Made:
    """A parameter that transformers makes of several tensors, or of parts of one."""

    keys: tuple[tuple[str, str], ...]  # names in the files, each with the pattern it matched
    converter: Any
    first: str  # the first parameter that the converter gives
    shape: torch.Size


class Origin:
    """The tensors of a checkpoint by a model's parameter names.

    transformers renames, joins and splits tensors while it loads; the same rules are applied here,
    to one parameter at a time. `model` may be on the meta device. Raises InputError for a dtype
    that can't be used; `missing` are parameters that the files don't hold.
    """

    def __init__(self, path: Path, model: nn.Module, *, quant: str | None = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.path, self.model = path, model
        self.files = Files(path, quant=quant)
        self.lock = threading.Lock()
        rules = get_model_conversion_mapping(model)
        self.renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        self.converters = [r for r in rules if isinstance(r, WeightConverter)]
        self.plain: dict[str, str] = {}
        self.made: dict[str, _Made] = {}
        self._map()
        found = {*self.plain, *self.made}
        ids = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
        there = {ids[name] for name in found if name in ids}
        self.missing = sorted(n for n, key in ids.items() if key not in there)

    def _map(self) -> None:
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        state = _owned(self.model)
        prefix = getattr(self.model, "base_model_prefix", None)
        groups: dict[str, list[tuple[str, str]]] = {}
        for key in sorted(self.files.tensors, key=dot_natural_key):
            own = key
            for suffix in QUANTISED:
                own = own.removesuffix(suffix) + ".weight" if own.endswith(suffix) else own
            renamed, pattern = rename_source_key(
                own, self.renamings, self.converters, prefix, state
            )
            if renamed not in state:
                renamed, pattern = rename_source_key(own, [], [], prefix, state)
            if renamed not in state:
                continue
            if pattern is None:
                self.plain[renamed] = own
            else:
                groups.setdefault(renamed, []).append((key, pattern))
        patterns = {p: c for c in self.converters for p in c.source_patterns}
        for first, keys in groups.items():
            made = _Made(tuple(keys), patterns[keys[0][1]], first, torch.Size())
            for name, tensor in self._convert(made, self._empty).items():
                self.made[name] = _Made(made.keys, made.converter, first, tensor.shape)

    def _empty(self, key: str) -> Tensor:
        header = self.files.tensors[key]
        if header.dtype not in META_DTYPES:
            raise InputError(f"{self.path}: {key} is stored as {header.dtype}")
        return torch.empty(header.shape, dtype=META_DTYPES[header.dtype], device="meta")

    def _convert(self, made: _Made, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        converter = copy.deepcopy(made.converter)
        for key, pattern in made.keys:
            converter.add_tensor(made.first, key, pattern, read(key))
        found = converter.convert(made.first, model=self.model, config=self.model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in found.items()}

    def require_shapes(self) -> None:
        """Raise InputError for a stored tensor that hasn't the shape that the model wants."""
        for name, parameter in self.model.named_parameters():
            header, wanted = self.header(name), tuple(parameter.shape)
            if header is not None:
                found = header.shape
            elif (packed := self.packed_shape(name)) is not None:
                found = (packed.rows, packed.inputs)
            else:
                continue
            if found != wanted:
                raise InputError(
                    f"{self.path}: {name} has the shape {list(found)}, its config wants "
                    f"{list(wanted)}",
                    hint="the weights belong to another config.json; fetch the checkpoint again",
                )

    def header(self, name: str) -> TensorHeader | None:
        """Return the one stored tensor that is parameter `name`, None if it is made otherwise."""
        key = self.plain.get(name, "")
        if self.files.plain_integers(key.removesuffix(".weight")):
            return None
        return self.files.tensors.get(key)

    def rounding(self, name: str) -> Rounding | None:
        """Return how what goes into a layer is rounded, by the name of its weight; None: not."""
        key = self.plain.get(name, "").removesuffix(".weight")
        if not self.files.plain_integers(key):
            return None
        groups = (self.files.headers.config["quantization_config"] or {})["config_groups"]
        found = next((g["input_activations"] for g in groups.values()), None)
        if not found:
            return None
        if found.get("dynamic"):
            return Rounding()
        scale = self.files.read(self.files.tensors.get(f"{key}.input_scale"))
        if scale is None or scale.numel() != 1 or not float(scale) > 0:
            raise InputError(f"{self.path}: {key} lacks its input_scale")
        return Rounding(float(scale))

    def holds(self, name: str) -> bool:
        """Tell whether the files hold parameter `name`."""
        return name in self.plain or name in self.made

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a parameter is stored; int8 for packed integers."""
        if name in self.made:
            return self._empty(self.made[name].keys[0][0]).dtype
        header = self.header(name)
        if header is None:
            return torch.int8
        return self._empty(header.name).dtype

    def packed_shape(self, name: str) -> Shape | None:
        """Return the shape of a matrix that is stored as packed integers; None if it isn't."""
        key = self.plain.get(name)
        if key is None or self.header(name) is not None:
            return None
        return self.files.shape(key.removesuffix(".weight"))

    def integers(self, name: str) -> Packed:
        """Return a matrix that `packed_shape` knows."""
        return self.files.packed(self.plain[name].removesuffix(".weight"))

    def tensor(self, name: str) -> Tensor:
        """Return a parameter in the dtype in which it is stored, dense.

        Raises InputError if a weight is not finite.
        """
        if name in self.made:
            with self.lock:  # transformers' rules keep what they have matched
                found = self._convert(self.made[name], self._stored)[name]
        elif (header := self.header(name)) is not None:
            found = self._stored(header.name)
        else:
            from bmkit.nn.rounding import dequantize

            integers = self.integers(name)
            values = torch.from_numpy(pack.integers(integers))
            assert integers.scales is not None  # integers have them
            scale, zero = pack.scales_and_zeros(integers.scales, integers.shape.kind)
            middle = None if zero is None else torch.from_numpy(zero)
            found = dequantize(values, torch.from_numpy(scale), middle)
        if found.is_floating_point():
            self.files.require_finite(name, found)
        return found

    def _stored(self, key: str) -> Tensor:
        found = self.files.read(self.files.tensors[key])
        assert found is not None  # it is in the headers
        return found

    def read_into(self, name: str, out: Tensor, *, low: int = 0, transposed: bool = False) -> None:
        """Write a parameter into `out`, in out's dtype: as many rows from `low` on as `out` has.

        It is read straight to its place where it is stored as it is used and was looked at before.
        """
        header = self.header(name)
        if header is None or header.dtype not in DTYPES:
            found = self.tensor(name).reshape(-1, *out.shape[1:]) if out.ndim else self.tensor(name)
            out.copy_(found[low : low + len(out)] if out.ndim else found)
            return
        rows = out.numel() // max(math.prod(header.shape[1:]), 1)
        if not transposed and out.is_contiguous() and out.dtype == DTYPES[header.dtype]:
            start = low * math.prod(header.shape[1:]) * out.element_size()
            self.files.pread(header, out.view(-1).view(torch.uint8).numpy(), start)
            self.files.require_finite(name, out, low)
            return
        if transposed:  # its rows are columns of what is stored, so all of those are read
            low, rows, out = 0, header.shape[0], out.T
        step = max(1, PART * rows // max(out.numel(), 1))
        flat = out if out.ndim else out.reshape(1)
        if len(flat) != rows:  # stored as a stack of matrices
            flat = torch.unflatten(flat, 0, (rows, len(flat) // rows))
        for at in range(0, rows, step):
            end = min(at + step, rows)
            found = self.files.read_again(header, low + at, end - at)
            self.files.require_finite(name, found, low + at)
            place = flat if end - at == rows else flat[at:end]
            place.copy_(found.reshape(place.shape))

    def parts(
        self, name: str, shape: Shape, *, low: int = 0, transposed: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield a matrix of floats a part of its rows at a time, from `low` on: where, and what."""
        step = max(1, PART // max(shape.inputs, 1))
        header = self.header(name)
        if header is None or transposed or header.dtype not in DTYPES or len(header.shape) != 2:
            found = self.tensor(name)
            found = found.T if transposed else found.reshape(-1, shape.inputs)
            for at in range(0, shape.rows, step):
                yield at, found[low + at : low + min(at + step, shape.rows)]
            return
        for at in range(0, shape.rows, step):
            part = self.files.read_again(header, low + at, min(step, shape.rows - at))
            self.files.require_finite(name, part, low + at)
            yield at, part

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Return rows of a stored matrix, reading only those: float32 [ids, inputs]."""
        header = self.header(name)
        if header is None:
            return self.tensor(name).float()[ids]
        found = [self.files.some(header.name, header, int(i), 1) for i in ids.tolist()]
        return torch.cat(found).float()


def _owned(model: nn.Module) -> Mapping[str, Tensor]:
    """Return parameters and saved buffers under all their names."""
    return model.state_dict(keep_vars=True)
