"""Errors of a template or of words, shown at a key of the recipe. No torch here."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticCustomError

from bmkit.errors import BmkitError, RecipeError
from bmkit.recipe import contradiction


class PointingAt:
    """A block in which a refusal becomes one of the recipe, at a key."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: Any, exc: BaseException | None, _: Any) -> None:
        """Raise what points at the key in the place of a RecipeError."""
        if isinstance(exc, RecipeError):
            raise refusal(self.key, exc) from None


def refusal(key: str, exc: BmkitError) -> PydanticCustomError:
    """Return what a validator raises for an error of the template or the words."""
    return contradiction(key, f"{exc}\n   = {exc.hint}" if exc.hint else str(exc))
