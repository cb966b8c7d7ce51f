"""What encoders say of a text: a label with its probability, or an embedding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bmkit.errors import InputError
from bmkit.nn import products


@dataclass(frozen=True)
class Labelled:
    """One row, and how likely each label is."""

    streamed: ClassVar = False
    """Whether its text was written while it was made."""

    id: Any
    prompt: str
    probabilities: dict[str, float]

    @property
    def label(self) -> str:
        """Return the likeliest label."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    def values(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        rounded = {k: round(v, 6) for k, v in self.probabilities.items()}
        return {
            "id": self.id,
            "prompt": self.prompt,
            "label": self.label,
            "probabilities": rounded,
        }

    def line(self) -> str:
        """Return what is printed as text."""
        return f"{self.label}\t{self.probabilities[self.label]:.4f}"


@dataclass(frozen=True)
class Tagged:
    """One row, and the likeliest tag of each of its words."""

    streamed: ClassVar = False
    """Whether its text was written while it was made."""

    id: Any
    prompt: str
    words: Sequence[str]
    tags: list[str]
    probabilities: list[float]

    def values(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "tokens": list(self.words),
            "tags": self.tags,
            "probabilities": [round(p, 6) for p in self.probabilities],
        }

    def line(self) -> str:
        """Return what is printed as text."""
        return " ".join(f"{word}/{tag}" for word, tag in zip(self.words, self.tags, strict=True))


@dataclass(frozen=True)
class Embedded:
    """One row as a vector."""

    streamed: ClassVar = False
    """Whether its text was written while it was made."""

    id: Any
    prompt: str
    embedding: list[float]

    def values(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {"id": self.id, "prompt": self.prompt, "embedding": self.embedding}

    def line(self) -> str:
        """Return what is printed as text."""
        return json.dumps(self.embedding)


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one: sentence-transformers' files say it, else mean, unit length."""

    mode: str = "mean"
    normalise: bool = True

    @classmethod
    def of(cls, path: Path) -> Pooling:
        """Read `modules.json` and the pooling's own file beside a checkpoint, if they are there."""
        try:
            modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
            kinds = {m["type"].rpartition(".")[2]: m.get("path", "") for m in modules}
            pooling = json.loads((path / kinds["Pooling"] / "config.json").read_text())
        except (OSError, ValueError, KeyError, TypeError):
            return cls()
        mode = "cls" if pooling.get("pooling_mode_cls_token") else "mean"
        if pooling.get("pooling_mode_lasttoken"):
            mode = "last"
        return cls(mode, "Normalize" in kinds)

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return [batch, dim] of `hidden` [batch, time, dim], padding (on the right) left out."""
        if self.mode == "cls":
            found = hidden[:, 0]
        elif self.mode == "last":
            found = hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
        else:
            weights = mask[..., None].to(hidden.dtype)
            found = (hidden * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(found, dim=-1) if self.normalise else found


def _padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*r, *[fill] * (longest - len(r))] for r in rows], device=device)


@torch.inference_mode()
def encode(
    model: Any,
    rows: Sequence[list[int]],
    pad: int,
    pooling: Pooling | None,
    types: Sequence[Sequence[int] | None] = (),
) -> list[Any]:
    """Return a vector a row of token ids: pooled, or without `pooling` the labels' probabilities.

    They are lists of floats; of a model that labels tokens, of lists of floats, one a token.
    `types` say of pairs of texts which of both a token is in. Raises InputError if the model's
    output is not a number.
    """
    device = model.device
    mask = _padded([[1] * len(r) for r in rows], 0, device)
    given = {"input_ids": _padded(rows, pad, device), "attention_mask": mask}
    if any(types):
        both = [t or [0] * len(r) for t, r in zip(types, rows, strict=True)]
        given["token_type_ids"] = _padded(both, 0, device)
    with products.quick():
        out = model(**given)
    if pooling is not None:
        found = pooling(out.last_hidden_state.float(), mask)
    elif getattr(model.config, "problem_type", None) == "multi_label_classification":
        found = out.logits.float().sigmoid()
    else:
        found = out.logits.float().softmax(-1)
    if not found.isfinite().all():
        raise InputError("the model's output is not a number; its weights are damaged")
    if found.ndim == 3:  # virtual tokens stand in front
        return list(found[:, found.shape[1] - mask.shape[1] :].cpu())
    return [[round(v, 7) for v in row] for row in found.cpu().tolist()]
