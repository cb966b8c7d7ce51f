"""Templates in Jinja: a row's fields by their names, and `{{ mask }}` where the model fills in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from bmkit.errors import InputError, RecipeError
from bmkit.prompting.source import Source
from bmkit.prompting.wrap import Part, as_text, keys_of

# Unicode sets these aside for use inside of programs; they are in no text.
_OPEN, _CLOSE, _MASK = "\ufdd0", "\ufdd1", "\ufdd2"
_MARK = re.compile(f"([{_OPEN}{_CLOSE}{_MASK}])")


class _Slot:
    """What `mask` is in a template."""

    def __str__(self) -> str:
        return _MASK


class Jinja:
    """A Jinja template. What an expression shows may be shortened, its own words may not.

    It runs in Jinja's sandbox. A block tag takes its line with it.
    """

    def __init__(self, text: str, where: str = "jinja") -> None:
        """Read a template. Raises RecipeError that shows the line for what Jinja refuses."""
        from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.text, self.where = text, where
        self._environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
        )
        if found := _MARK.search(text):
            raise Source(text, where).error(found.start(), "this character is in no text")
        try:
            self._template = self._environment.from_string(text)
        except TemplateSyntaxError as exc:
            at = sum(len(line) + 1 for line in text.split("\n")[: exc.lineno - 1])
            width = len(text[at:].split("\n")[0])
            raise Source(text, where).error(at, str(exc.message), width=width) from None
        except (TemplateError, RecursionError, ValueError) as exc:
            raise RecipeError(f"{where}: {exc}") from None

    @cached_property
    def _names(self) -> set[str]:
        from jinja2 import meta

        return meta.find_undeclared_variables(self._environment.parse(self.text))

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the names of fields that it speaks of; a row may lack those that it asks about."""
        return tuple(sorted(self._names - {"mask"}))

    def require_mask(self) -> Jinja:
        """Return the template. Raises RecipeError if it never says `mask`."""
        if "mask" not in self._names:
            problem = "the template has no {{ mask }}: there is nothing for the model to fill in"
            raise RecipeError(f"{self.where}: {problem}", hint="as in: It was {{ mask }}.")
        return self

    def wrap(self, row: Mapping[str, Any], number: int) -> list[Part]:
        """Return the parts of a row's prompt. Raises InputError naming the row if it can't be."""
        from jinja2 import TemplateError, UndefinedError

        if _MARK.search(json.dumps(dict(row), ensure_ascii=False, default=str)):
            raise InputError(f"row {number} has a character that is in no text (U+FDD0 to U+FDD2)")
        try:
            text = self._template.render({**row, "mask": _Slot()})
            text.encode()
        except UndefinedError as exc:
            raise InputError(f"row {number}: {exc.message}; it has {keys_of(row)}") from None
        except UnicodeEncodeError:
            raise InputError(f"row {number}: it is not UTF-8 text") from None
        except (
            *(TemplateError, TypeError, ValueError, ArithmeticError),
            *(LookupError, AttributeError, RecursionError),
        ) as exc:
            raise InputError(f"row {number}: the template fails: {exc}") from None
        return _parts(text)


def from_jinja(text: str, where: str = "jinja") -> Jinja:
    """Read a Jinja template. Raises RecipeError that shows the line for what Jinja refuses."""
    return Jinja(text, where)


def _shown(value: Any) -> Any:
    """Mark what an expression shows."""
    from jinja2 import Undefined

    if isinstance(value, _Slot | Undefined):
        return str(value)  # which an undefined one refuses
    text = as_text(value)
    return text if _MARK.search(text) else f"{_OPEN}{text}{_CLOSE}"


def _parts(text: str) -> list[Part]:
    """Cut a marked text into parts; a blank at an edge becomes the next part's prefix space."""
    parts: list[Part] = []
    masks = 0
    role, space = "text", False
    for piece in _MARK.split(text):
        if piece in (_OPEN, _CLOSE):
            role = "placeholder" if piece == _OPEN else "text"
        elif piece == _MASK:
            parts.append(Part("mask", space=space, piece=len(parts), mask=masks))
            masks, space = masks + 1, False
        elif piece:
            before, words, space = cut_blanks(piece, space)
            if words and role == "text":
                parts.append(Part("text", words, before, False, len(parts)))
            elif words:
                parts.append(Part("placeholder", words, before, True, len(parts)))
    return parts


def cut_blanks(text: str, space: bool) -> tuple[bool, str, bool]:
    """Return whether `text` has a blank before it, itself, and whether one is left behind it.

    `space` says that the text before has left one; only one blank is taken at either side.
    """
    blanks = space + len(text)
    if not text.strip(" "):
        return False, " " * (blanks - 1), blanks > 0
    if not space and text.startswith(" "):
        space, text = True, text[1:]
    after = text.endswith(" ")
    return space, text[: len(text) - after], after
