"""The one module that writes results to stdout. Everything else goes to stderr."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from bmkit import env
from bmkit.errors import ResourceError


class ReaderGoneError(Exception):
    """Whoever read our stdout has closed it: stop quietly."""


class Output:
    """Stdout, kept for results: while it is open, what libraries print there goes to stderr."""

    def __init__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            kept = os.dup(1)
            os.dup2(2, 1)
            if env.process()[0]:  # the first of several processes tells what all have done
                os.dup2(os.open(os.devnull, os.O_WRONLY), kept)
        except OSError:  # closed by whoever started us: results go nowhere
            kept = os.open(os.devnull, os.O_WRONLY)
        self.stream = io.TextIOWrapper(os.fdopen(kept, "wb"), encoding="utf-8", newline="\n")
        self.terminal = os.isatty(self.stream.fileno())

    def text(self, text: str, *, end: str = "\n") -> None:
        """Write text and flush. Raises ReaderGoneError if nobody reads it any more."""
        try:
            self.stream.write(text.encode("utf-8", "replace").decode("utf-8") + end)
            self.stream.flush()
        except BrokenPipeError:
            # What is left in the buffer would fail again at exit: let it go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            raise ReaderGoneError from None
        except OSError as exc:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            raise ResourceError(f"cannot write to stdout: {exc.strerror}") from None

    def json(self, values: Mapping[str, Any] | list[Any]) -> None:
        """Write one JSON object on a line."""
        self.text(json.dumps(values, ensure_ascii=False))


_output: Output | None = None


def out() -> Output:
    """Return the process's one Output, opening it first if need be."""
    global _output
    if _output is None:
        _output = Output()
    return _output
