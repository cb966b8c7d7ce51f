"""A unit: the tensors that come and go together, most often one block, in one slab of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from bmkit.plan import TensorHeader
from bmkit.runtime.cpu.pack import ALIGN, Layout, lay_out, round_up
from bmkit.runtime.cpu.source import Files
from bmkit.runtime.cpu.window import Window
from bmkit.runtime.placed.matrix import Matrix


@dataclass
class Packed:
    """A matrix of a unit: where it is in the slab, and how its bytes get there."""

    matrix: Matrix
    write: Callable[[Layout, int, np.ndarray], None]
    header: TensorHeader | None = None
    """The tensor of a file that holds the same bytes, if one does."""
    bias: Callable[[], Tensor] | None = None


@dataclass
class Dense:
    """A tensor of a unit in the compute dtype: every place in the model that holds it."""

    shape: torch.Size
    dtype: torch.dtype
    write: Callable[[np.ndarray], None]
    parameters: list[nn.Parameter] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Return its size."""
        return self.shape.numel() * self.dtype.itemsize


class Unit:
    """Matrices and tensors that share a slab."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.packed: list[Packed] = []
        self.dense: list[Dense] = []
        self.places: list[int] = []
        self.layout: Layout = lay_out([])
        self.matrix: Matrix | None = None
        """The one matrix of a head or an embedding."""
        self.bytes = 0
        self._views: dict[int, list[Tensor]] = {}
        self.mapped: list[tuple[Matrix, int]] = []  # in a window instead of the slab, and where

    def close(self) -> None:
        """Give every tensor its place; nothing is added after this."""
        self.layout = lay_out([p.matrix.shape for p in self.packed])
        for packed, m in zip(self.packed, self.layout.table, strict=True):
            packed.matrix.m = m
        end = self.layout.bytes
        for tensor in self.dense:
            self.places.append(end)
            end = round_up(end + tensor.bytes, ALIGN)
        self.bytes = end

    def window(self, files: Files) -> Window | None:
        """Return a window on what of this unit can be computed with where it is stored, or None.

        Everything else gets memory of its own, and stays.
        """
        chosen = [p for p in self.packed if p.header is not None]
        headers = [p.header for p in chosen if p.header is not None]
        size = sum(h.bytes for h in headers)
        found = files.span(headers) if 5 * size > 4 * self.bytes else None
        if found is None:
            return None
        self.packed = [p for p in self.packed if p.header is None]
        self.places.clear()
        self.close()
        slab = torch.zeros(self.bytes, dtype=torch.uint8)
        self.load(slab.numpy())
        self.bind(slab)
        self.bytes = found.size
        for packed, header in zip(chosen, headers, strict=True):
            matrix = packed.matrix
            matrix.m = matrix.m.copy()
            place = header.start - found.start
            if packed.bias is not None:
                matrix.apart_bias = packed.bias().to(matrix.dtype)
                matrix.m[1 + 2] = -1
            matrix.m[1] = place
            self.mapped.append((matrix, place))
        return found

    def load(self, slab: np.ndarray) -> None:
        """Fill a slab from the checkpoint's files."""
        for row, packed in enumerate(self.packed):
            packed.write(self.layout, row, slab)
        for place, tensor in zip(self.places, self.dense, strict=True):
            tensor.write(slab[place : place + tensor.bytes])

    def bind(self, slab: Tensor) -> None:
        """Let the model's modules read from `slab`, uint8 [bytes] on the device."""
        if self.mapped:
            for matrix, _ in self.mapped:
                matrix.bind(slab)
            return
        for packed in self.packed:
            packed.matrix.bind(slab)
        views = self._views.get(slab.data_ptr())
        if views is None:
            views = self._views[slab.data_ptr()] = [
                slab[p : p + t.bytes].view(t.dtype).view(t.shape)
                for p, t in zip(self.places, self.dense, strict=True)
            ]
        for tensor, view in zip(self.dense, views, strict=True):
            for parameter in tensor.parameters:
                parameter.data = view

    def release(self) -> None:
        """Take the weights away: what reads them now gets NaN, or an assertion."""
        if self.mapped:
            for matrix, _ in self.mapped:
                matrix.bind(None)
            return
        for packed in self.packed:
            packed.matrix.bind(None)
        for tensor in self.dense:
            for parameter in tensor.parameters:
                parameter.data = nothing(tensor.shape, tensor.dtype, self.device)


def nothing(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of a shape that takes no memory, all NaN."""
    value = torch.nan if dtype.is_floating_point else 0
    return torch.full((1,), value, dtype=dtype, device=device).expand(shape)


@dataclass
class Used:
    """A unit that is streamed: `use` holds its weights in place."""

    unit: Unit
    hold: Callable[[], AbstractContextManager[Tensor]]

    @contextmanager
    def use(self) -> Iterator[None]:
        """Bind the unit for a while."""
        with self.hold() as slab:
            self.unit.bind(slab)
            try:
                yield
            finally:
                self.unit.release()
