"""Training that is stopped goes on as if it hadn't been: what is measured, hidden and decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, TrainerCallback

from bmkit.data.batch import Gaps
from bmkit.report import Silent
from bmkit.train.dev import Dev
from bmkit.train.heads import label_loss
from bmkit.train.recipe import Train
from bmkit.train.trainer import Trained, train

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


class StoppedError(Exception):
    """Stands for a kill."""


class Stop(TrainerCallback):  # type: ignore[misc]
    """End the run when an epoch ends at this step, whose checkpoint is written by then."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise StoppedError


def run(work: Path, figures: list[float] | None = None, *, stop: int = 0, **dev: Any) -> Trained:
    """Train a small BERT to fill gaps: three epochs of four steps, a checkpoint each step."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(
        BertConfig(vocab_size=50, num_attention_heads=2, **SIZES)
    )
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 50, (8,), generator=draw).tolist() for _ in range(16)]
    told = iter(figures or [])

    def measure() -> dict[str, float]:
        weight = model.bert.embeddings.word_embeddings.weight
        return {"dev_loss": next(told, float(weight.detach().sum()))}

    return train(
        model,
        [{"input_ids": row, "labels": [0] * len(row)} for row in rows],
        Gaps(0, 4, 50),
        Train(num_train_epochs=3, per_device_train_batch_size=4, save_steps=1, learning_rate=0.01),
        seed=0,
        work=work,
        device=CPU,
        reporter=Silent(),
        loss=label_loss,
        dev=Dev(measure, **dev),
        callbacks=[Stop(stop)],
    )


def test_a_run_that_is_killed_at_the_end_of_an_epoch_has_measured_it(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(tmp_path / "cut", stop=8)
    again = run(tmp_path / "cut")
    assert again.resumed_from == 8
    assert [e["step"] for e in again.history if "dev_loss" in e] == [4, 8, 12]
    assert again.history == whole.history  # with the same gaps in the same rows


def test_gaps_are_others_in_another_epoch_and_the_same_in_the_same_one() -> None:
    rows = [{"input_ids": list(range(5, 45)), "labels": [0] * 40} for _ in range(4)]
    gaps = Gaps(0, 4, 50)

    def hidden(epoch: int) -> torch.Tensor:
        return gaps([{**row, "epoch": [epoch]} for row in rows])["labels"]

    assert torch.equal(hidden(1), hidden(1))
    assert not torch.equal(hidden(1), hidden(2))


def test_a_run_that_had_stopped_early_does_not_go_on(tmp_path: Path) -> None:
    figures = [3.0, 1.0, 2.0, 2.5, 0.5, 0.1]
    how = {"every": 1, "best": "dev_loss", "patience": 2}
    first = run(tmp_path, figures, **how)
    assert (first.steps, first.best_step) == (4, 2)
    again = run(tmp_path, [], **how)
    assert (again.steps, again.best_step) == (4, 2)
    assert again.history == first.history
