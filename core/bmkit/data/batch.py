"""Examples of different lengths -> one padded batch, for each kind of task."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bmkit.data.chat import IGNORED, Example


@dataclass(frozen=True)
class Padding:
    """A collator: pad on the right to the longest example of the batch."""

    pad_token_id: int
    keep: tuple[str, ...] = ()
    """What examples have beside tokens and labels that goes into the batch, padded with 0."""
    multiple: int = 1
    """The time is a multiple of it: of few shapes, libraries know the products already."""
    most: int | None = None
    """But it isn't made longer than that."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask`, `labels` and `keep`, each [batch, time]."""
        longest = max(len(e["input_ids"]) for e in examples)
        whole = -(-longest // self.multiple) * self.multiple
        longest = max(longest, whole if self.most is None else min(whole, self.most))
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for e in examples:
            gap = longest - len(e["input_ids"])
            rows["input_ids"].append(e["input_ids"] + [self.pad_token_id] * gap)
            rows["attention_mask"].append([1] * len(e["input_ids"]) + [0] * gap)
            rows["labels"].append(e["labels"] + [IGNORED] * gap)
        batch = {name: torch.tensor(values) for name, values in rows.items()}
        return batch | {
            name: _padded([e[name] for e in examples], 0, longest) for name in self.keep
        }


@dataclass(frozen=True)
class Labelled:
    """A collator of texts with a label, how likely each label is, or a label for each token."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return what the tokenizer gave [batch, time], and `labels`.

        These are [batch] or [batch, time]. Where rows say how likely labels are, there are also
        `probabilities` [batch, classes], and the likeliest are the labels.
        """
        told = ("label", "labels", "probabilities")
        names = [name for name in examples[0] if name not in told]
        fill = {"input_ids": self.pad_token_id}
        batch = {name: _padded([e[name] for e in examples], fill.get(name, 0)) for name in names}
        if "attention_mask" not in batch:
            batch["attention_mask"] = _padded([[1] * len(e["input_ids"]) for e in examples], 0)
        if "label" in examples[0]:
            batch["labels"] = torch.tensor([e["label"][0] for e in examples])
        elif "probabilities" in examples[0]:
            batch["probabilities"] = torch.tensor([e["probabilities"] for e in examples])
            batch["labels"] = batch["probabilities"].argmax(-1)
        else:
            batch["labels"] = _padded([e["labels"] for e in examples], IGNORED)
        return batch


@dataclass(frozen=True)
class Halves:
    """A collator for encoder-decoders: the decoder reads its labels one place late."""

    pad_token_id: int
    start_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask`, `decoder_input_ids` and `labels` [batch, time]."""
        late = [[self.start_token_id, *e["labels"][:-1]] for e in examples]
        return {
            "input_ids": _padded([e["input_ids"] for e in examples], self.pad_token_id),
            "attention_mask": _padded([[1] * len(e["input_ids"]) for e in examples], 0),
            "decoder_input_ids": _padded(late, self.pad_token_id),
            "labels": _padded([e["labels"] for e in examples], IGNORED),
        }


@dataclass(frozen=True)
class Gaps:
    """A collator that hides tokens, to be found again (BERT, arXiv 1810.04805).

    Of the places that may be, a share is asked for, in each row one at least: eight of ten are the
    mask token, one is any token, one stays. Which these are is decided by `seed`, the tokens, and
    the `epoch` of the examples, if they have one.
    """

    pad_token_id: int
    mask_token_id: int
    vocabulary: int
    share: float = 0.15
    seed: int = 0
    epochs: ClassVar = True
    """Whether examples are to say in which epoch they are read."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` [batch, time]."""
        epoch = examples[0].get("epoch", [0])[0]
        content = repr((self.seed, epoch, [e["input_ids"] for e in examples]))
        draw = torch.Generator().manual_seed(zlib.crc32(content.encode()))  # it takes 32 bits
        ids = _padded([e["input_ids"] for e in examples], self.pad_token_id)
        may = _padded([e["labels"] for e in examples], IGNORED) != IGNORED
        chance = torch.rand(ids.shape, generator=draw).masked_fill(~may, 2.0)
        hidden = chance < self.share
        hidden |= (chance == chance.min(1, keepdim=True).values) & may
        labels = ids.masked_fill(~hidden, IGNORED)
        how = torch.rand(ids.shape, generator=draw)
        other = torch.randint(self.vocabulary, ids.shape, generator=draw)
        shown = torch.where(how < 0.8, self.mask_token_id, torch.where(how < 0.9, other, ids))
        return {
            "input_ids": torch.where(hidden, shown, ids),
            "attention_mask": _padded([[1] * len(e["input_ids"]) for e in examples], 0),
            "labels": labels,
        }


def _padded(values: Sequence[Sequence[float]], fill: int, least: int = 0) -> Tensor:
    longest = max(least, *(len(row) for row in values))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in values])
