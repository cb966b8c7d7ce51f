"""Dialogues in slices as an objective: what is read, what is measured, what is left of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmkit.data.chat import Encoded, Example
from bmkit.data.slices import stored
from bmkit.data.slices.examples import Form
from bmkit.data.slices.layout import Layout
from bmkit.data.slices.stored import Stored
from bmkit.data.slices.tokens import Marked, mark
from bmkit.errors import RecipeError
from bmkit.train.decisions import Decided, calibrate, decide, figures
from bmkit.tune.recipe import DECISIONS, TuneRecipe


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


@dataclass
class Measured:
    """Figures of a model's decisions on held-out dialogues, each by its likeliest token."""

    silent: Sequence[int]
    """The tokens of silence."""
    last: Decided | None = None
    """What was decided the last time."""

    def __call__(
        self, model: Any, batches: Sequence[Mapping[str, Tensor]], device: torch.device
    ) -> dict[str, float]:
        """Return `dev_loss` and the others."""
        self.last = decide(model, batches, self.silent, device)
        found = {f"dev_{name}": value for name, value in figures(self.last).items()}
        return {"dev_loss": self.last.loss, **found}


def mixed(encoded: Encoded, others: Sequence[Example], share: float, seed: int) -> Encoded:
    """Return dialogues with other rows beside them, which are `share` of all rows.

    Too many of those are drawn from, too few are repeated.
    """
    wanted = round(share / (1 - share) * len(encoded.examples))
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(len(others), generator=draw).tolist()
    beside = [others[i] for i in order[:wanted]]
    return replace(encoded, examples=[*encoded.examples, *beside])


def finish(
    recipe: TuneRecipe, layout: Layout, decided: Decided | None
) -> tuple[Stored, dict[str, float]]:
    """Return what is to be known of the trained model, and what its threshold gives.

    The threshold is calibrated on what was `decided` on held-out dialogues, where the recipe
    doesn't say one.
    """
    asked = recipe.slice.threshold
    threshold = asked if isinstance(asked, float) else None
    if asked == "calibrate" and decided is not None:
        threshold = calibrate(decided)
    found: dict[str, float] = {}
    if threshold is not None:
        found["threshold"] = threshold
        by = figures(decided, threshold) if decided is not None else {}
        found |= {f"dev_{n}_by_threshold": round(by[n], 6) for n in DECISIONS if n in by}
    known = Stored(
        recipe.scheme.name,
        layout,
        recipe.slice.period_ms,
        recipe.slice.agent_tokens,
        recipe.slice.collapse_idle,
        threshold,
    )
    return known, found


@torch.no_grad()
def grow(model: Any, marks: Marked, tokenizer: Any, *, seed: int = 0) -> None:
    """Let the rows of new marks begin: drawn as the others are spread, which learns quickest.

    `model` gets rows for tokens that the tokenizer got. Raises RecipeError for a model without an
    output head.
    """
    before = model.get_input_embeddings().weight.shape[0]
    size = len(tokenizer) if marks.added else 0
    if model.get_output_embeddings() is None:
        raise RecipeError("scheme.tokens: the model has no output head for its marks")
    if size > before:  # the embedding may have rows to spare
        model.resize_token_embeddings(size, mean_resizing=False)
    added = [int(tokenizer.convert_tokens_to_ids(token)) for token in marks.added]
    new = sorted({*added, *marks.spared})
    if not new:
        return
    draw = torch.Generator().manual_seed(seed)
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    for rows in {id(m.weight): m.weight for m in (inputs, head)}.values():
        known = rows[:before].float()
        noise = torch.randn((len(new), rows.shape[1]), generator=draw).to(known.device)
        rows[new] = (known.mean(0) + noise * known.std(0)).to(rows.dtype)
