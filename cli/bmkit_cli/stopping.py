"""Stopping: SIGINT and SIGTERM reach the run surely, and don't disturb its cleaning up."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

AGAIN = 0.3
"""Seconds after which a stop that nobody has handled is raised again."""

asked = 0
"""The signal that has asked the run to stop, 0 for none."""
kept = ""
"""What a stopped run has left on purpose, and what to do with it."""


def listen() -> None:
    """Take the signals over."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, stop)
    sys.unraisablehook = _unraisable


def stop(number: int, _: FrameType | None) -> None:
    """Stop the run.

    An exception that a signal raises inside a finalizer or an import's callback is dropped by
    Python. So it is raised again, by a timer, until somebody is seen handling it.
    """
    global asked
    asked = asked or number
    signal.setitimer(signal.ITIMER_REAL, AGAIN)
    if isinstance(sys.exc_info()[1], KeyboardInterrupt | SystemExit):
        return
    if asked == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + asked)


@contextmanager
def telling() -> Iterator[None]:
    """Let the last message say what a stopped run notes that it has kept."""
    global kept
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stopped:
        kept = next(iter(getattr(stopped, "__notes__", ())), kept)
        raise


def handled() -> None:
    """Note that a stop has done what it was meant to: the run goes on."""
    global asked
    signal.setitimer(signal.ITIMER_REAL, 0)
    asked = 0


def ignore() -> None:
    """Note that the run is over: nothing is left to stop."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def _unraisable(found: Any) -> None:
    """Say nothing of a stop that was dropped: it comes again."""
    if not isinstance(found.exc_value, KeyboardInterrupt | SystemExit):
        sys.__unraisablehook__(found)
