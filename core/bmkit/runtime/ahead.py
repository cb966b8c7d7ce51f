"""An iterator that is read ahead by a thread."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

_END = object()


class Ahead:
    """An iterator read by a thread, so that a slow source doesn't hold up what is under way."""

    def __init__(self, source: Iterable[Any], size: int) -> None:
        self.queue: queue.Queue[Any] = queue.Queue(size)
        self.over = self.stopped = False
        self.reader = threading.Thread(target=self._read, args=(source,), daemon=True)
        self.reader.start()
        atexit.register(self.stop)

    def _read(self, source: Iterable[Any]) -> None:
        try:
            for item in source:
                self._put(item)
                if self.stopped:
                    return
            self._put(_END)
        except BaseException as exc:
            self._put(exc)

    def _put(self, item: Any) -> None:
        while not self.stopped:
            with suppress(queue.Full):
                self.queue.put(item, timeout=0.1)
                return

    def stop(self) -> None:
        """End the thread, unless it waits for its source: then it holds nothing and may be left.

        One that is in a library's code when Python ends would abort the process.
        """
        self.stopped = True
        self.reader.join(0.5)
        atexit.unregister(self.stop)

    def next(self, *, wait: bool) -> Any:
        """Return the next item; None if there is none yet (without `wait`) or no more."""
        if self.over:
            return None
        try:
            item = self.queue.get(block=wait)
        except queue.Empty:
            return None
        if item is _END:
            self.over = True
            return None
        if isinstance(item, BaseException):
            self.over = True
            raise item
        return item
