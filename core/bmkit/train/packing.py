"""Rows packed into sequences, so that few tokens are padding, and no row sees another."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bmkit.data.chat import IGNORED, Example
from bmkit.train import head as heads

Way = Literal["positions", "mask"]
"""How a model is told which tokens are of one row: by positions that start again, or by a mask."""


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Return `examples` put together, each result at most `max_length` tokens unless one row is.

    The longest go first, each into the fullest sequence that has room for it. A result has
    `position_ids`, which start again with each row; a row's first token bears no loss.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # by the tokens that are left
    for i in order:
        tokens = len(examples[i]["input_ids"])
        left = next((n for n in range(tokens, max_length + 1) if with_room.get(n)), None)
        if left is None:
            bins.append([])
            chosen, left = len(bins) - 1, max(max_length, tokens)
        else:
            chosen = with_room[left].pop()
        bins[chosen].append(i)
        with_room.setdefault(left - tokens, []).append(chosen)
    return [_together([examples[i] for i in sorted(rows)]) for rows in bins]


def _together(rows: Sequence[Example]) -> Example:
    found: Example = {
        "input_ids": [t for row in rows for t in row["input_ids"]],
        "labels": [t for row in rows for t in (IGNORED, *row["labels"][1:])],
        "position_ids": [p for row in rows for p in range(len(row["input_ids"]))],
    }
    if "weights" in rows[0]:
        found["weights"] = [w for row in rows for w in row["weights"]]
    return found


@dataclass(frozen=True)
class Packing:
    """A collator of packed rows: pads on the right, as a row of its own."""

    pad_token_id: int
    way: Way = "positions"

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return `input_ids`, `position_ids`, `labels`, and `weights` if there are [batch, time].

        By a mask, also `attention_mask` [batch, 1, time, time], True where a token sees another.
        """
        longest = max(len(e["input_ids"]) for e in examples)
        rows: dict[str, list[list[Any]]] = {"input_ids": [], "position_ids": [], "labels": []}
        rows |= {"weights": []} if "weights" in examples[0] else {}
        for e in examples:
            gap = longest - len(e["input_ids"])
            rows["input_ids"].append(e["input_ids"] + [self.pad_token_id] * gap)
            rows["position_ids"].append(e["position_ids"] + list(range(gap)))
            rows["labels"].append(e["labels"] + [IGNORED] * gap)
            if "weights" in rows:
                rows["weights"].append(e["weights"] + [0.0] * gap)
        batch = {name: torch.tensor(values) for name, values in rows.items()}
        if self.way == "mask":
            batch["attention_mask"] = block_diagonal(batch["position_ids"])
        return batch


def block_diagonal(position_ids: Tensor) -> Tensor:
    """Return which tokens see which [batch, 1, time, time]: those before them in the same row."""
    row = (position_ids == 0).cumsum(-1)  # [batch, time]
    causal = torch.ones(row.shape[1], row.shape[1], dtype=torch.bool, device=row.device).tril()
    return ((row[:, :, None] == row[:, None, :]) & causal)[:, None]


def way(model: Any) -> Way | None:
    """Return how `model` keeps packed rows apart, or None if it doesn't.

    Two rows are run through it, packed and by themselves, and must come out the same.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    if core.config.is_encoder_decoder or heads.prompted(model):
        return None
    if "position_ids" not in inspect.signature(core.forward).parameters:
        return None  # rows couldn't start again
    config = core.config.get_text_config()
    windows = bool(getattr(config, "sliding_window", None))  # which a mask for all blocks ignores
    ways: tuple[Way, ...] = ("positions",) if windows else ("positions", "mask")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return next((one for one in ways if _apart(model, config.vocab_size, one)), None)
    finally:
        for module, training in modes:
            module.training = training


def packable(model: Any) -> str | None:
    """Return why rows can't be packed for `model`, or None if they can."""
    if way(model) is None:
        return f"{type(model).__name__} doesn't keep packed rows apart"
    return None


LENGTHS = (7, 24, 9)
"""Tokens of the rows that are run through a model to look at it."""


@torch.no_grad()
def _apart(model: Any, vocabulary: int, way: Way) -> bool:
    ids = [[(3 * n + 5 * i) % vocabulary for i in range(n)] for n in LENGTHS]
    rows: list[Example] = [{"input_ids": row, "labels": row} for row in ids]
    batch = Packing(0, way)(pack(rows, sum(LENGTHS)))
    del batch["labels"]
    given = {name: value.to(model.device) for name, value in batch.items()}
    try:
        packed = model(**given, use_cache=False).logits[0]
    except (RuntimeError, ValueError):
        return False  # it takes no such mask
    alone = [
        model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0]
        for row in ids
    ]
    wanted = torch.cat(alone)
    near = 1e-4 if wanted.dtype == torch.float32 else 0.05
    return torch.allclose(packed, wanted, rtol=near, atol=near * float(wanted.abs().max()))
