"""Dialogues in slices -> token ids, labels, the weights of their loss, and where it is decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmkit.data.chat import IGNORED, Encoded, Example
from bmkit.data.slices import dialogue
from bmkit.data.slices.dialogue import TAGS
from bmkit.data.slices.layout import Layout, Pair, Rendered, collapsed, refilled, rendered
from bmkit.data.slices.tokens import pairs_of
from bmkit.errors import InputError


@dataclass(frozen=True)
class Form:
    """How dialogues become tokens: as a session that runs has them."""

    layout: Layout
    agent_tokens: int = 10
    """What the agent says in a slice."""
    collapse_idle: bool = True
    """Whether silence takes one pair, however long it is."""
    decision: float = 1.0
    """The weight of the loss at an agent's first token, at the others, and at the end."""
    text: float = 1.0
    end: float = 1.0


def encode_dialogues(path: Path, tokenizer: Any, form: Form, *, max_length: int) -> Encoded:
    """Tokenise a file of dialogues. Loss falls on the agent's side.

    An example has `weights` of the loss and `decisions` beside `labels`, each a number a token. A
    dialogue longer than `max_length` tokens ends with the last pair that fits; one whose first pair
    doesn't, or that has nothing to learn, is dropped. Raises InputError naming the file and line.
    """
    examples: list[Example] = []
    truncated = dropped = 0
    for said in dialogue.read(path):
        pairs = refilled(pairs_of(tokenizer, said, form.layout), form.agent_tokens)
        if form.collapse_idle:
            pairs = list(collapsed(pairs))
        example, whole = example_of(form, pairs, max_length=max_length)
        truncated += not whole
        if example is None:
            dropped += 1
        else:
            examples.append(example)
    if not examples:
        raise InputError(
            f"{path}: no dialogue has anything to learn within {max_length} tokens",
            hint="raise data.max_length, or look at the rows",
        )
    return Encoded(examples, truncated, dropped)


def example_of(
    form: Form, pairs: Sequence[Pair], *, max_length: int
) -> tuple[Example | None, bool]:
    """Return pairs as an example, None if there is nothing to learn, and whether all of them fit.

    A label without weight is none.
    """
    made = rendered(form.layout, pairs)
    starts = [*made.starts, len(made.ids)]
    fit = max((n for n, at in enumerate(starts) if at <= max_length), default=0)
    size = starts[fit] if fit else 0
    weights = _weights(form, made, starts)[:size]
    labels = [i if w else IGNORED for i, w in zip(made.ids, weights, strict=False)]
    if labels:
        labels[0] = IGNORED  # the first token is predicted from nothing
    if all(label == IGNORED for label in labels):
        return None, fit == len(pairs)
    decisions = [0] * size
    for one in made.decisions[:fit]:
        if one.tag is not None and weights[one.position]:
            decisions[one.position] = code(one.speaks, TAGS.index(one.tag))
    example: Example = {
        "input_ids": made.ids[:size],
        "labels": labels,
        "weights": weights,
        "decisions": decisions,
    }
    return example, fit == len(pairs)


def _weights(form: Form, made: Rendered, starts: Sequence[int]) -> list[float]:
    weights = [w * form.text for w in made.learned]
    for one, after in zip(made.decisions, starts[1:], strict=True):
        weights[one.position] = made.learned[one.position] * form.decision
        weights[after - 1] = made.learned[after - 1] * form.end
    return weights


def code(speaks: bool, tag: int) -> int:
    """Return a decision as a number above 0: what is right, and the number of its tag."""
    return 1 + 2 * tag + speaks


def decoded(number: int) -> tuple[bool, int]:
    """Return whether it is right to speak, and the number of the tag."""
    return bool((number - 1) % 2), (number - 1) // 2


def weighed(encoded: Encoded) -> Encoded:
    """Return rows of another form with the weights that dialogues have: 1 at each label."""
    examples: list[Example] = [
        {**e, "weights": [float(label != IGNORED) for label in e["labels"]]}
        for e in encoded.examples
    ]
    return Encoded(examples, encoded.truncated, encoded.dropped)
