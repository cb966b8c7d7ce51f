"""Every error that bmkit raises on purpose.

* BmkitError                 exit code 1
  + UsageError               exit code 2   the command line is wrong
  + RecipeError              exit code 2   the recipe is wrong
  + InputError               exit code 3   an input is missing, damaged or of the wrong kind
    - OutputTaken            exit code 3   OUT holds something else, or another run is writing it
  + ResourceError            exit code 4   this machine cannot: memory, disk, device
  + GateError                exit code 5   built, but a bound on the result is not met
  + DivergedError            exit code 5   training left the numbers that make sense
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import struct
from collections.abc import Iterable, Iterator


class BmkitError(Exception):
    """Base class. `hint` says what to do next, in one sentence."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.key: str | None = None
        """The dotted key of the recipe that it is about, where its place is not told yet."""


class UsageError(BmkitError):
    """The command line is wrong."""

    exit_code = 2


class RecipeError(BmkitError):
    """The recipe is wrong."""

    exit_code = 2


class InputError(BmkitError):
    """An input is missing, damaged or of the wrong kind."""

    exit_code = 3


class OutputTaken(InputError):
    """OUT holds something that this run must not replace, or another run is writing it."""


class ResourceError(BmkitError):
    """This machine cannot run the plan: memory, disk or device."""

    exit_code = 4


class GateError(BmkitError):
    """The result was built, but a bound is not met: of `gates:`, or a step's own."""

    exit_code = 5


class DivergedError(BmkitError):
    """Training produced a loss that is not a number; the last good checkpoint is kept."""

    exit_code = 5


class About:
    """A block whose errors are about a key of the recipe: whoever has it shows the place."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, _: object
    ) -> None:
        """Note the key on an error that has none."""
        if isinstance(exc, BmkitError) and exc.key is None:
            exc.key = self.key


class LibraryRefusal:
    """A block in which a library's refusal of a user's file becomes an InputError, or `error`.

    The Rust tokenizers raise bare `Exception`, which no `except` clause can name without catching
    bugs as well; here it is told by its exact type.
    """

    KINDS = (ValueError, KeyError, IndexError, TypeError, OSError, struct.error)

    def __init__(
        self, what: str, hint: str | None = None, error: type[BmkitError] | None = None
    ) -> None:
        self.what, self.hint, self.error = what, hint, error or InputError

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, _: object
    ) -> None:
        """Raise InputError in the place of a refusal."""
        refusals = (*self.KINDS, NotImplementedError)
        if exc is not None and machine_refusal(exc) is not None:
            return  # the machine refused, not the library
        if kind is not None and (kind is Exception or issubclass(kind, refusals)):
            raise self.error(f"{self.what}: {first_line(exc)}", hint=self.hint) from None


_REFUSALS = {
    getattr(errno, name)
    for name in (
        "ENOSPC",
        "EROFS",
        "EACCES",
        "EPERM",
        "EFBIG",
        "EDQUOT",
        "EIO",
        "ENOTDIR",
        "ENAMETOOLONG",
        "ENOMEM",
        "EMFILE",
        "ENFILE",
    )
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_NO_MEMORY = ("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate")
_DEVICE_LOST = (
    *("GPU is lost", "has fallen off the bus", "device not ready", "unspecified launch failure"),
    *("uncorrectable ECC", "CUDA driver", "no CUDA-capable device", "all CUDA-capable devices"),
)
_NO_TEMPORARY = "No usable temporary directory"  # of Python's tempfile, as «not found»
_TORCH_WRITER = ("PytorchStreamWriter failed", "unexpected pos ")


def machine_refusal(exc: BaseException) -> str | None:
    """Say what the machine refused (disk full, not permitted, out of memory), or None.

    Libraries in Rust and C++ report a refusal of the system as text, in an error of their own or
    as the cause of one; so the whole chain of causes is looked at.
    """
    return next((said for e in _chain(exc) if (said := _one_refusal(e))), None)


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        yield exc
        exc = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)


def _one_refusal(exc: BaseException) -> str | None:
    text = str(exc)
    if isinstance(exc, OSError) and exc.errno is not None and exc.errno in _REFUSALS:
        return os.strerror(exc.errno)
    if (found := _OS_ERROR.search(text)) and int(found[1]) in _REFUSALS:
        return os.strerror(int(found[1]))
    if isinstance(exc, FileNotFoundError) and _NO_TEMPORARY in text:
        return "there is no folder that temporary files can be written to"
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":
        return "out of memory"
    if isinstance(exc, RuntimeError) and any(word in text for word in _NO_MEMORY):
        return "out of memory"
    if isinstance(exc, RuntimeError) and any(word in text for word in _DEVICE_LOST):
        return f"the GPU can't be used any more: {first_line(exc)}"
    if isinstance(exc, RuntimeError) and any(word in text for word in _TORCH_WRITER):
        return "the disk is full, or can't be written"
    return None


def first_line(exc: BaseException | None) -> str:
    """Return the first line of what an error says, or its name if it says nothing."""
    text = str(exc).strip()
    return text.splitlines()[0][:300] if text else type(exc).__name__


def counted(count: int, one: str, several: str) -> str:
    """Return a number with the words that go with one, or with several."""
    return f"{count} {one if count == 1 else several}"


def an_artifact(kind: str) -> str:
    """Return what an artifact of a kind is called in a sentence."""
    return {"data": "data", "phrases": "a phrase pool"}.get(kind, f"a {kind}")


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str | None = None) -> str | None:
    """Return «did you mean `x`?» for the nearest of `known`, else `otherwise`."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.55)
    return f"did you mean `{close[0]}`?" if close else otherwise
