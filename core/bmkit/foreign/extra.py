"""Libraries that are there only where somebody has asked for them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from bmkit.errors import ResourceError, first_line


def require(module: str, extra: str, purpose: str) -> None:
    """Raise ResourceError naming the extra if a module isn't installed. Only its parents load."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ResourceError(
            f"{purpose} needs a library that isn't installed: {module}",
            hint=f"pip install 'bmkit[{extra}]'",
        )


def load(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional extra.

    Raises ResourceError naming the extra if it isn't installed, or what it says if it can't run.
    """
    require(module, extra, purpose)
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as exc:
        raise ResourceError(f"{purpose}: {module} can't be used: {first_line(exc)}") from None
