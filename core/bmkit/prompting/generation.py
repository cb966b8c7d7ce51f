"""The generation verbalizer: labels as texts to say, made from each row by rules.

A rule is a template of `{"meta": "choice1"}`, `{"placeholder": "text_a"}`, `{"text": "…"}` and
words. A label has one rule for each mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bmkit.data.tabular import Record
from bmkit.errors import InputError, RecipeError, did_you_mean
from bmkit.prompting import template
from bmkit.prompting.encode import Encoded
from bmkit.prompting.pieces import Meta, Placeholder, Text
from bmkit.prompting.template import Template
from bmkit.prompting.wrap import show, wrap

Rule = Template
Rules = tuple[tuple[Rule, ...], ...]
"""By label, one for each mask."""


@dataclass(frozen=True)
class Choosing(Encoded):
    """A prompt whose row has texts of its own for the labels."""

    texts: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """By label and mask, in tokens."""


def parse_rule(text: str, where: str = "label words") -> Rule:
    """Return a rule. Raises RecipeError naming the position of what is wrong."""
    found = template.parse(text, where)
    for piece in found.pieces:
        if not isinstance(piece, Text | Placeholder | Meta):
            raise RecipeError(
                f"{where}: `{text}`: `{type(piece).__name__.lower()}` is no piece of a target",
                hint="it takes meta, placeholder and text",
            )
    return found


def parse_rules(
    spec: Mapping[str, str | Sequence[str]], labels: Sequence[str], masks: int | None = None
) -> Rules:
    """Return the rules of each label, in the order of `labels`: one for each mask.

    Raises RecipeError for a label without rules, and for more or fewer than `masks`, or than the
    first label has.
    """
    rules: list[tuple[Rule, ...]] = []
    for label in labels:
        if label not in spec:
            close = did_you_mean(label, spec, otherwise="each label takes one for each mask")
            raise RecipeError(f"label words: `{label}` has none", hint=close)
        own = spec[label]
        texts = [own] if isinstance(own, str) else list(own)
        masks = masks or len(texts)
        if len(texts) != masks:
            raise RecipeError(
                f"label words: `{label}` has {len(texts)} texts for {masks} masks",
                hint="it takes a list with one for each mask of the template",
            )
        rules.append(tuple(parse_rule(text) for text in texts))
    return tuple(rules)


def targets(rules: Sequence[Rule], record: Record) -> list[str]:
    """Return what is to be said at each mask for one label and one row.

    A meta is looked for in the row's `meta` first, if it has one. Raises InputError naming the row
    and what it lacks, or has empty.
    """
    found = []
    for rule in rules:
        try:
            text = show(wrap(rule, record.values, record.line)).strip()
        except InputError as exc:
            raise InputError(f"{record.where}: a label's text: {exc}", hint=exc.hint) from None
        if not text:
            raise InputError(f"{record.where}: a label's text is empty")
        found.append(text)
    return found


def choices(rules: Sequence[Sequence[Rule]], record: Record) -> list[list[str]]:
    """Return what would be said at each mask for each label, for scoring one row."""
    return [targets(own, record) for own in rules]
