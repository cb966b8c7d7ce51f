"""The text of a template, and errors that point into it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bmkit.errors import RecipeError


@dataclass(frozen=True)
class Source:
    """A template as it is written; `where` names it in errors: a key of the recipe, or a file."""

    text: str
    where: str = "template"

    def error(
        self, at: int, problem: str, *, width: int = 1, hint: str | None = None
    ) -> RecipeError:
        """Return a RecipeError that shows the line of character `at`, with a caret under it."""
        lines = self.text[:at].split("\n")
        line, column = len(lines), len(lines[-1]) + 1
        shown = self.text.split("\n")[line - 1]
        place = f"column {column}" if "\n" not in self.text else f"line {line}, column {column}"
        lead = re.sub(r"[^\t]", " ", shown[: column - 1])
        carets = "^" * max(1, min(width, len(shown) - column + 1))
        written = shown.encode(errors="backslashreplace").decode()
        message = f"{self.where}, {place}: {problem}\n   | {written}\n   | {lead}{carets}"
        return RecipeError(message, hint=hint)
