"""Forms: templates with gaps, in which a model with sentinels writes (LM-BFF, arXiv 2012.15723)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bmkit.errors import RecipeError
from bmkit.prompting import template as language
from bmkit.prompting.encode import Kind
from bmkit.prompting.pieces import Mask, Piece, Placeholder, Special, Text
from bmkit.prompting.template import Template

_SENTINEL = re.compile(r"<extra_id_(\d+)>")


@dataclass(frozen=True)
class Said:
    """What was written into a gap; `space`: a blank is before it."""

    text: str
    space: bool = True


@dataclass(frozen=True)
class Form:
    """A template of one mask with gaps: pieces `{"special": "<extra_id_0>"}`, `…_1>` and so on."""

    template: Template
    gaps: tuple[int, ...]
    """The places of the gaps among the pieces."""

    def with_word(self, word: str) -> Template:
        """Return the template with a label's word at the mask, for the gaps to be written."""
        return self._with(
            Text(word, piece.space) if isinstance(piece, Mask) else piece
            for piece in self.template.pieces
        )

    def filled(self, said: Sequence[Said]) -> Template:
        """Return the template with texts in its gaps; where one is empty, nothing stands."""
        own = dict(zip(self.gaps, said, strict=True))
        kept: list[Piece] = []
        for place, piece in enumerate(self.template.pieces):
            if place not in own:
                kept.append(piece)
            elif text := own[place].text.strip():
                kept.append(Text(text, own[place].space and piece.space))
        if kept:
            kept[0] = replace(kept[0], space=False)
        return self._with(kept)

    def bare(self) -> str:
        """Return the template with nothing in its gaps, in the mini-language."""
        return language.to_text(self.filled([Said("")] * len(self.gaps)))

    def _with(self, pieces: object) -> Template:
        return Template(tuple(pieces), self.template.where)  # type: ignore[arg-type]


def parse(text: str, where: str = "form") -> Form:
    """Read a form. Raises RecipeError if it hasn't one mask, and gaps that count from 0."""
    found = language.parse(text, where).require_mask()
    if found.masks > 1:
        raise RecipeError(f"{where}: it has {found.masks} masks", hint="leave one mask")
    return _form(found)


def usual(template: Template, kind: Kind) -> list[Form]:
    """Return the forms for the rows' texts of a template.

    One text is before the mask, or behind it; of two, the second is behind. A causal model reads
    nothing behind the mask: there, all texts and one gap are before it. Raises RecipeError for a
    template without texts of rows.
    """
    texts = [piece for piece in template.pieces if isinstance(piece, Placeholder)]
    texts = list({piece.name: piece for piece in texts}.values())
    if not texts:
        raise RecipeError(
            f"{template.where}: it has no placeholder to write templates around",
            hint="say search.forms",
        )
    first, second = (Special(f"<extra_id_{number}>", space=True) for number in (0, 1))
    mask = Mask(space=True)
    rows: list[list[Piece]]
    if kind == "causal":
        rows = [[*texts, first, mask]]
    elif len(texts) == 1:
        rows = [[*texts, first, mask, second], [first, mask, second, *texts]]
    else:
        rows = [[texts[0], first, mask, second, *texts[1:]]]
    return [_form(Template(tuple(_spaced(row)), template.where)) for row in rows]


def _spaced(pieces: Sequence[Piece]) -> list[Piece]:
    return [replace(piece, space=place > 0) for place, piece in enumerate(pieces)]


def _form(template: Template) -> Form:
    gaps, numbers = [], []
    for place, piece in enumerate(template.pieces):
        if isinstance(piece, Special) and (found := _SENTINEL.fullmatch(piece.token)):
            gaps.append(place)
            numbers.append(int(found[1]))
    if not gaps or numbers != list(range(len(gaps))):
        raise RecipeError(
            f"{template.where}: its gaps are {numbers or 'none'}, and they count from 0 in order",
            hint='a gap is {"special": "<extra_id_0>"}, the next one {"special": "<extra_id_1>"}',
        )
    return Form(template, tuple(gaps))
