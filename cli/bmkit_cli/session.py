"""What every command that does work begins with: quiet libraries, a reporter, the model's path."""

from __future__ import annotations

import json
import os
import sys
import warnings

from bmkit.errors import InputError, UsageError
from bmkit.report import Reporter
from bmkit_cli import progress
from bmkit_cli.options import Progress

verbose = False
"""Whether -v was given; main() shows tracebacks then."""


def start(how: Progress, *, quiet: bool, loud: bool) -> Reporter:
    """Set how much is said, before any large library is imported."""
    global verbose
    if quiet and loud:
        raise UsageError("-q and -v exclude each other")
    verbose = loud
    if not loud:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("LOGURU_LEVEL", "ERROR")
        warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch and numba have threads of their own. Those that wait spin at first, on a core that the
    # others need; so let them spin shortly: longer gained nothing, and cost much beside other work.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    return progress.reporter(how, quiet=quiet)


def model_path(given: str) -> str:
    """Return what `-m` names; `-` is the one line that the command before this one prints."""
    if given != "-":
        return given
    line = sys.stdin.readline().strip()
    if not line:
        raise InputError(
            "no path came on stdin: the command before this one failed",
            hint="its own message says why; `set -o pipefail` makes the shell notice",
        )
    if line.startswith("{"):
        try:
            return str(json.loads(line)["path"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"stdin holds no artifact's path: {line[:80]}") from None
    return line
