"""The template language: text with pieces in braces, as OpenPrompt has it (arXiv 2111.01998)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bmkit.errors import InputError, RecipeError
from bmkit.prompting import braces
from bmkit.prompting.pieces import (
    Again,
    Mask,
    Meta,
    Piece,
    Placeholder,
    Scaffold,
    Soft,
    Special,
    Text,
)
from bmkit.prompting.source import Source

NO_MASK = 'the template has no {"mask"}: there is nothing for the model to fill in'


@dataclass(frozen=True)
class Span:
    """Trainable rows that belong together: one, or one for each token of `word`.

    `space` and `opens` say what the word is tokenised behind: a blank, or nothing at all. `shared`
    spans stand in several places.
    """

    number: int
    word: str | None
    space: bool
    opens: bool
    shared: bool


@dataclass(frozen=True)
class Template:
    """A prompt with places for a row's values, and for what the model is to say."""

    pieces: tuple[Piece, ...]
    where: str = field(default="template", compare=False)

    @property
    def masks(self) -> int:
        """Return the number of masks."""
        return sum(isinstance(piece, Mask) for piece in self.pieces)

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the keys that a row needs, each once."""
        named = (p.name for p in self.pieces if isinstance(p, Placeholder | Meta))
        return tuple(dict.fromkeys(named))

    def require_mask(self) -> Template:
        """Return the template. Raises RecipeError if it has no mask."""
        if not self.masks:
            texts = [piece.text for piece in self.pieces if isinstance(piece, Text)]
            doubled = any(re.search(r"""\{["']mask["']\}""", text) for text in texts)
            hint = "one brace opens a piece; {{ is the character" if doubled else None
            raise RecipeError(f"{self.where}: {NO_MASK}", hint=hint or 'as in: It was {"mask"}.')
        return self

    @property
    def soft(self) -> tuple[Span, ...]:
        """Return the trainable rows, span by span, in the order in which they first stand."""
        return self._soft[0]

    def spans(self, piece: int) -> tuple[Span, ...]:
        """Return the spans that stand where piece number `piece` is; one may come repeatedly."""
        return tuple(self.soft[number] for number in self._soft[1].get(piece, ()))

    @cached_property
    def _soft(self) -> tuple[tuple[Span, ...], dict[int, tuple[int, ...]]]:
        first: list[tuple[str | None, bool, bool]] = []
        used: dict[int, tuple[int, ...]] = {}
        named: dict[int, tuple[int, ...]] = {}
        for place, piece in enumerate(self.pieces):
            if isinstance(piece, Again):
                used[place] = named[piece.soft_id]
            elif isinstance(piece, Soft):
                rows = 1 if piece.same else piece.duplicate
                numbers = tuple(range(len(first), len(first) + rows))
                first += [(piece.word, piece.space, place == 0)] * rows
                used[place] = numbers * (piece.duplicate if piece.same else 1)
                if piece.soft_id is not None:
                    named[piece.soft_id] = used[place]
        count = [0] * len(first)
        for numbers in used.values():
            for number in numbers:
                count[number] += 1
        spans = [Span(n, *what, shared=count[n] > 1) for n, what in enumerate(first)]
        return tuple(spans), used


Named = dict[int, Soft]


def parse(text: str, where: str = "template", *, named: Named | None = None) -> Template:
    r"""Read a template. `{{` and `}}` are the characters; blanks and line ends at its end go.

    One blank or several before a piece are its prefix space. `named` holds the soft pieces with a
    `soft_id` that came before, and gets those of this text. Raises RecipeError with line, column
    and a caret for what can't be understood; `where` names the text in it.
    """
    source = Source(text, where)
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise source.error(exc.start, "this is not UTF-8 text") from None
    found: list[Piece] = []
    known: Named = {} if named is None else named
    for start, end, space in _pieces(source):
        if text[start] != "{" or text.startswith("{{", start):
            found.append(Text(_unescaped(text[start:end]), space))
            continue
        piece = braces.read(source, start, end, space=space)
        if isinstance(piece, Soft) and piece.soft_id in known:
            first = known[piece.soft_id]
            if _what(first) != _what(piece):
                hint = f'write {{"soft_id": {piece.soft_id}}} to use its tokens again'
                problem = f"`soft_id` {piece.soft_id} was another piece before"
                raise source.error(start, problem, width=end - start, hint=hint)
            piece = Again(first.soft_id or 0, piece.space)
        elif isinstance(piece, Soft) and piece.soft_id is not None:
            known[piece.soft_id] = piece
        elif isinstance(piece, Again) and piece.soft_id not in known:
            have = ", ".join(map(str, known)) or "none"
            problem = f"no earlier piece has the `soft_id` {piece.soft_id}; there is {have}"
            hint = f'as in: {{"soft": None, "soft_id": {piece.soft_id}}}'
            raise source.error(start, problem, width=end - start, hint=hint)
        found.append(piece)
    return Template(tuple(found), where)


def _what(piece: Soft) -> tuple[str | None, int, bool]:
    return piece.word, piece.duplicate, piece.same


def _pieces(source: Source) -> Iterator[tuple[int, int, bool]]:
    """Yield where each piece of `source` is, and whether a blank is before it."""
    text = source.text
    stop = len(text.rstrip(" \r\n"))
    at = 0
    while True:
        start = at + len(text[at:stop]) - len(text[at:stop].lstrip(" "))
        if start >= stop:
            return
        space = start > at or (start > 0 and text[start - 1] == " ")
        if text[start] == "{" and not text.startswith("{{", start):
            end = braces.end_of(text, start)
            if end is None:
                hint = "close it with }, or write {{ for the character"
                raise source.error(start, "this { is never closed", hint=hint)
            at = end
        else:
            at = _end_of_text(source, start, stop)
            end = start + len(text[start:at].rstrip(" "))
        yield start, end, space


def _end_of_text(source: Source, at: int, stop: int) -> int:
    text = source.text
    while at < stop:
        if text.startswith(("{{", "}}"), at):
            at += 2
        elif text[at] == "{":
            break
        elif text[at] == "}":
            raise source.error(at, "this } closes nothing", hint="write }} for the character")
        else:
            at += 1
    return at


def _unescaped(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")


def to_text(template: Template) -> str:
    """Write a template so that `parse` reads it back equal.

    Raises ValueError for what a chat template put in: the messages have to be kept instead.
    """
    written = []
    for place, piece in enumerate(template.pieces):
        before = template.pieces[place - 1] if place else None
        last = place == len(template.pieces) - 1
        blank = " " if piece.space else ""
        if isinstance(piece, Text) and _bare(piece, before, last):
            written.append(blank + piece.text.replace("{", "{{").replace("}", "}}"))
        else:
            written.append(blank + "{" + ", ".join(_said(piece)) + "}")
    return "".join(written)


def _bare(piece: Text, before: Piece | None, last: bool) -> bool:
    """Tell whether a text can stand without braces."""
    whole = bool(piece.text) and piece.text == piece.text.strip(" ") and not piece.shortenable
    return whole and not isinstance(before, Text) and not (last and piece.text[-1] in "\r\n")


def _said(piece: Piece) -> Iterator[str]:
    """Yield what stands between the braces: the kind, and all options that are not the usual."""
    usual = isinstance(piece, Placeholder)
    match piece:
        case Text():
            yield f'"text": {_quoted(piece.text)}'
        case Placeholder() | Meta():
            kind = "placeholder" if usual else "meta"
            yield f'"{kind}": {_quoted(piece.name)}'
            if piece.post_processing:
                names = ", ".join(map(_quoted, piece.post_processing))
                one = len(piece.post_processing) == 1
                yield f'"post_processing": {names if one else f"[{names}]"}'
        case Mask():
            yield '"mask"'
        case Soft():
            alone = piece.duplicate == 1 and piece.soft_id is None
            value = _quoted(piece.word) if piece.word is not None else "None"
            yield '"soft"' if alone and piece.word is None else f'"soft": {value}'
            if piece.duplicate > 1:
                yield f'"duplicate": {piece.duplicate}'
            if piece.same:
                yield '"same": True'
            if piece.soft_id is not None:
                yield f'"soft_id": {piece.soft_id}'
        case Again():
            yield f'"soft_id": {piece.soft_id}'
        case Special():
            yield f'"special": {_quoted(piece.token)}'
        case Scaffold():
            raise ValueError("a chat template's own text can't be written as a template")
    if isinstance(piece, Text | Placeholder | Meta) and piece.shortenable != usual:
        yield f'"shortenable": {piece.shortenable}'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def read_file(path: Path, choice: int) -> Template:
    """Return template number `choice`, from 0, of a file that has one on each line.

    Raises RecipeError if there is no such line, or it is empty; InputError if the file can't be
    read.
    """
    lines = _lines(path)
    count = f"{path} has {len(lines)} template{'s' * (len(lines) != 1)}"
    if not 0 <= choice < len(lines):
        raise RecipeError(f"there is no choice {choice}: {count}, counted from 0")
    if not lines[choice].strip():
        raise RecipeError(f"{path}:{choice + 1}: the line is empty; {count}, counted from 0")
    return parse(lines[choice], f"{path}:{choice + 1}")


def read_all(path: Path) -> list[Template]:
    """Return all templates of a file that has one on each line; empty lines are passed over.

    Raises RecipeError if there is none, InputError if the file can't be read.
    """
    found = [
        parse(line, f"{path}:{number}")
        for number, line in enumerate(_lines(path), 1)
        if line.strip()
    ]
    if not found:
        raise RecipeError(f"{path} has no template")
    return found


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"{path}: it can't be read as UTF-8 text: {exc}") from None
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return lines
