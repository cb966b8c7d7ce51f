"""Matrices as the kernels read them: packed rows in one aligned slab of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bmkit.runtime.cpu.dots import BFLOAT16, FLOAT32, INT4, INT8

ALIGN = 64
PAD = 32
FLOAT16 = 4
"""A kind that the CPU's kernels don't know; GPUs compute in it."""
KINDS = {
    torch.float64: FLOAT32,
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT32,
}
BITS = {FLOAT32: 32, BFLOAT16: 16, FLOAT16: 16, INT8: 8, INT4: 4}


def round_up(count: int, step: int = PAD) -> int:
    """Return the next multiple of `step`."""
    return -(-count // step) * step


@dataclass(frozen=True)
class Shape:
    """What must be known of a matrix [rows, inputs] to find a place for it."""

    kind: int
    rows: int
    inputs: int
    group: int | None = None
    """Inputs that share a scale; None: all of a row."""
    bias: bool = False

    @property
    def width(self) -> int:
        """Return the inputs, padded to a multiple of 32."""
        return round_up(self.inputs)

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row's weights."""
        return self.width * BITS[self.kind] // 8

    @property
    def groups(self) -> int:
        """Return the scales of a row, 0 for floats."""
        if self.kind not in {INT8, INT4}:
            return 0
        return 1 if self.group is None else self.inputs // self.group

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return the bytes of weights, scales and bias."""
        return (
            self.rows * self.row_bytes,
            4 * self.rows * self.groups,
            4 * self.rows if self.bias else 0,
        )

    @property
    def readable(self) -> bool:
        """Tell whether the kernels can read groups of this size."""
        return self.group is None or (self.group % PAD == 0 and self.inputs % self.group == 0)


@dataclass(frozen=True)
class Packed:
    """A matrix as it goes into a slab."""

    shape: Shape
    data: np.ndarray  # uint8 [rows, row_bytes]
    scales: np.ndarray | None = None  # float32 [rows, groups]
    bias: np.ndarray | None = None  # float32 [rows]


def pack_floats(weight: Tensor, bias: Tensor | None = None) -> Packed:
    """Pack `weight` [out, in] as it is, if it is float32 or bfloat16, else as float32."""
    out, inputs = weight.shape
    if weight.dtype in {torch.float16, torch.float64}:
        weight = weight.float()
    padded = weight.contiguous()
    if inputs % PAD:
        padded = weight.new_zeros(out, round_up(inputs))
        padded[:, :inputs] = weight
    shape = Shape(KINDS[weight.dtype], out, inputs, bias=bias is not None)
    return Packed(shape, padded.view(torch.uint8).numpy(), bias=floats(bias))


def pack_integers(
    values: Tensor, scale: Tensor, bits: int, bias: Tensor | None = None
) -> Packed | None:
    """Pack symmetric integers `values` [out, in] (int8) with `scale` [out, groups].

    Returns None where the groups are no multiples of 32 inputs: nothing here reads those.
    """
    out, inputs = values.shape
    groups = scale.shape[1]
    group = inputs // groups if groups > 1 else None
    shape = Shape(INT8 if bits == 8 else INT4, out, inputs, group, bias is not None)
    if not shape.readable or bits not in (4, 8):
        return None
    padded = values
    if inputs % PAD:
        padded = torch.zeros(out, round_up(inputs), dtype=torch.int8)
        padded[:, :inputs] = values
    if bits == 4:
        halves = (padded + 8).view(torch.uint8).reshape(out, -1, 2, PAD // 2)
        padded = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(out, -1)
    data = padded.contiguous().view(torch.uint8).numpy()
    return Packed(shape, data, scale.float().contiguous().numpy(), floats(bias))


def floats(bias: Tensor | None) -> np.ndarray | None:
    """Return float32 values, or None for none."""
    return None if bias is None else bias.detach().float().contiguous().numpy()


def integers(matrix: Packed) -> np.ndarray:
    """Return the values int8 [rows, inputs] of a matrix of integers."""
    shape = matrix.shape
    if shape.kind == INT8:
        return matrix.data.view(np.int8)[:, : shape.inputs]
    halves = matrix.data.reshape(shape.rows, -1, 1, PAD // 2)
    both = np.concatenate((halves & 15, halves >> 4), 2).reshape(shape.rows, -1)
    found: np.ndarray = both[:, : shape.inputs].astype(np.int8) - np.int8(8)
    return found


@dataclass(frozen=True)
class Layout:
    """Where in a slab each of several matrices lies."""

    shapes: tuple[Shape | None, ...]
    table: np.ndarray  # int64 [matrices, MATRIX_NUMBERS]; kind -1 where there is none
    bytes: int

    @property
    def rows(self) -> int:
        """Return the rows of the first matrix."""
        return int(self.table[0, 4])

    def part(self, slab: np.ndarray, row: int, which: int) -> np.ndarray:
        """Return the bytes of a matrix's weights (0), scales (1) or bias (2) in `slab`."""
        shape = self.shapes[row]
        assert shape is not None  # nobody writes what isn't there
        start = int(self.table[row, 1 + which])
        view: np.ndarray = slab[start : start + shape.sizes[which]]
        return view

    def write(self, slab: np.ndarray, row: int, matrix: Packed) -> None:
        """Copy a matrix to its place."""
        for which, part in enumerate((matrix.data, matrix.scales, matrix.bias)):
            if part is not None:
                self.part(slab, row, which)[:] = part.reshape(-1).view(np.uint8)


def lay_out(shapes: Sequence[Shape | None]) -> Layout:
    """Plan a slab of matrices one after the other, each part on a multiple of 64 bytes."""
    table = np.full((len(shapes), 9), -1, np.int64)
    end = 0
    for row, shape in zip(table, shapes, strict=True):
        if shape is None:
            continue
        places = []
        for size in shape.sizes:
            places.append(end)
            end = round_up(end + size, ALIGN)
        row[:] = (
            shape.kind,
            places[0],
            places[1],
            places[2] if shape.bias else -1,
            shape.rows,
            shape.width,
            shape.width if shape.group is None else shape.group,
            shape.row_bytes,
            4 * shape.groups,
        )
    return Layout(tuple(shapes), table, end)


def empty_slab(size: int) -> np.ndarray:
    """Return `size` bytes that begin on a multiple of 64."""
    whole = np.empty(size + ALIGN, np.uint8)
    start = -whole.ctypes.data % ALIGN
    slab: np.ndarray = whole[start : start + size]
    return slab
