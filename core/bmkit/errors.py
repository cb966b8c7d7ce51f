"""Every error that bmkit raises on purpose.

* BmkitError                 exit code 1
  + UsageError               exit code 2   the command line is wrong
  + RecipeError              exit code 2   the recipe is wrong
  + InputError               exit code 3   an input is missing, damaged or of the wrong kind
    - OutputTaken            exit code 3   OUT holds something else, or another run is writing it
  + ResourceError            exit code 4   this machine cannot: memory, disk, device
  + GateError                exit code 5   built, but a bound of `gates:` is not met
  + DivergedError            exit code 5   training left the numbers that make sense
"""

from __future__ import annotations

import difflib
import struct
from collections.abc import Iterable


class BmkitError(Exception):
    """Base class. `hint` says what to do next, in one sentence."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


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
    """The result was built, but a bound of `gates:` is not met."""

    exit_code = 5


class DivergedError(BmkitError):
    """Training produced a loss that is not a number; the last good checkpoint is kept."""

    exit_code = 5


class LibraryRefusal:
    """A block in which a library's refusal of a user's file becomes an InputError.

    The Rust tokenizers raise bare `Exception`, which no `except` clause can name without catching
    bugs as well; here it is told by its exact type.
    """

    KINDS = (ValueError, KeyError, IndexError, TypeError, OSError, struct.error)

    def __init__(self, what: str, hint: str | None = None) -> None:
        self.what, self.hint = what, hint

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, _: object
    ) -> None:
        """Raise InputError in the place of a refusal."""
        refusals = (*self.KINDS, NotImplementedError)
        if kind is not None and (kind is Exception or issubclass(kind, refusals)):
            raise InputError(f"{self.what}: {first_line(exc)}", hint=self.hint) from None


def first_line(exc: BaseException | None) -> str:
    """Return the first line of what an error says, or its name if it says nothing."""
    text = str(exc).strip()
    return text.splitlines()[0][:300] if text else type(exc).__name__


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str | None = None) -> str | None:
    """Return «did you mean `x`?» for the nearest of `known`, else `otherwise`."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.55)
    return f"did you mean `{close[0]}`?" if close else otherwise
