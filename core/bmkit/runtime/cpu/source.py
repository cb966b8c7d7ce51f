"""Where a decoder's matrices come from: files read piece by piece, or tensors at hand."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bmkit.errors import InputError
from bmkit.nn import two_of_four
from bmkit.nn.rounding import dequantize, quantize
from bmkit.plan import Headers, TensorHeader, read_headers
from bmkit.runtime.cpu import pack
from bmkit.runtime.cpu.dots import BFLOAT16, EIGHTS, FLOAT32, INT8
from bmkit.runtime.cpu.pack import Layout, Packed, Shape
from bmkit.runtime.cpu.window import MappedFile, Window

DTYPES = {
    "U8": torch.uint8,
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
PART = 2**20
"""Weights that are converted at a time: each takes some 16 bytes while it is."""
QUANT = {"int8": (8, None), "int4": (4, 64)}
"""Bits and group of what `quant` means; inputs that the group doesn't divide take 32."""


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the runs of ascending numbers without gaps: the first, and one past the last."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], numbers[i - 1] + 1
            start = i


class Source:
    """Gives matrices by module name; a norm's vector is a float32 matrix of one row."""

    def shape(self, name: str) -> Shape | None:
        """Return the shape of a matrix, None if there is none of that name."""
        raise NotImplementedError

    def packed(self, name: str) -> Packed:
        """Return a matrix that `shape` knows."""
        raise NotImplementedError

    def write(self, name: str, layout: Layout, row: int, slab: np.ndarray) -> None:
        """Put matrix `name` into `slab`, at `row` of the layout."""
        layout.write(slab, row, self.packed(name))

    def write_rows(self, name: str, low: int, layout: Layout, slab: np.ndarray) -> None:
        """Put the rows of `name` from `low` on into `slab`, as many as the layout's one matrix."""
        whole, shape = self.packed(name), layout.shapes[0]
        assert shape is not None  # by construction of the layout
        high = low + shape.rows
        scales = None if whole.scales is None else whole.scales[low:high]
        bias = None if whole.bias is None else whole.bias[low:high]
        layout.write(slab, 0, Packed(shape, whole.data[low:high], scales, bias))

    def write_chosen(
        self, name: str, chosen: Sequence[int], layout: Layout, slab: np.ndarray
    ) -> None:
        """Put the rows `chosen`, ascending, of matrix `name` into `slab`, where the layout says."""
        whole = layout.shapes[0]
        assert whole is not None  # by construction of the layout
        at = 0
        for low, high in runs(chosen):
            part = pack.lay_out([replace(whole, rows=high - low)])
            some = pack.empty_slab(part.bytes)
            self.write_rows(name, low, part, some)
            for which, size in enumerate(whole.sizes):
                each = size // whole.rows
                target = layout.part(slab, 0, which)[at * each : (at + high - low) * each]
                target[:] = part.part(some, 0, which)
            at += high - low

    def rows(self, name: str, ids: Sequence[int]) -> np.ndarray:
        """Return rows of an embedding, unpacked: float32 [ids, inputs]."""
        whole = self.packed(name)
        layout = pack.lay_out([whole.shape])
        slab = pack.empty_slab(layout.bytes)
        layout.write(slab, 0, whole)
        from bmkit.runtime.cpu import block

        out = np.empty((len(ids), whole.shape.inputs), np.float32)
        for row, token in zip(out, ids, strict=True):
            block.unpack(slab, layout.table[0], token, row)
        return out

    def window(self, found: Sequence[tuple[str, Shape]]) -> tuple[Window, list[int]] | None:
        """Return a window on matrices that are in a file as they are used, and where each begins.

        None where there is no such file.
        """
        return None

    def row_window(self, name: str, shape: Shape, low: int) -> Window | None:
        """Return a window on as many rows of a matrix, from `low` on, as `shape` has."""
        return None


class Fetched(Source):
    """A source made of a function that returns packed matrices."""

    def __init__(self, fetch: Callable[[str], Packed | None]) -> None:
        self.fetch = fetch
        self.known: dict[str, Packed | None] = {}

    def _find(self, name: str) -> Packed | None:
        if name not in self.known:
            self.known[name] = self.fetch(name)
        return self.known[name]

    def shape(self, name: str) -> Shape | None:
        """Return the shape of a matrix, None if there is none of that name."""
        found = self._find(name)
        return found.shape if found else None

    def packed(self, name: str) -> Packed:
        """Return a matrix that `shape` knows."""
        found = self._find(name)
        assert found is not None  # `shape` has said so
        return found


