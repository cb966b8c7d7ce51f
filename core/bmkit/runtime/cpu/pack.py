"""Matrices as the kernels read them: packed rows in one aligned slab of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bmkit.runtime.cpu.dots import (
    BFLOAT16,
    BITS,
    EIGHTS,
    FLOAT32,
    FOURS,
    INT4,
    INT4_ZERO,
    INT8,
    INT8_ZERO,
    WITH_ZERO,
)

ALIGN = 64
PAD = 32
KINDS = {
    torch.float64: FLOAT32,
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT32,
}


def kind_of(bits: int, *, zero: bool = False) -> int:
    """Return how integers of `bits` bits are kept: those of 2 and 3 bits as nibbles."""
    if bits == 8:
        return INT8_ZERO if zero else INT8
    return INT4_ZERO if zero else INT4


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
        if self.kind not in EIGHTS + FOURS:
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
    values: Tensor,
    scale: Tensor,
    bits: int,
    bias: Tensor | None = None,
    *,
    zero: Tensor | None = None,
) -> Packed | None:
    """Pack integers `values` [out, in] (int8) with `scale` and `zero` (int8) [out, groups].

    Returns None where the groups are no multiples of 32 inputs: nothing here reads those.
    """
    out, inputs = values.shape
    groups = scale.shape[1]
    group = inputs // groups if groups > 1 else None
    shape = Shape(kind_of(bits, zero=zero is not None), out, inputs, group, bias is not None)
    if not shape.readable or bits not in (2, 3, 4, 8):
        return None
    return Packed(shape, bytes_of(values, bits), scale_words(scale, zero, bits), floats(bias))


def bytes_of(values: Tensor, bits: int) -> np.ndarray:
    """Return rows of integers (int8 [out, in]) as a slab holds them: uint8 [out, row bytes]."""
    out, inputs = values.shape
    padded = values
    if inputs % PAD:
        padded = torch.zeros(out, round_up(inputs), dtype=torch.int8)
        padded[:, :inputs] = values
    if bits != 8:
        halves = (padded + 8).view(torch.uint8).reshape(out, -1, 2, PAD // 2)
        padded = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(out, -1)
    found: np.ndarray = padded.contiguous().view(torch.uint8).numpy()
    return found


def scale_words(scale: Tensor, zero: Tensor | None, bits: int) -> np.ndarray:
    """Return what a slab holds of `scale` and `zero` [out, groups]: float32.

    A zero-point takes the lowest byte of its scale, whose last 8 bits are rounded off.
    """
    words: np.ndarray = scale.float().contiguous().numpy()
    if zero is None:
        return words
    bits_of = (words.view(np.uint32).astype(np.uint64) + 128) & 0xFFFFFF00
    middle = zero.to(torch.int32) + (0 if bits == 8 else 8)
    whole = bits_of.astype(np.uint32) | (middle.numpy().astype(np.uint32) & 255)
    found: np.ndarray = whole.view(np.float32)
    return found


def scales_and_zeros(words: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the scales of a slab's words, and the zero-points (int8) if its kind has them."""
    if kind not in WITH_ZERO:
        return words, None
    raw = np.ascontiguousarray(words).view(np.uint32)
    zeros = (raw & 255).astype(np.uint8).view(np.int8)
    return (raw & 0xFFFFFF00).view(np.float32), zeros - np.int8(8 if kind == INT4_ZERO else 0)


def floats(bias: Tensor | None) -> np.ndarray | None:
    """Return float32 values, or None for none."""
    return None if bias is None else bias.detach().float().contiguous().numpy()


def integers(matrix: Packed) -> np.ndarray:
    """Return the values int8 [rows, inputs] of a matrix of integers."""
    shape = matrix.shape
    if shape.kind in EIGHTS:
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
