"""What `post_processing` may do to a row's text, by name; and names for the usual lambdas."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Callable, Iterable

Filter = Callable[[str], str]

FILTERS: dict[str, Filter] = {
    "strip": str.strip,
    "lstrip": str.lstrip,
    "rstrip": str.rstrip,
    "lower": str.lower,
    "upper": str.upper,
    "title": str.title,
    "capitalize": str.capitalize,
    "upper_first": lambda text: text[:1].upper() + text[1:],
    "lower_first": lambda text: text[:1].lower() + text[1:],
    "rstrip_punctuation": lambda text: text.rstrip(string.punctuation),
    "strip_punctuation": lambda text: text.strip(string.punctuation),
    "rstrip_period": lambda text: text.rstrip("."),
    "remove_newlines": lambda text: re.sub(r"\r\n|[\r\n]", " ", text),
    "collapse_spaces": lambda text: " ".join(text.split()),
}
"""Filters by name. `remove_newlines` puts a blank for each line end."""

# The method of a legacy lambda, with its arguments as Python writes them -> a filter.
_CALLS = {
    **{(name, ""): name for name in ("strip", "lstrip", "rstrip", "lower", "upper", "title")},
    ("capitalize", ""): "capitalize",
    ("rstrip", "string.punctuation"): "rstrip_punctuation",
    ("strip", "string.punctuation"): "strip_punctuation",
    ("rstrip", "'.'"): "rstrip_period",
    ("replace", "'\\n', ' '"): "remove_newlines",
}


def apply(names: Iterable[str], text: str) -> str:
    """Put `text` through the filters, from first to last."""
    for name in names:
        text = FILTERS[name](text)
    return text


def translate(code: ast.expr) -> list[str] | None:
    """Return the filters that do what a legacy function does, or None.

    Known are `str.lower`, `lambda s: s.rstrip(string.punctuation)`, and rows of such calls. The
    code is looked at and never run.
    """
    if isinstance(code, ast.Attribute) and isinstance(code.value, ast.Name):
        name = _CALLS.get((code.attr, "")) if code.value.id == "str" else None
        return [name] if name else None
    if not isinstance(code, ast.Lambda) or len(code.args.args) != 1:
        return None
    found: list[str] = []
    body = code.body
    while isinstance(body, ast.Call) and isinstance(body.func, ast.Attribute):
        arguments = ", ".join(ast.unparse(argument) for argument in body.args)
        name = _CALLS.get((body.func.attr, arguments))
        if name is None or body.keywords:
            return None
        found.insert(0, name)
        body = body.func.value
    itself = isinstance(body, ast.Name) and body.id == code.args.args[0].arg
    return found if itself and found else None
