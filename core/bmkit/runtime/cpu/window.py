"""Weights computed with where the system caches them: a file's pages, mapped while they are used.

Reading into memory of one's own copies every byte; on a CPU this takes longer than computing. Pages
of the page cache can be mapped in a moment instead, and given back after their use, so that no more
of them count as the process's than are in use.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from bmkit.errors import InputError

_POPULATE_READ = 22
"""Linux 5.14's `MADV_POPULATE_READ`: bring pages in, reading them if need be."""
_PAGE = mmap.PAGESIZE


class MappedFile:
    """A whole file, mapped for reading; no page of it is resident until a window is filled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.handle).st_size
        self.pages = np.frombuffer(mmap.mmap(self.handle, 0, prot=mmap.PROT_READ), np.uint8)
        # numba would compile everything again for arrays that are marked as not to be written.
        address = (ctypes.c_uint8 * self.size).from_address(self.pages.ctypes.data)
        self.bytes = np.ctypeslib.as_array(address)
        self.libc = ctypes.CDLL(None, use_errno=True)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)

    def advise(self, start: int, size: int, advice: int) -> bool:
        """Call madvise on the pages around some bytes; return whether the system could do it."""
        low = start // _PAGE * _PAGE
        address = self.bytes.ctypes.data + low
        length = start + size - low
        found: int = self.libc.madvise(
            ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice)
        )
        return found == 0


class Window:
    """Some bytes of a file, resident from `fill` to `drop`.

    `look` is called with them the first time that they are there.
    """

    def __init__(
        self, file: MappedFile, start: int, size: int, look: Callable[[np.ndarray], None]
    ) -> None:
        self.file, self.start, self.size, self.look = file, start, size, look
        self.looked = False

    @property
    def array(self) -> np.ndarray:
        """Return the bytes."""
        found: np.ndarray = self.file.bytes[self.start : self.start + self.size]
        return found

    def ahead(self) -> None:
        """Let the system begin to read what isn't in its cache."""
        with suppress(OSError, AttributeError):
            os.posix_fadvise(self.file.handle, self.start, self.size, os.POSIX_FADV_WILLNEED)

    def fill(self) -> None:
        """Map the pages, waiting for what has to be read. Raises InputError if the file shrank."""
        if os.fstat(self.file.handle).st_size < self.file.size:
            raise InputError(f"{self.file.path} has become shorter while it was read")
        self.ahead()
        if not self.file.advise(self.start, self.size, _POPULATE_READ):
            int(self.array[::_PAGE].sum())  # an older Linux: touch every page
        if not self.looked:
            self.look(self.array)
            self.looked = True

    def drop(self) -> None:
        """Give the pages back to the system, which keeps them in its cache while it can."""
        self.file.advise(self.start, self.size, mmap.MADV_DONTNEED)
