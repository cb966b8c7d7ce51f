"""A placed model: transformers' own, whose blocks find their weights when they are called."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bmkit import model as models
from bmkit.errors import InputError, ResourceError, counted
from bmkit.nn.rounding import dequantize, quantize
from bmkit.runtime.budget import spread
from bmkit.runtime.cpu.dots import INT8
from bmkit.runtime.cpu.pack import Shape
from bmkit.runtime.placed.block import wrap
from bmkit.runtime.placed.link import CudaLink, Link
from bmkit.runtime.placed.load import Builder
from bmkit.runtime.placed.matrix import HeadParts, Matrix, PackedEmbedding, PackedLinear
from bmkit.runtime.placed.origin import Origin
from bmkit.runtime.placed.tiers import InMemory, OnDevice, Tiers
from bmkit.runtime.placed.unit import Packed, Unit, Used


@dataclass(frozen=True)
class Room:
    """Bytes that a model's weights may take; None: as many as it has."""

    device: int | None = None
    """On the device: all of the units that stay, and the slots of those that are streamed."""
    ram: int | None = None
    """In RAM beside a device: the units that wait there; those that don't fit stay on disk."""


@dataclass
class Placed:
    """A model and the tiers of its weights; `close` it when it isn't used any more."""

    model: Any
    units: list[Unit]
    tiers: Tiers
    resident: frozenset[int]
    streamed_bytes: int
    origin: Origin

    def close(self) -> None:
        """Stop reading, and close the files."""
        self.tiers.close()
        self.origin.files.close()


class RowsFromFiles(nn.Module):
    """Stands where an embedding's matrix would be; rows are read from the files when needed."""

    def __init__(self, origin: Origin, name: str, shape: Shape, matrix: Matrix) -> None:
        super().__init__()
        self.origin, self.name, self.shape = origin, name, shape
        self.slab: Tensor | None = None
        self.dtype, self.device = matrix.dtype, matrix.device

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows [..., inputs] of the embedding."""
        flat, inverse = torch.unique(ids.reshape(-1), return_inverse=True)
        found = self.origin.rows(self.name, flat.cpu())
        if self.shape.kind == INT8 and self.origin.packed_shape(self.name) is None:
            found = dequantize(*quantize(found, 8))  # as it would be in memory
        found = found.to(self.device, self.dtype)
        return found[inverse].reshape(*ids.shape, self.shape.inputs)


def place_model(
    path: Path,
    model: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quant: str | None = None,
    room: Room | None = None,
    link: Link | None = None,
    checkpoint: bool = False,
    w8a8: bool = False,
) -> Placed:
    """Give `model`, on the meta device, the checkpoint's weights, in at most `room`.

    What doesn't fit is streamed, spread over the model's depth. `link` is the way to the device, if
    that is not a plain CPU. With `checkpoint`, resident blocks too keep no activations for their
    gradients; with `w8a8`, int8 products take rounded inputs. Raises InputError for weights that
    are missing or can't be used, ResourceError with the smallest room that works.
    """
    origin = Origin(path, model, quant=quant)
    _drop_poolers(model, origin)
    _refuse_missing(path, origin)
    origin.require_shapes()
    builder = Builder(model, origin, device, dtype, quant)
    builder.build()
    room = room or Room()
    head = _Head(builder)
    units = [builder.rest, *builder.blocks.values()]
    for unit in units:
        unit.close()
    resident = head.settle(units, room.device)
    if link is None and device.type == "cuda":
        link = CudaLink(device)

    def load(i: int, slab: np.ndarray) -> None:
        units[i].load(slab)

    tiers: Tiers
    if link is None:
        windows = {i: units[i].window(origin.files) for i in range(len(units)) if i not in resident}
        mapped = {i: window for i, window in windows.items() if window is not None}
        tiers = InMemory(units, load, resident=resident, windows=mapped)
    else:
        tiers = OnDevice(
            link, units, load, resident=resident, in_ram=_in_ram(units, resident, room.ram)
        )
    for i, slab in tiers.resident().items():
        units[i].bind(slab)
    head.put(tiers, units, resident)
    for unit in units:
        for packed in unit.packed:
            packed.matrix.w8a8 = w8a8 and packed.matrix.shape.kind == INT8
    if next(model.parameters(), None) is None:  # then transformers doesn't know its device
        model.placed = nn.Parameter(torch.zeros(1, dtype=dtype, device=device), requires_grad=False)
    for i, unit in enumerate(units):
        if unit.name not in builder.blocks:
            continue
        if i not in resident:
            used = Used(unit, lambda i=i: tiers.use(i))  # type: ignore[misc]
            wrap(model.get_submodule(unit.name), used.use)
        elif checkpoint:
            wrap(model.get_submodule(unit.name), nullcontext)
    streamed = sum(u.bytes for i, u in enumerate(units) if i not in resident)
    return Placed(model, units, tiers, frozenset(resident), streamed, origin)


def _drop_poolers(model: Any, origin: Origin) -> None:
    """Take away what an encoder puts behind its token vectors, if the files don't hold it."""
    found = [name for name in origin.missing if models.POOLER in f".{name}"]
    if not found or models.task(model.config) != "embed":
        return
    origin.missing = [name for name in origin.missing if name not in found]
    for name in {name[: f".{name}".index(models.POOLER)] for name in found}:
        model.get_submodule(name.rstrip(".")).pooler = None


def _refuse_missing(path: Path, origin: Origin) -> None:
    if origin.missing:
        raise InputError(
            f"{path}: {counted(len(origin.missing), 'tensor is', 'tensors are')} missing, "
            f"as {origin.missing[0]}",
            hint="the weights belong to another config.json; fetch the checkpoint again",
        )