def plain(tensors: dict[str, Tensor]) -> Fetched:
    """Return a source of float tensors by transformers' names."""

    def fetch(name: str) -> Packed | None:
        weight = tensors.get(f"{name}.weight")
        if weight is None:
            return None
        if weight.ndim == 1:
            return pack.pack_floats(weight.float()[None])
        return pack.pack_floats(weight, tensors.get(f"{name}.bias"))

    return Fetched(fetch)


class Files(Source):
    """The matrices of a checkpoint, read from its files when they are asked for.

    Files are read, not mapped: a mapped page counts as the process's memory. Packed integers stay
    packed. With `quant`, float matrices are rounded while they are read: linear layers to its bits,
    the embedding and the head to 8.
    """

    def __init__(self, path: Path, *, quant: str | None = None) -> None:
        self.path, self.quant = path, quant
        self.headers: Headers = read_headers(path)
        self.tensors = {t.name: t for t in self.headers.tensors}
        self.handles = {f: os.open(f, os.O_RDONLY) for f in {t.file for t in self.headers.tensors}}
        self.maps: dict[Path, MappedFile] = {}
        self.checked: set[str] = set()
        self.local = threading.local()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        handles = getattr(self, "handles", {})
        while handles:
            os.close(handles.popitem()[1])

    def shape(self, name: str) -> Shape | None:
        """Return the shape of a matrix, None if there is none of that name.

        Raises InputError for a dtype or groups that the kernels don't read.
        """
        bias = f"{name}.bias" in self.tensors
        for suffix in ("packed", "kept"):
            if (packed := self.tensors.get(f"{name}.weight_{suffix}")) is not None:
                return self._integers(name, packed, bias=bias)
        weight = self.tensors.get(f"{name}.weight")
        if weight is None:
            return None
        if self.plain_integers(name):
            rows, inputs = weight.shape
            groups = self.scales(name).shape[1]
            shape = Shape(INT8, rows, inputs, inputs // groups if groups > 1 else None, bias)
            if not shape.readable:
                raise InputError(f"{self.path}: {name} has {groups} groups of {inputs} inputs")
            return shape
        if weight.dtype not in DTYPES:
            raise InputError(f"{self.path}: {name} is stored as {weight.dtype}")
        if len(weight.shape) == 1:
            return Shape(FLOAT32, 1, weight.shape[0])
        rows, inputs = weight.shape
        if self.quant is None:
            return Shape(pack.KINDS[DTYPES[weight.dtype]], rows, inputs, bias=bias)
        bits, group = self._grid(name, inputs)
        return Shape(pack.kind_of(bits), rows, inputs, group, bias)

    def _grid(self, name: str, inputs: int) -> tuple[int, int | None]:
        bits, group = QUANT[self.quant or "int8"]
        if name.endswith(("embed_tokens", "lm_head")):
            return 8, None
        if group is not None and inputs % group:
            return bits, 32 if inputs % 32 == 0 else None
        return bits, group

    def _integers(self, name: str, packed: TensorHeader, *, bias: bool) -> Shape:
        scale = self.tensors.get(f"{name}.weight_scale")
        size = self.read(self.tensors.get(f"{name}.weight_shape"))
        if scale is None or size is None:
            raise InputError(f"{self.path}: {name} lacks its scale or shape")
        rows, inputs = (int(n) for n in size)
        groups = scale.shape[1] if len(scale.shape) > 1 else 1
        kept = packed.name.endswith("_kept")
        bits = self.headers.bits_of(packed.name) if kept else self._bits(packed, inputs)
        zero = f"{name}.weight_zero_point" in self.tensors
        group = inputs // groups if groups > 1 else None
        shape = Shape(pack.kind_of(bits, zero=zero), rows, inputs, group, bias)
        if not shape.readable or bits not in (2, 3, 4, 8):
            raise InputError(
                f"{self.path}: {name} has {groups} groups of {inputs} inputs in {bits} bits",
                hint="8, 4, 3 or 2 bits are read, in groups of 32, 64, 128 or whole rows",
            )
        return shape

    def plain_integers(self, name: str) -> bool:
        """Tell whether a matrix is stored as int8 values and their scale."""
        weight = self.tensors.get(f"{name}.weight")
        return (
            weight is not None and weight.dtype == "I8" and f"{name}.weight_scale" in self.tensors
        )

    def _bits(self, packed: TensorHeader, inputs: int) -> int:
        """Return the bits of a packed value: what the config says, where that is possible."""
        words = packed.shape[1]
        found = [b for b in range(1, 9) if -(-inputs * b // 32) == words]
        said = self.headers.bits_of(packed.name)
        if not found:
            raise InputError(f"{self.path}: {packed.name} is not as wide as its layer")
        return said if said in found else found[-1]

    def read_again(self, header: TensorHeader, low: int = 0, count: int | None = None) -> Tensor:
        """Read `count` rows from `low` on, into memory that this thread's next call uses again."""
        whole = header.shape[0] if header.shape else 1
        rows = whole - low if count is None else count
        size = header.bytes // max(whole, 1)
        if getattr(self.local, "scratch", np.empty(0)).nbytes < rows * size:
            self.local.scratch = np.empty(rows * size, np.uint8)
        raw = self.local.scratch[: rows * size]
        self.pread(header, raw, low * size)
        dtype = torch.int32 if header.dtype == "I32" else DTYPES[header.dtype]
        found = torch.from_numpy(raw).view(dtype)
        return found.reshape(rows, *header.shape[1:]) if header.shape else found.reshape(())

    def pread(self, header: TensorHeader, out: np.ndarray, first: int = 0) -> None:
        """Read bytes of a tensor from its byte `first` on into `out` (uint8, contiguous)."""
        view = out.reshape(-1).view(np.uint8).data
        at, handle = header.start + first, self.handles[header.file]
        while view:
            count = os.preadv(handle, [view], at)
            if count == 0:
                raise InputError(f"{header.file} has become shorter while it was read")
            view, at = view[count:], at + count

    def read(self, header: TensorHeader | None) -> Tensor | None:
        """Return a tensor as it is stored; None for none."""
        if header is None:
            return None
        raw = np.empty(header.bytes, np.uint8)
        self.pread(header, raw)
        dtypes = {**DTYPES, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
        if header.dtype not in dtypes:
            raise InputError(f"{self.path}: {header.name} is stored as {header.dtype}")
        return torch.from_numpy(raw).view(dtypes[header.dtype]).reshape(header.shape)

    def packed(self, name: str) -> Packed:
        """Return a matrix that `shape` knows. Raises InputError if a weight is not finite."""
        bias = self.read(self.tensors.get(f"{name}.bias"))
        packed = self.tensors.get(f"{name}.weight_packed")
        if packed is not None:
            return self._unpacked(name, packed, bias)
        if f"{name}.weight_kept" in self.tensors:
            return self._of_kept(name, bias)
        if self.plain_integers(name):
            values = self.read(self.tensors[f"{name}.weight"])
            shape = self.shape(name)
            assert values is not None and shape is not None  # they are in the headers
            return Packed(shape, pack.bytes_of(values, 8), self.scales(name), pack.floats(bias))
        header = self.tensors[f"{name}.weight"]
        if len(header.shape) == 1:
            weight = self.read(header)
            assert weight is not None  # it is in the headers
            self.require_finite(name, weight)
            return pack.pack_floats(weight.float()[None])
        shape = self.shape(name)
        assert shape is not None  # the caller has it
        data = np.empty((shape.rows, shape.row_bytes), np.uint8)
        scales = np.empty((shape.rows, shape.groups), np.float32) if shape.groups else None
        self._convert(name, header, 0, shape, data, scales)
        return Packed(shape, data, scales, pack.floats(bias))

    def _convert(
        self,
        name: str,
        header: TensorHeader,
        low: int,
        shape: Shape,
        data: np.ndarray,
        scales: np.ndarray | None,
    ) -> None:
        """Read rows of floats from `low` on and put them, packed, into `data` [rows, row_bytes].

        A part at a time, so that this takes little memory. Raises InputError for NaN or infinity.
        """
        step = max(1, PART // max(shape.inputs, 1))
        for at in range(0, shape.rows, step):
            end = min(at + step, shape.rows)
            part = self.read_again(header, low + at, end - at)
            self.require_finite(name, part, low + at)
            if self.quant is None:
                packed = pack.pack_floats(part)
            else:
                bits, group = self._grid(name, shape.inputs)
                values, scale = quantize(part, bits, group)
                found = pack.pack_integers(values, scale, bits)
                assert found is not None  # `_grid` chooses groups that can be read
                packed = found
            data[at:end] = packed.data
            if scales is not None:
                scales[at:end] = packed.scales

    def _unpacked(self, name: str, packed: TensorHeader, bias: Tensor | None) -> Packed:
        shape = self.shape(name)
        assert shape is not None  # the caller has it
        words = self.scales(name)
        bits = self._bits(packed, shape.inputs)
        data = np.empty((shape.rows, shape.row_bytes), np.uint8)
        step = max(1, PART // max(shape.inputs, 1))
        for low in range(0, shape.rows, step):
            values = self._values(packed, shape.inputs, low, min(step, shape.rows - low))
            data[low : low + step] = pack.bytes_of(values, bits)
        return Packed(shape, data, words, pack.floats(bias))

    def _of_kept(self, name: str, bias: Tensor | None) -> Packed:
        """Return a matrix of which two of four values are stored, with the zeros."""
        shape = self.shape(name)
        kept, places = (
            self.read(self.tensors.get(f"{name}.weight_{s}")) for s in ("kept", "places")
        )
        if shape is None or kept is None or places is None:
            raise InputError(f"{self.path}: {name} lacks its places")
        words = self.scales(name)
        bits = self.headers.bits_of(f"{name}.weight_kept")
        _, zero = pack.scales_and_zeros(words, shape.kind)
        middle = None if zero is None else torch.from_numpy(np.ascontiguousarray(zero))
        try:
            values = two_of_four.unpack(kept, places, middle, bits, shape.inputs)
        except ValueError as exc:
            raise InputError(f"{self.path}: {name}: {exc}") from None
        return Packed(shape, pack.bytes_of(values, bits), words, pack.floats(bias))

    def integers_into(self, name: str, shape: Shape, place: np.ndarray) -> bool:
        """Read packed integers to their place in a slab, if they are stored row by row unpadded.

        compressed-tensors stores them with 2^(bits-1) added; int4 in another order.
        """
        header = self.tensors.get(f"{name}.weight_packed")
        if self.plain_integers(name):
            header = self.tensors[f"{name}.weight"]
        if header is None or shape.width != shape.inputs or header.bytes != len(place):
            return False
        if shape.kind in EIGHTS:
            self.pread(header, place)
            if header.dtype != "I8":
                np.bitwise_xor(place, 128, out=place)
            return True
        from bmkit.runtime.cpu import block

        raw = self.read_again(replace(header, dtype="U8", shape=(header.bytes,)))
        block.regroup(raw.numpy(), place)
        return True

    def scales(self, name: str) -> np.ndarray:
        """Return the scales of packed integers as a slab holds them: float32 [rows, groups]."""
        scale = self.read(self.tensors[f"{name}.weight_scale"])
        assert scale is not None  # it is in the headers
        self.require_finite(f"{name}.weight_scale", scale)
        rows = self.tensors.get(f"{name}.weight")
        if scale.numel() == 1 and rows is not None:  # one for all
            scale = scale.reshape(1, 1).expand(rows.shape[0], 1)
        scale = scale.reshape(len(scale), -1)
        zero = self.read(self.tensors.get(f"{name}.weight_zero_point"))
        if zero is not None:
            from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

            shape = self.shape(name)
            assert shape is not None  # the caller has it
            packed = self.tensors.get(f"{name}.weight_packed")
            bits = self.headers.bits_of(f"{name}.weight_kept")
            if packed is not None:
                bits = self._bits(packed, shape.inputs)
            words = -(-shape.rows * bits // 32)
            if zero.dtype != torch.int32 or zero.shape != (words, scale.shape[1]):
                raise InputError(f"{self.path}: {name} has zero-points of another shape")
            flat = zero.T.reshape(-1).view(scale.shape[1], words)  # strides that it can view
            zero = unpack_from_int32(flat, bits, torch.Size([scale.shape[1], shape.rows]))
            return pack.scale_words(scale, zero.T, bits)
        return pack.scale_words(scale, None, 8)

    def require_finite(self, name: str, values: Tensor, low: int = 0) -> None:
        """Look at the values of `name` from row `low` on, the first time.

        Raises InputError for NaN or infinity.
        """
        known = f"{name} {low}" if low else name
        if known not in self.checked:
            flat = values.reshape(-1)
            for at in range(0, len(flat), 2**20):  # truth values take memory too
                if not flat[at : at + 2**20].isfinite().all():
                    raise InputError(f"{self.path}: {name} holds NaN or infinite weights")
        self.checked.add(known)

    def write(self, name: str, layout: Layout, row: int, slab: np.ndarray) -> None:
        """Put matrix `name` into `slab`: straight from the file where it is stored as it is used.

        The first time it goes the long way, which looks for weights that are not finite.
        """
        shape = layout.shapes[row]
        weight = self.tensors.get(f"{name}.weight")
        if shape is not None and self.integers_into(name, shape, layout.part(slab, row, 0)):
            scales = self.scales(name).reshape(-1)
            layout.part(slab, row, 1)[:] = scales.view(np.uint8)
            self._write_bias(name, shape, layout, row, slab)
            return
        straight = (
            shape is not None
            and weight is not None
            and name in self.checked
            and shape.width == shape.inputs
            and DTYPES.get(weight.dtype)
            == {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16}.get(shape.kind)
        )
        if shape is None or weight is None or len(weight.shape) < 2 or weight.dtype == "I8":
            super().write(name, layout, row, slab)
            return
        if not straight:
            self._write_floats(name, weight, 0, layout, row, slab)
            return
        self.pread(weight, layout.part(slab, row, 0))
        self._write_bias(name, shape, layout, row, slab)

    def _write_bias(
        self,
        name: str,
        shape: Shape,
        layout: Layout,
        row: int,
        slab: np.ndarray,
        low: int = 0,
    ) -> None:
        if shape.bias:
            bias = self.read(self.tensors[f"{name}.bias"])
            assert bias is not None  # it is in the headers
            part = bias[low : low + shape.rows].float().contiguous()
            layout.part(slab, row, 2)[:] = part.numpy().view(np.uint8)

    def window(self, found: Sequence[tuple[str, Shape]]) -> tuple[Window, list[int]] | None:
        """Return a window on matrices that can be computed with as they are stored.

        Beside it, where in it each begins. None if one is stored otherwise, has a bias, or they
        don't lie together in one file.
        """
        headers = []
        for name, shape in found:
            header = self.tensors.get(f"{name}.weight")
            kind = {"F32": FLOAT32, "BF16": BFLOAT16}.get(header.dtype) if header else None
            if header is None or kind != shape.kind or shape.bias or shape.width != shape.inputs:
                return None
            headers.append(header)
        window = self.span(headers)
        if window is None:
            return None
        return window, [h.start - window.start for h in headers]

    def span(self, headers: Sequence[TensorHeader]) -> Window | None:
        """Return a window on tensors of floats that lie together in one file; None if they don't.

        Their values are looked at when they are there for the first time.
        """
        start = min((h.start for h in headers), default=0)
        size = max((h.start + h.bytes for h in headers), default=0) - start
        if len({h.file for h in headers}) != 1 or size > 1.1 * sum(h.bytes for h in headers):
            return None

        def look(array: np.ndarray) -> None:
            for header in headers:
                raw = array[header.start - start : header.start - start + header.bytes]
                values = torch.from_numpy(raw).view(DTYPES[header.dtype])
                self.require_finite(header.name, values)

        return Window(self._mapped(headers[0].file), start, size, look)

    def row_window(self, name: str, shape: Shape, low: int) -> Window | None:
        """Return a window on as many rows of a matrix, from `low` on, as `shape` has."""
        header = self.tensors.get(f"{name}.weight")
        whole = None if header is None else replace(shape, rows=header.shape[0])
        if header is None or whole is None or self.window([(name, whole)]) is None:
            return None

        def look(array: np.ndarray) -> None:
            self.require_finite(name, torch.from_numpy(array).view(DTYPES[header.dtype]), low)

        start, size = header.start + low * shape.row_bytes, shape.rows * shape.row_bytes
        return Window(self._mapped(header.file), start, size, look)

    def _mapped(self, file: Path) -> MappedFile:
        if file not in self.maps:
            self.maps[file] = MappedFile(file)
        return self.maps[file]

    def write_rows(self, name: str, low: int, layout: Layout, slab: np.ndarray) -> None:
        """Put some rows of `name` into `slab`, reading only those."""
        shape, weight = layout.shapes[0], self.tensors.get(f"{name}.weight")
        packed = self.tensors.get(f"{name}.weight_packed")
        if shape is not None and packed is not None:
            values = self._values(packed, shape.inputs, low, shape.rows)
            bits = self._bits(packed, shape.inputs)
            words = self.scales(name)[low : low + shape.rows]
            layout.write(slab, 0, Packed(shape, pack.bytes_of(values, bits), words))
            self._write_bias(name, shape, layout, 0, slab, low)
            return
        if shape is None or weight is None or weight.dtype not in DTYPES:
            super().write_rows(name, low, layout, slab)
            return
        self._write_floats(name, weight, low, layout, 0, slab)

    def _write_floats(
        self,
        name: str,
        weight: TensorHeader,
        low: int,
        layout: Layout,
        row: int,
        slab: np.ndarray,
    ) -> None:
        """Put rows of a matrix of floats from `low` on into `slab`, at `row` of the layout."""
        shape = layout.shapes[row]
        assert shape is not None  # the caller has looked
        data = layout.part(slab, row, 0).reshape(shape.rows, shape.row_bytes)
        scales = None
        if shape.groups:
            scales = layout.part(slab, row, 1).view(np.float32).reshape(shape.rows, -1)
        self._convert(name, weight, low, shape, data, scales)
        self._write_bias(name, shape, layout, row, slab, low)

    def some(self, name: str, weight: TensorHeader, low: int, count: int) -> Tensor:
        """Return `count` rows of a matrix from `low` on. Raises InputError for NaN or infinity."""
        rows, inputs = weight.shape
        size = weight.bytes // rows
        raw = np.empty(count * size, np.uint8)
        self.pread(weight, raw, low * size)
        part = torch.from_numpy(raw).view(DTYPES[weight.dtype]).reshape(count, inputs)
        step = max(1, PART // max(inputs, 1))
        for at in range(0, count, step):  # truth values take memory too
            if not part[at : at + step].isfinite().all():
                raise InputError(f"{self.path}: {name} holds NaN or infinite weights")
        return part

    def _values(self, packed: TensorHeader, inputs: int, low: int, count: int) -> Tensor:
        """Return `count` rows of packed integers from `low` on: int8 [count, inputs]."""
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        raw = self.read_again(packed, low, count)
        found: Tensor = unpack_from_int32(
            raw, self._bits(packed, inputs), torch.Size([count, inputs])
        )
        return found.to(torch.int8)

    def _packed_rows(self, name: str, ids: Sequence[int]) -> np.ndarray:
        """Return rows of an embedding that is stored as packed integers."""
        packed = self.tensors[f"{name}.weight_packed"]
        shape = self.shape(name)
        assert shape is not None  # it is packed
        if f"{name}.weight_zero_point" in self.tensors:
            return super().rows(name, ids)
        scale = self.tensors[f"{name}.weight_scale"]
        found = np.empty((len(ids), shape.inputs), np.float32)
        for row, token in zip(found, ids, strict=True):
            values = self._values(packed, shape.inputs, token, 1)
            row[:] = dequantize(values, self.read_again(scale, token, 1).reshape(1, -1))[0]
        return found

    def rows(self, name: str, ids: Sequence[int]) -> np.ndarray:
        """Return rows of an embedding, reading only those: float32 [ids, inputs]."""
        weight = self.tensors.get(f"{name}.weight")
        if weight is None:
            return self._packed_rows(name, ids)
        parts = torch.cat([self.some(name, weight, token, 1) for token in ids]).float()
        if self.quant is not None:
            values, scale = quantize(parts, 8, None)
            parts = values.float() * scale
        found: np.ndarray = parts.numpy()
        return found
