"""Matrices as the kernels read them: packed rows in one aligned slab of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bmkit.runtime.cpu.dots import BFLOAT16, FLOAT32, INT4, INT8

ALIGN = 64
PAD = 32
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT32}


@dataclass(frozen=True)
class Packed:
    """One matrix [rows, inputs], its inputs padded with zeros to a multiple of 32."""

    kind: int
    inputs: int
    data: np.ndarray  # uint8 [rows, bytes of a row]
    scales: np.ndarray | None = None  # float32 [rows, groups]
    group: int = PAD
    bias: np.ndarray | None = None  # float32 [rows]

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self.data)

    @property
    def width(self) -> int:
        """Return the inputs, padded."""
        return round_up(self.inputs)

    @property
    def parts(self) -> list[np.ndarray]:
        """Return the arrays to be placed: data, scales, bias, as far as they are there."""
        return [part for part in (self.data, self.scales, self.bias) if part is not None]


def round_up(count: int, step: int = PAD) -> int:
    """Return the next multiple of `step`."""
    return -(-count // step) * step


def pack_floats(weight: Tensor, bias: Tensor | None = None) -> Packed:
    """Pack `weight` [out, in] in the dtype that it has, float32 or bfloat16; float16 is widened."""
    out, inputs = weight.shape
    if weight.dtype == torch.float16:
        weight = weight.float()
    padded = weight.contiguous()
    if inputs % PAD:
        padded = weight.new_zeros(out, round_up(inputs))
        padded[:, :inputs] = weight
    data = padded.view(torch.uint8).numpy()
    return Packed(KINDS[weight.dtype], inputs, data, bias=_floats(bias))


def pack_integers(
    values: Tensor, scale: Tensor, bits: int, bias: Tensor | None = None
) -> Packed | None:
    """Pack symmetric integers `values` [out, in] (int8) with `scale` [out, groups].

    Returns None where the groups are no multiples of 32 inputs: nothing here reads those.
    """
    out, inputs = values.shape
    groups = scale.shape[1]
    group = inputs // groups if groups > 1 else round_up(inputs)
    if group % PAD or bits not in (4, 8):
        return None
    padded = torch.zeros(out, round_up(inputs), dtype=torch.int8)
    padded[:, :inputs] = values
    if bits == 4:
        halves = (padded + 8).view(torch.uint8).reshape(out, -1, 2, PAD // 2)
        padded = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(out, -1)
    scales = scale.float().contiguous().numpy()
    data = padded.contiguous().view(torch.uint8).numpy()
    return Packed(INT8 if bits == 8 else INT4, inputs, data, scales, group, _floats(bias))


def _floats(bias: Tensor | None) -> np.ndarray | None:
    return None if bias is None else bias.detach().float().contiguous().numpy()


@dataclass
class Slab:
    """Matrices laid out one after the other, and the table that says where each lies."""

    table: np.ndarray  # int64 [matrices, MATRIX_NUMBERS]
    bytes: int
    parts: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def fill(self) -> np.ndarray:
        """Allocate the slab, copy the matrices in, and let go of them."""
        whole = np.empty(self.bytes + ALIGN, np.uint8)
        start = -whole.ctypes.data % ALIGN
        slab: np.ndarray = whole[start : start + self.bytes]
        slab[:] = 0
        for at, part in self.parts:
            flat = part.reshape(-1).view(np.uint8)
            slab[at : at + flat.size] = flat
        self.parts = []
        return slab


def lay_out(matrices: Sequence[Packed | None]) -> Slab:
    """Plan a slab of `matrices`; one that is None gets the kind -1."""
    slab = Slab(np.full((len(matrices), 9), -1, np.int64), 0)
    for row, matrix in zip(slab.table, matrices, strict=True):
        if matrix is None:
            continue
        places = []
        for part in matrix.parts:
            places.append(slab.bytes)
            slab.parts.append((slab.bytes, part))
            slab.bytes = round_up(slab.bytes + part.nbytes, ALIGN)
        scales = 4 * matrix.scales.shape[1] if matrix.scales is not None else 0
        bias = places[-1] if matrix.bias is not None else -1
        row[:] = (
            matrix.kind,
            places[0],
            places[1] if scales else 0,
            bias,
            matrix.rows,
            matrix.width,
            matrix.group,
            matrix.data.shape[1],
            scales,
        )
    return slab
