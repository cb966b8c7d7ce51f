"""Dialogues in slices as an objective: what is read, what is measured, what is left of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmkit.data.chat import Encoded
from bmkit.data.slices import stored
from bmkit.data.slices.examples import Form
from bmkit.data.slices.stored import Stored
from bmkit.data.slices.tokens import Marked, mark
from bmkit.errors import RecipeError
from bmkit.train.decisions import calibrate, decide, figures
from bmkit.tune.recipe import TuneRecipe

PER_TAG = "dev_right_"


def marked(recipe: TuneRecipe, checkpoint: Path, tokenizer: Any) -> Marked:
    """Return the recipe's marks as tokens, which `tokenizer` gets where it has none.

    A checkpoint that was trained with the scheme keeps the tokens that it has. Raises RecipeError
    for a scheme that has no place in the tokenizer.
    """
    scheme, known = recipe.scheme, stored.read(checkpoint)
    if known is not None and known.scheme == scheme.name and scheme.tokens == "auto":
        return Marked(known.layout)
    return mark(tokenizer, scheme.name, scheme.tokens)


def form(recipe: TuneRecipe, marks: Marked) -> Form:
    """Return how the recipe's dialogues become tokens."""
    return Form(
        marks.layout,
        recipe.slice.agent_tokens,
        recipe.slice.collapse_idle,
        recipe.weights.decision,
        recipe.weights.text,
        recipe.weights.end,
    )


def measured(
    model: Any, batches: Sequence[Mapping[str, Tensor]], device: torch.device, *, marks: Marked
) -> dict[str, float]:
    """Return the figures of a model's decisions on held-out dialogues, each by its own choice."""
    decided = decide(model, batches, marks.layout.silent, device)
    found = {f"dev_{name}": value for name, value in figures(decided).items()}
    return {"dev_loss": decided.loss, **found}


def mixed(encoded: Encoded, others: Encoded, share: float, seed: int) -> Encoded:
    """Return dialogues with other rows beside them, which are `share` of all rows.

    Too many of those are drawn from, too few are repeated.
    """
    wanted = round(share / (1 - share) * len(encoded.examples))
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(len(others.examples), generator=draw).tolist()
    beside = [others.examples[i] for i in order[:wanted]]
    return replace(encoded, examples=[*encoded.examples, *beside])


def finish(
    recipe: TuneRecipe,
    marks: Marked,
    model: Any,
    batches: Sequence[Mapping[str, Tensor]],
    device: torch.device,
) -> tuple[Stored, dict[str, float]]:
    """Return what is to be known of the trained model, and what its threshold gives.

    The threshold is calibrated on the held-out dialogues, where the recipe doesn't say one.
    """
    asked = recipe.slice.threshold
    threshold = asked if isinstance(asked, float) else None
    found: dict[str, float] = {}
    if batches and asked != "argmax":
        decided = decide(model.eval(), batches, marks.layout.silent, device)
        if asked == "calibrate":
            threshold = calibrate(decided)
        if threshold is not None:
            names = ("idle_f1", "false_takeover", "takeover")
            by = figures(decided, threshold)
            found = {f"dev_{n}_by_threshold": round(by[n], 6) for n in names if n in by}
    if threshold is not None:
        found["threshold"] = threshold
    known = Stored(
        recipe.scheme.name,
        marks.layout,
        recipe.slice.period_ms,
        recipe.slice.agent_tokens,
        recipe.slice.collapse_idle,
        threshold,
    )
    return known, found


@torch.no_grad()
def grow(model: Any, marks: Marked, tokenizer: Any) -> None:
    """Give `model` rows for the tokens that its tokenizer got, each the mean of those there.

    Raises RecipeError for a model whose output bias would have to grow as well.
    """
    if not marks.added:
        return
    before = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= before:
        return  # the embedding has rows to spare
    head = model.get_output_embeddings()
    if head is None:
        raise RecipeError("scheme.tokens: the model has no output head that could grow")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = module.weight
        rows[before:] = rows[:before].float().mean(0).to(rows.dtype)
        bias = getattr(module, "bias", None)
        if bias is not None:
            bias[before:] = bias[:before].float().mean().to(bias.dtype)