def _in_ram(units: Sequence[Unit], resident: set[int], most: int | None) -> set[int]:
    """Choose the streamed units that wait in RAM: all, or evenly as many as `most` bytes hold."""
    streamed = [i for i in range(len(units)) if i not in resident]
    if most is None:
        return set(streamed)
    slots = 3 * max((units[i].bytes for i in streamed), default=0)
    if sum(units[i].bytes for i in streamed) <= most:
        return set(streamed)
    chosen = spread(tuple(units[i].bytes for i in streamed), most - slots)
    return {streamed[k] for k in chosen}


class _Head:
    """The output head and the embedding: resident, or streamed by rows and read by rows."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.origin, self.device, self.dtype = builder.origin, builder.device, builder.dtype
        self.linear = builder.head
        self.table = builder.table
        weight = None if self.linear is None else self.linear._parameters["weight"]
        self.weight = weight
        bits = None if builder.bits is None else 8
        self.shape = None if weight is None else builder.shape(weight, bits)
        bias = None if self.linear is None else self.linear._parameters.get("bias")
        self.bias = None if bias is None else builder.stored(bias)
        if self.shape is not None:
            self.shape = replace(self.shape, bias=self.bias is not None)
        self.tied = self.table is not None and weight is self.table
        self.embedding = None if self.table is None else builder.matrices.get(id(self.table))
        self.parts: list[tuple[int, Matrix]] = []

    def settle(self, units: list[Unit], room: int | None) -> set[int]:
        """Append the units of head and embedding; return which of all units stay."""
        rest = {0}
        head = self._unit("head", self.shape, 0)
        table = self._table()
        extra = [u for u in (head, table) if u is not None]
        everything = sum(u.bytes for u in units) + sum(u.bytes for u in extra)
        if room is None or everything <= room:
            units += extra
            self.whole, self.from_files = True, False
            return set(range(len(units)))
        self.from_files = self.embedding is not None and not (self.tied and self.shape is None)
        blocks = units[1:]
        slot = max((u.bytes for u in blocks), default=0)
        self.whole = head is None
        if head is not None and self.shape is not None:
            count = max(1, math.ceil(head.bytes / max(slot, 2**20)))
            for i in range(count):
                low, high = i * self.shape.rows // count, (i + 1) * self.shape.rows // count
                part = self._unit(f"head {i}", replace(self.shape, rows=high - low), low)
                assert part is not None  # there is a head
                units.append(part)
        slots = 2 * max((u.bytes for u in units[1:]), default=0)
        need = units[0].bytes + slots
        if need > room:
            raise ResourceError(
                f"the weights need {math.ceil(need / 2**20)} MiB at least, "
                f"{room // 2**20} MiB are left for them",
                hint=f"raise the budget by {math.ceil((need - room) / 2**20)} MiB",
            )
        chosen = spread(tuple(u.bytes for u in units[1:]), room - need)
        return rest | {i + 1 for i in chosen}

    def _unit(self, name: str, shape: Shape | None, low: int) -> Unit | None:
        if shape is None or self.weight is None:
            return None
        unit = Unit(name, self.device)
        matrix = Matrix(shape, np.empty(0, np.int64), self.dtype, self.device)
        write = self.builder.writer(self.weight, shape, self.bias, low=low)
        header = self.builder.mappable(self.weight, shape)
        if header is not None:
            first, count = header.start + low * shape.row_bytes, shape.rows * shape.row_bytes
            header = replace(header, start=first, bytes=count, shape=(shape.rows, shape.inputs))
        stored = self.bias
        offset = None
        if stored is not None:
            offset = lambda: self.origin.tensor(stored)[low : low + shape.rows].float()  # noqa: E731
        unit.packed.append(Packed(matrix, write, header, offset))
        unit.matrix = matrix
        unit.close()
        return unit

    def _table(self) -> Unit | None:
        """Return the unit of an embedding that isn't the head's matrix."""
        if self.embedding is None or (self.tied and self.shape is not None):
            return None
        unit = Unit("embedding", self.device)
        assert self.table is not None  # it has a matrix
        write = self.builder.writer(self.table, self.embedding.shape)
        unit.packed.append(Packed(self.embedding, write))
        unit.close()
        return unit

    def put(self, tiers: Tiers, units: list[Unit], resident: set[int]) -> None:
        """Put modules on head and embedding into the model, now that it is known where they are."""
        heads = [i for i, u in enumerate(units) if u.name.startswith("head")]
        if heads:
            self._put_head(tiers, units, resident, heads)
        stored = None if self.table is None else self.builder.stored(self.table)
        if self.embedding is None or stored is None:
            return
        matrix: Any = self.embedding
        if self.tied and len(heads) == 1 and heads[0] in resident:
            matrix = units[heads[0]].matrix
        elif self.from_files:
            matrix = RowsFromFiles(self.origin, stored, self.embedding.shape, self.embedding)
        for module in self.builder.model.modules():
            if isinstance(module, PackedEmbedding) and module.matrix is self.embedding:
                module.matrix = matrix

    def _put_head(
        self, tiers: Tiers, units: list[Unit], resident: set[int], heads: list[int]
    ) -> None:
        name = next(n for n, m in self.builder.modules.items() if m is self.linear)
        if len(heads) == 1 and heads[0] in resident:
            whole = units[heads[0]].matrix
            assert whole is not None  # `_unit` has set it
            self.builder.replace(name, PackedLinear(whole))
            return

        def hold(i: int) -> Callable[[], AbstractContextManager[Tensor]]:
            return lambda: tiers.use(i)

        parts = []
        for i in heads:
            matrix = units[i].matrix
            assert matrix is not None  # as above
            matrix.hold = Used(units[i], hold(i)).use
            parts.append(matrix)
        self.builder.replace(name, HeadParts(parts, self.dtype, self.device))
