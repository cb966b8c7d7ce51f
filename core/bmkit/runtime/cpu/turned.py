"""A matrix that lies in a slab input by input: what one neuron gives to all outputs is together.

So a few of a feed-forward's neurons are read without the rest of each row. Groups share scales as
before: each group of inputs has one for every output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from bmkit.runtime.cpu.dots import (
    BFLOAT16,
    BITS,
    EIGHTS,
    FLOAT32,
    FOURS,
    INT4_ZERO,
    KINDS,
    WITH_ZERO,
)
from bmkit.runtime.cpu.pack import (
    Layout,
    Packed,
    Shape,
    empty_slab,
    integers,
    lay_out,
    round_up,
)
from bmkit.runtime.cpu.source import Source

PART = 2**20
"""Weights that are turned at a time."""
M_GROUP, M_SCALE_BYTES = 6, 8


@dataclass(frozen=True)
class Turned(Shape):
    """The shape of such a matrix: still `rows` outputs of `inputs`, as it was."""

    @property
    def width(self) -> int:
        """Return the outputs, padded to a multiple of 32."""
        return round_up(self.rows)

    @property
    def row_bytes(self) -> int:
        """Return the bytes of an input's weights."""
        return self.width * BITS[self.kind] // 8

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return the bytes of weights, scales and bias."""
        return (
            self.inputs * self.row_bytes,
            4 * self.groups * self.width,
            4 * self.rows if self.bias else 0,
        )


def turned(shape: Shape) -> Shape:
    """Return how a matrix of this shape lies turned; as it is if no kernel reads that."""
    if type(shape) is not Shape or shape.kind not in KINDS:
        return shape
    return Turned(**{f.name: getattr(shape, f.name) for f in fields(shape)})


def lay_out_turned(shapes: Sequence[Shape | None]) -> Layout:
    """Do as `lay_out` does; of a turned matrix the numbers say what leads to the next input.

    These are the bytes of a row, as ever; the bytes from a group's scales to the next one's, and
    how many inputs a group has.
    """
    layout = lay_out(shapes)
    for shape, row in zip(shapes, layout.table, strict=True):
        if isinstance(shape, Turned):
            row[M_GROUP] = shape.group or shape.inputs
            row[M_SCALE_BYTES] = 4 * shape.width
    return layout


def load_turned(source: Source, name: str, layout: Layout, row: int, slab: np.ndarray) -> None:
    """Put matrix `name` of a source, turned, to its place at `row` of the layout.

    Peak memory: the matrix once more, as it is stored.
    """
    shape = source.shape(name)
    assert shape is not None  # the layout has it from there
    plain = lay_out([shape])
    some = empty_slab(plain.bytes)
    source.write(name, plain, 0, some)
    data, scales, bias = (plain.part(some, 0, which) for which in range(3))
    matrix = Packed(
        shape,
        data.reshape(shape.rows, shape.row_bytes),
        scales.view(np.float32).reshape(shape.rows, -1) if shape.groups else None,
        bias.view(np.float32) if shape.bias else None,
    )
    _turn(layout, row, slab, matrix)


def _turn(layout: Layout, row: int, slab: np.ndarray, matrix: Packed) -> None:
    shape = layout.shapes[row]
    assert isinstance(shape, Turned)  # the caller has looked
    place = torch.from_numpy(layout.part(slab, row, 0)).view(shape.inputs, shape.row_bytes)
    step = max(PART // shape.inputs // 32, 1) * 32
    for low in range(0, shape.rows, step):
        high = min(low + step, shape.rows)
        some = Shape(shape.kind, high - low, shape.inputs)
        part = Packed(some, matrix.data[low:high])
        if shape.kind in FOURS:
            place[:, low // 2 : round_up(high) // 2] = _nibbles(torch.from_numpy(integers(part)))
            continue
        dtype = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16}.get(shape.kind, torch.int8)
        values = torch.from_numpy(part.data).view(dtype)[:, : shape.inputs]
        place.view(dtype)[:, low:high] = values.T
        if high == shape.rows:
            place.view(dtype)[:, high:] = 0
    if matrix.scales is not None:
        scales = layout.part(slab, row, 1).view(np.float32).reshape(shape.groups, shape.width)
        scales[:, : shape.rows] = matrix.scales.T
        scales[:, shape.rows :] = 0
    if matrix.bias is not None:
        layout.part(slab, row, 2)[:] = matrix.bias.view(np.uint8)


def _nibbles(values: Tensor) -> Tensor:
    """Pack int8 `values` [outputs, inputs] as uint8 [inputs, outputs / 2], rounded up to 32."""
    outputs, inputs = values.shape
    padded = torch.zeros(inputs, round_up(outputs), dtype=torch.int8)
    padded[:, :outputs] = values.T
    halves = (padded + 8).view(torch.uint8).reshape(inputs, -1, 2, 16)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(inputs, -1)


def unpack_turned(layout: Layout, row: int, slab: np.ndarray, out: Tensor) -> Tensor:
    """Unpack a turned matrix into `out`, float32 of as many elements; return it [rows, inputs]."""
    shape = layout.shapes[row]
    assert isinstance(shape, Turned)  # the caller has looked
    raw = torch.from_numpy(layout.part(slab, row, 0)).view(shape.inputs, shape.row_bytes)
    found = out.view(shape.inputs, shape.rows)
    if shape.kind == FLOAT32:
        return raw.view(torch.float32)[:, : shape.rows].T
    if shape.kind == BFLOAT16:
        return found.copy_(raw.view(torch.bfloat16)[:, : shape.rows]).T
    words = torch.from_numpy(layout.part(slab, row, 1).view(np.int32))
    words = words.view(shape.groups, 1, shape.width)[..., : shape.rows]
    groups = found.view(shape.groups, -1, shape.rows)
    zeros = None
    if shape.kind in WITH_ZERO:
        zeros = ((words << 24) >> 24).float() - (8 if shape.kind == INT4_ZERO else 0)
        words = words & -256
    scales = words.view(torch.float32)
    if shape.kind in EIGHTS:
        values = raw.view(torch.int8)[:, : shape.rows].reshape(groups.shape)
        torch.mul(values if zeros is None else values - zeros, scales, out=groups)
        return found.T
    step = max(PART // shape.width, 1)
    for low in range(0, shape.inputs, step):
        halves = raw[low : low + step].view(-1, shape.width // 32, 1, 16)
        both = torch.cat((halves & 15, halves >> 4), 2).view(-1, shape.width)
        found[low : low + step] = both[:, : shape.rows].view(torch.int8) - 8
    if zeros is not None:
        groups -= zeros
    return groups.mul_(scales).view(found.shape).T
