"""Texts that a model says behind a prompt: how likely they are, and what it says by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bmkit.data.tabular import Record
from bmkit.deltas import plugged
from bmkit.errors import InputError, RecipeError
from bmkit.model import READ_PADDING
from bmkit.prompt.ask import Asker
from bmkit.prompt.prompts import Prompts
from bmkit.prompting.encode import Encoded, Kind
from bmkit.prompting.labelwords import token_ids
from bmkit.runtime.generate import Answer, Generation, generate, plain_defaults
from bmkit.runtime.stream import visible
from bmkit.verbalizers import likelihood
from bmkit.verbalizers.positions import inner

TARGET = "target"


@dataclass(frozen=True)
class Aimed(Encoded):
    """A prompt with the text that is to be said behind it."""

    target: list[int] = field(default_factory=list)
    """Its tokens, and the one that ends a text if it fits; none where nothing is to be learned."""


@dataclass(frozen=True)
class Writer:
    """What is learned where texts are to be said; as `labels.Verbalizer` for a trainer."""

    module: ClassVar = None

    def ask(
        self, asker: Asker, prompts: Sequence[Encoded], done: Callable[[int], None] | None = None
    ) -> Tensor:
        """Return the cross-entropy of each row's target, the mean by token: [rows, 1]."""
        return asker.each(prompts, lambda part: self._said(asker, part), done)

    def said(self, asker: Asker, prompts: Sequence[Encoded]) -> Tensor:
        """Return the same with gradients, in one batch."""
        return self._said(asker, prompts).float().cpu()

    def _said(self, asker: Asker, prompts: Sequence[Encoded]) -> Tensor:
        targets = [[one.target] for one in prompts if isinstance(one, Aimed)]
        ids = [one.ids for one in prompts]
        if asker.kind == "causal":
            found = likelihood.causal(asker.model, ids, targets, batch_tokens=asker.batch_tokens)
        else:
            starts = [one.decoder_ids for one in prompts]
            found = likelihood.seq2seq(
                asker.model, ids, starts, targets, batch_tokens=asker.batch_tokens
            )
        return -found.means

    def loss(self, said: Tensor, right: Tensor) -> Tensor:
        """Return the summed loss of rows, a number; `right` tells nothing."""
        return said.sum()

    def targets(self, right: Sequence[tuple[int, ...]]) -> Tensor:
        """Return a number for each row, which nobody reads."""
        return torch.zeros(len(right))


def aimed(
    prompts: Prompts, records: Sequence[Record], kind: Kind, most: int, forced: int | None
) -> list[Aimed]:
    """Return rows' prompts with their targets, of `most` tokens at most, where they have one.

    `forced` is the token that a decoder has to begin with besides. Raises RecipeError for a
    template that goes on behind its mask, InputError naming a row that can't be used.
    """
    known = prompts.encoder.tokenizer
    end = [] if known.eos_token_id is None else [known.eos_token_id]
    found = []
    for record, prompt in zip(records, prompts.encode(records), strict=True):
        mask = next(part for part in prompts.wrap(record) if part.role == "mask")
        target: list[int] = []
        if TARGET in record.values:
            own = " " if mask.space and kind == "causal" else ""
            text = texts_of(record)[0]
            target = [*token_ids(known, text, own, opens=kind != "causal"), *end][:most]
        if kind == "causal" and any(role != "added" for role in prompt.roles[len(prompt.ids) :]):
            raise RecipeError(
                "template: it goes on behind its mask, where a text is to be said",
                hint="leave the mask at its end",
            )
        start = prompt.decoder_ids
        if kind == "seq2seq" and not prompts.encoder.sentinels:
            start = [start[0], *([] if forced is None else [forced])]
        plain = replace(prompt, behind=[], roles=prompt.roles[: len(prompt.ids)], decoder_ids=start)
        found.append(Aimed(**vars(plain), target=target))
    return found


def texts_of(record: Record) -> list[str]:
    """Return what a row wants said: a text, or a list of those that are as good.

    Raises InputError naming the row.
    """
    held = record.values.get(TARGET)
    listed = held if isinstance(held, list) else [held]
    found = [one.strip() for one in listed if isinstance(one, str) and one.strip()]
    if not found or len(found) < len(listed):
        there = ", ".join(f"`{name}`" for name in record.values)
        raise InputError(
            f"{record.where}: it has no text as `{TARGET}`",
            hint=f"data.columns says which column it is, of {there}",
        )
    return found


def answers(
    asker: Asker,
    tokenizer: Any,
    prompts: Sequence[Encoded],
    how: Generation,
    size: int,
    *,
    numbers: Sequence[int] | None = None,
    done: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Return what the model says behind each prompt; `size` of like length are asked together.

    What stands in front of a prompt, and models that read padding, want prompts of equal length.
    `numbers` decide the rows' draws. Peak memory: the activations and the cache of one batch.
    """
    model = asker.model
    base = inner(model)
    plain_defaults(base)
    pads = base.config.model_type not in READ_PADDING and plugged.in_front(model) is None
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at].ids))
    groups: dict[Any, list[int]] = {}
    for at in order:
        one = prompts[at]
        groups.setdefault((tuple(one.decoder_ids), None if pads else len(one.ids)), []).append(at)
    found: dict[int, Answer] = {}
    for (start, _), places in groups.items():
        for first in range(0, len(places), size):
            part = places[first : first + size]
            more: dict[str, Any] = {}
            if start:
                ids = torch.tensor([list(start)] * len(part), device=base.device)
                more = {"decoder_input_ids": ids, "decoder_start_token_id": start[0]}
                more["forced_bos_token_id"] = None  # it is among them
            said = generate(
                model,
                tokenizer,
                [prompts[at].ids for at in part],
                how,
                numbers=part if numbers is None else [numbers[at] for at in part],
                more=more,
            )
            for at, answer in zip(part, said, strict=True):
                found[at] = _behind(answer, tokenizer, how, max(len(start) - 1, 0))
            if done is not None:
                done(len(part))
    return [found[at] for at in range(len(prompts))]


def _behind(answer: Answer, tokenizer: Any, how: Generation, count: int) -> Answer:
    """Return an answer without the tokens that its decoder began with."""
    if not count:
        return answer
    ids = answer.token_ids[count:]
    return replace(answer, token_ids=ids, text=visible(ids, tokenizer, how.stop_strings)[0])
