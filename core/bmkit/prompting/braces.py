"""What stands between braces in a template: a Python literal that is read and never run."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from bmkit.errors import RecipeError, did_you_mean
from bmkit.prompting import filters
from bmkit.prompting.pieces import (
    MOST_SOFT,
    OPTIONS,
    Again,
    Mask,
    Meta,
    Piece,
    Placeholder,
    Soft,
    Special,
    Text,
)
from bmkit.prompting.source import Source

_TOKEN = re.compile(
    r'"(?:\\.|[^"\\\n])*"' + "|" + r"'(?:\\.|[^'\\\n])*'" + "|" + r"[{}]|[^{}\"']+|.", re.DOTALL
)
_JSON = {"true": "True", "false": "False", "null": "None"}


def end_of(text: str, start: int) -> int | None:
    """Return where the piece that opens at `start` is over, or None. Text in quotes is passed."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if not depth:
            return token.end()
    return None


def read(source: Source, start: int, end: int, *, space: bool) -> Piece:
    """Return the piece at [start, end) of `source`. Raises RecipeError that points at the fault."""
    return _Reader(source, start, end).piece(space)


class _Reader:
    """One pair of braces: its keys, their values, and where each stands."""

    def __init__(self, source: Source, start: int, end: int) -> None:
        self.source, self.start, self.end = source, start, end
        self.code = source.text[start:end]
        self.values: dict[str, ast.expr | None] = {}
        self.keys: dict[str, ast.expr] = {}
        self._parse()

    def piece(self, space: bool) -> Piece:
        """Return what the braces say."""
        kind = self._kind()
        for key, node in self.keys.items():
            if key != kind and key not in OPTIONS[kind]:
                known = OPTIONS[kind]
                close = did_you_mean(key, known, otherwise=f"known: {', '.join(known)}")
                raise self._error(node, f"`{kind}` has no option `{key}`; {close}")
        if kind in ("placeholder", "meta"):
            made = Placeholder if kind == "placeholder" else Meta
            shortenable = self._flag("shortenable", kind == "placeholder")
            return made(self._text(kind, "a key of the rows"), space, shortenable, self._filters())
        if kind == "text":
            text = self._text(kind, "text", empty=True)
            return Text(text, space, self._flag("shortenable", False))
        if self._flag("shortenable", False):
            raise self._error(self.keys["shortenable"], f"`{kind}` can't be shortened")
        if kind == "special":
            return Special(self._text(kind, "a token, as in `<eos>`"), space)
        if kind == "soft_id":
            return Again(self._whole("soft_id", 1), space)
        if kind == "mask":
            if self._value("mask") is not None:
                raise self._error(self.values["mask"], '`mask` takes no value: write {"mask"}')
            return Mask(space)
        return self._soft(space)

    def _soft(self, space: bool) -> Soft:
        word = self._value("soft")
        if word is not None and not isinstance(word, str):
            raise self._error(self.values["soft"], "`soft` takes text to begin as, or None")
        if word and not word.strip():
            raise self._error(self.values["soft"], "`soft` begins as a blank; give it words")
        duplicate = self._whole("duplicate", 1) if "duplicate" in self.keys else 1
        if duplicate > MOST_SOFT:
            raise self._error(self.values["duplicate"], f"`duplicate` is at most {MOST_SOFT}")
        same = self._flag("same", False)
        if same and "duplicate" not in self.keys:
            raise self._error(self.keys["same"], "`same` says nothing without `duplicate`")
        number = self._whole("soft_id", 1) if "soft_id" in self.keys else None
        return Soft(word or None, space, duplicate, same and duplicate > 1, number)

    def _parse(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of backslashes in a user's text
                found = ast.parse(self.code, mode="eval").body
        except SyntaxError as exc:
            at = self._place(exc.lineno or 1, max((exc.offset or 1) - 1, 0))
            raise self.source.error(
                min(max(at, self.start), self.end - 1),
                f"this is no piece: {exc.msg}",
                hint=self._hint(),
            ) from None
        except (ValueError, RecursionError, MemoryError):
            raise self.source.error(
                self.start, "this can't be read", width=len(self.code)
            ) from None
        pairs: list[tuple[ast.expr | None, ast.expr | None]]
        if isinstance(found, ast.Dict):
            if not found.keys:
                hint = "write {{}} for the characters"
                raise self.source.error(self.start, "these braces are empty", width=2, hint=hint)
            pairs = list(zip(found.keys, found.values, strict=True))
        elif isinstance(found, ast.Set):
            pairs = [(node, None) for node in found.elts]
        else:
            raise self._error(found, "this is no piece", hint=self._hint())
        for node, value in pairs:
            if isinstance(node, ast.Name) and len(pairs) == 1:
                write = node.id if node.id in OPTIONS else "mask"
                hint = f'write {{"placeholder": "{node.id}"}} for a row\'s text, or {{"{write}"}}'
                raise self._error(node, f"`{node.id}` is not in quotes", hint=hint)
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                raise self._error(node or value, "a key is text in quotes", hint=self._hint())
            if node.value in self.keys:
                raise self._error(node, f"`{node.value}` is said twice")
            self.keys[node.value], self.values[node.value] = node, value
        if isinstance(found, ast.Set) and len(pairs) > 1:
            names = "` and `".join(self.keys)
            raise self._error(found.elts[1], f"one piece is both `{names}`", hint=self._hint())

    def _kind(self) -> str:
        kinds = [key for key in self.keys if key in OPTIONS and key != "soft_id"]
        if not kinds and "soft_id" in self.keys:
            return "soft_id"
        if len(kinds) == 1:
            return kinds[0]
        if kinds:
            named = "` and `".join(kinds)
            raise self._error(self.keys[kinds[1]], f"one piece is both `{named}`")
        key, node = next(iter(self.keys.items()))
        close = did_you_mean(key, OPTIONS, otherwise=f"known: {', '.join(OPTIONS)}")
        raise self._error(node, f"there is no piece `{key}`; {close}")

    def _value(self, key: str) -> Any:
        """Return the literal behind `key`; None for a piece like {"mask"}."""
        node = self.values[key]
        if node is None:
            return None
        try:
            value = ast.literal_eval(node)
            if isinstance(value, str):
                value.encode()
            return value
        except UnicodeEncodeError:
            raise self._error(node, "this is not UTF-8 text") from None
        except (ValueError, TypeError, RecursionError, MemoryError):
            name = node.id if isinstance(node, ast.Name) else ""
            hint = f"write {_JSON[name]}" if name in _JSON else "it takes text, a number, True …"
            raise self._error(node, f"the value of `{key}` is not a literal", hint=hint) from None

    def _text(self, key: str, wanted: str, *, empty: bool = False) -> str:
        value = self._value(key)
        if not isinstance(value, str) or not (value or empty):
            raise self._error(self.values[key] or self.keys[key], f"`{key}` takes {wanted}")
        return value

    def _flag(self, key: str, otherwise: bool) -> bool:
        value = self._value(key) if key in self.keys else otherwise
        if not isinstance(value, bool):
            raise self._error(self.values[key] or self.keys[key], f"`{key}` takes True or False")
        return value

    def _whole(self, key: str, least: int) -> int:
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            node = self.values[key] or self.keys[key]
            raise self._error(node, f"`{key}` takes a whole number, {least} or more")
        return value

    def _filters(self) -> tuple[str, ...]:
        node = self.values.get("post_processing")
        if "post_processing" not in self.keys:
            return ()
        code = self._function(node)
        if code is not None:
            names = filters.translate(code)
            hint = f"filters are {', '.join(filters.FILTERS)}"
            if names:
                write = f'"{names[0]}"' if len(names) == 1 else str(names).replace("'", '"')
                hint = f'write "post_processing": {write}'
            raise self._error(node, "code in a template is never run", hint=hint)
        value = self._value("post_processing")
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            where = node or self.keys["post_processing"]
            raise self._error(where, "`post_processing` takes a filter's name, or a list of names")
        for name in names:
            if name not in filters.FILTERS:
                known = f"known: {', '.join(filters.FILTERS)}"
                close = did_you_mean(name, filters.FILTERS, otherwise=known)
                raise self._error(node, f"there is no filter `{name}`; {close}")
        return tuple(names)

    @staticmethod
    def _function(node: ast.expr | None) -> ast.expr | None:
        """Return the function that a value is, or that a text spells, or None."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if not re.match(r"\s*(lambda\b|str\.)", node.value):
                return None
            try:
                node = ast.parse(node.value.strip(), mode="eval").body
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                return None
        return node if isinstance(node, ast.Lambda | ast.Attribute | ast.Call) else None

    def _hint(self) -> str:
        if re.search(r"[{,]\s*[\"'](soft|mask)[\"']\s*,", self.code):
            return 'options have values: {"soft": None, "duplicate": 3}'
        return 'pieces look like {"placeholder": "text_a"} or {"mask"}; {{ is the character {'

    def _error(
        self, node: ast.expr | None, problem: str, *, hint: str | None = None
    ) -> RecipeError:
        if node is None:
            return self.source.error(self.start, problem, width=len(self.code), hint=hint)
        at = self._place(node.lineno, node.col_offset, octets=True)
        end = self._place(node.end_lineno or 1, node.end_col_offset or 0, octets=True)
        return self.source.error(at, problem, width=end - at, hint=hint)

    def _place(self, line: int, column: int, *, octets: bool = False) -> int:
        """Return where in the template Python's `line` (from 1) and `column` (from 0) are."""
        lines = re.findall(r"[^\r\n]*(?:\r\n|\r|\n|$)", self.code)
        line = min(line, len(lines))
        if octets:
            column = len(lines[line - 1].encode()[:column].decode(errors="ignore"))
        return self.start + sum(map(len, lines[: line - 1])) + column
