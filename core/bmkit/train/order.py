"""The order in which a trainer reads its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices


class Dated(Dataset[Any]):
    """The rows of a trainer, each with the epoch in which it is read."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.rows = trainer, trainer.train_dataset

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return {**self.rows[place], "epoch": [_epoch(self.trainer)]}


def _epoch(trainer: Trainer) -> int:
    return int((trainer.state.epoch or 0) + 1e-6)  # a share of the next one is done


class Order(Sampler[int]):
    """Rows of like length together, in an order of its own in each epoch."""

    def __init__(self, trainer: Trainer, rows: int) -> None:
        self.trainer, self.rows = trainer, rows
        self.lengths = [len(example["input_ids"]) for example in trainer.train_dataset]

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        seed = self.trainer.args.seed + _epoch(self.trainer)
        draw = torch.Generator().manual_seed(seed)
        return iter(get_length_grouped_indices(self.lengths, self.rows, generator=draw))
