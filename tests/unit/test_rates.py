"""Learning rates that some modules have of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bmkit.report import Silent
from bmkit.train.rates import apart
from bmkit.train.recipe import Train
from bmkit.train.trainer import train


class Two(nn.Module):
    """A model of two numbers, both of which want to grow."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Linear(1, 1, bias=False)
        self.fast = nn.Linear(1, 1, bias=False)
        self.device = torch.device("cpu")

    def forward(self) -> torch.Tensor:
        return -(self.slow.weight.sum() + self.fast.weight.sum())


def test_a_module_moves_by_its_own_rate_and_the_others_by_theirs(tmp_path: Path) -> None:
    model = Two()
    before = {name: float(p.detach()) for name, p in model.named_parameters()}
    train(
        model,
        [{"input_ids": [0], "labels": [0]}] * 4,
        lambda rows: {"labels": torch.zeros(len(rows), dtype=torch.long)},
        Train(
            max_steps=3,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            warmup_steps=0,
            gradient_checkpointing=False,
        ),
        seed=0,
        work=tmp_path,
        device=torch.device("cpu"),
        reporter=Silent(),
        loss=lambda m, batch: (m() * len(batch["labels"]), len(batch["labels"])),
        replay=False,
        rates=[(model.fast, 0.5)],
    )
    moved = {n: float(p.detach()) - before[n] for n, p in model.named_parameters()}
    # AdamW moves by its rate where the gradient stays the same
    assert abs(moved["slow.weight"] - 0.03) < 1e-4
    assert abs(moved["fast.weight"] - 1.5) < 1e-3


def test_an_optimizer_without_rates_stays_as_it_is() -> None:
    model = Two()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert apart(optimizer, ()) is optimizer
    assert len(optimizer.param_groups) == 1
