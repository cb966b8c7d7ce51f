"""Tensors of rows on disk, found by the rows' numbers, also after a restart."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from bmkit.errors import ResourceError

SHARD_BYTES = 2**30


@dataclass(frozen=True)
class _Place:
    row: int
    shard: int
    start: int
    tokens: int
    width: int
    dtype: str


class StoredStates:
    """States [tokens, width] of rows, appended to files in `folder`, at most `limit` bytes in all.

    What a killed run has left in `folder` is found again. Raises ResourceError if the disk is full.
    """

    def __init__(self, folder: Path, *, limit: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.limit = folder, limit
        self._places = {place.row: place for place in _places(folder / "index.jsonl")}
        self._index = (folder / "index.jsonl").open("ab")
        self._shard = 1 + max((p.shard for p in self._places.values()), default=-1)
        self._writing: BinaryIO | None = None
        self._reading: dict[int, int] = {}
        self.bytes = sum(
            p.tokens * p.width * getattr(torch, p.dtype).itemsize for p in self._places.values()
        )

    def tokens(self, row: int) -> int | None:
        """Return how many tokens' states of a row there are; None if it isn't kept."""
        place = self._places.get(row)
        return None if place is None else place.tokens

    def write(self, row: int, state: Tensor) -> None:
        """Keep the state [tokens, width] of a row, if there is room and it isn't kept yet."""
        size = state.numel() * state.element_size()
        full = self.limit is not None and self.bytes + size > self.limit
        if full or row in self._places:
            return
        try:
            start = self._append(state.cpu().contiguous().view(-1).view(torch.uint8))
            name = str(state.dtype).removeprefix("torch.")
            tokens, width = state.shape
            place = _Place(row, self._shard, start, tokens, width, name)
            self._index.write(json.dumps(asdict(place)).encode() + b"\n")
            self._index.flush()
        except OSError as exc:
            raise ResourceError(
                f"the states of the frozen blocks can't be written to {self.folder}: {exc}",
                hint="free some disk, or train without keeping them",
            ) from None
        self._places[row] = place
        self.bytes += size

    def read(self, row: int) -> Tensor:
        """Return the state [tokens, width] of a row that is kept."""
        place = self._places[row]
        if place.shard not in self._reading:
            self._reading[place.shard] = os.open(self._file(place.shard), os.O_RDONLY)
        dtype: torch.dtype = getattr(torch, place.dtype)
        size = place.tokens * place.width * dtype.itemsize
        data = bytearray(os.pread(self._reading[place.shard], size, place.start))
        return torch.frombuffer(data, dtype=dtype).view(place.tokens, place.width)

    def remove(self) -> None:
        """Close the files and remove them."""
        for descriptor in self._reading.values():
            os.close(descriptor)
        self._reading.clear()
        if self._writing is not None:
            self._writing.close()
        self._index.close()
        self._places.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append(self, data: Tensor) -> int:
        """Write bytes behind the last ones; return where they start."""
        if self._writing is not None and self._writing.tell() >= SHARD_BYTES:
            self._writing.close()
            self._writing, self._shard = None, self._shard + 1
        if self._writing is None:
            self._writing = self._file(self._shard).open("wb")
        start = self._writing.tell()
        self._writing.write(data.numpy().data)
        self._writing.flush()
        return start

    def _file(self, shard: int) -> Path:
        return self.folder / f"states-{shard:05d}.bin"


def _places(index: Path) -> list[_Place]:
    """Read an index, whose last line a killed run may have left unfinished."""
    if not index.exists():
        return []
    whole = index.read_bytes().rpartition(b"\n")[0]
    if not index.read_bytes().endswith(b"\n"):
        index.write_bytes(whole + b"\n" if whole else b"")
    return [_Place(**json.loads(line)) for line in whole.splitlines()]
