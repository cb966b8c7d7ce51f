"""The way from RAM to a device: copies beside the computing, and events that order them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Link(Protocol):
    """Copies to one device. An event is whatever `copy` and `mark` return."""

    device: torch.device

    def host(self, size: int) -> np.ndarray:
        """Return `size` bytes of RAM that copies can begin from at full speed."""

    def empty(self, size: int) -> Tensor:
        """Return `size` bytes on the device, uint8."""

    def copy(self, source: np.ndarray, target: Tensor, after: Any) -> Any:
        """Begin to copy once event `after` (if any) has come; return the event of its end."""

    def mark(self) -> Any:
        """Return the event of the end of all computing that was asked for until now."""

    def order(self, event: Any) -> None:
        """Let all computing from now on begin after `event`."""

    def wait(self, event: Any) -> None:
        """Wait here until `event` has come."""


class CudaLink:
    """Copies on a stream of their own, from pinned memory of the exact size.

    torch's own pinned allocator rounds sizes up to powers of two, so pages are registered here.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pinned: list[tuple[int, np.ndarray]] = []

    def host(self, size: int) -> np.ndarray:
        """Return page-aligned bytes, registered with the driver where it lets us."""
        import mmap

        if size == 0:
            return np.empty(0, np.uint8)
        pages = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(pages.ctypes.data, size, 0)) == 0:
            self.pinned.append((pages.ctypes.data, pages))
        else:  # pages may not be locked here: copies are slower. The next call reports it once more
            with suppress(RuntimeError):
                torch.zeros(1, device=self.device)
        return pages

    def empty(self, size: int) -> Tensor:
        """Return bytes on the GPU."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def copy(self, source: np.ndarray, target: Tensor, after: Any) -> torch.cuda.Event:
        """Queue a copy on the second stream."""
        with torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            target.copy_(torch.from_numpy(source), non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)
        return event

    def mark(self) -> torch.cuda.Event:
        """Return an event behind what the computing stream has been given."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def order(self, event: torch.cuda.Event) -> None:
        """Let the computing stream wait."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def wait(self, event: torch.cuda.Event) -> None:
        """Wait in this thread."""
        event.synchronize()

    def close(self) -> None:
        """Give the registered pages back."""
        torch.cuda.synchronize(self.device)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for address, _ in self.pinned:
            runtime.cudaHostUnregister(address)
        self.pinned.clear()


class ThreadLink:
    """The same on the CPU: one thread copies, in order. Computing is done when it returns.

    `before` is called before each copy; a test can hold one up there.
    """

    def __init__(self, before: Callable[[], None] | None = None) -> None:
        self.device = torch.device("cpu")
        self.before = before
        self.worker = ThreadPoolExecutor(1, "copies")
        self.lock = threading.Lock()

    def host(self, size: int) -> np.ndarray:
        """Return bytes."""
        return np.empty(size, np.uint8)

    def empty(self, size: int) -> Tensor:
        """Return bytes."""
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, source: np.ndarray, target: Tensor, after: Any) -> Future[None]:
        """Queue a copy."""

        def job() -> None:
            if after is not None:
                after.result()
            if self.before is not None:
                self.before()
            target.copy_(torch.from_numpy(source))

        return self.worker.submit(job)

    def mark(self) -> Future[None]:
        """Return an event that has come: computing here is over when it returns."""
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def order(self, event: Future[None]) -> None:
        """Wait, as there is no queue of computing that could."""
        event.result()

    def wait(self, event: Future[None]) -> None:
        """Wait."""
        event.result()

    def close(self) -> None:
        """End the thread."""
        self.worker.shutdown(wait=True, cancel_futures=True)
