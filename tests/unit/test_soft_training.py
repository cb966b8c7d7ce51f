"""Trained tokens in bmkit's trainer: resumed runs, and states that may not be kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import TrainerCallback

from bmkit.data.batch import Padding
from bmkit.deltas import compose, soft_rows
from bmkit.prompting.encode import SoftRow
from bmkit.report import Silent
from bmkit.train.frozen import cacheable
from bmkit.train.recipe import Train
from bmkit.train.trainer import train
from bmkit.verbalizers import likelihood

Build = Callable[..., Any]
ROWS = [SoftRow(0, 7, "it", False), SoftRow(1, None, None, True)]


class StoppedError(Exception):
    """Stands for a kill."""


class Stop(TrainerCallback):  # type: ignore[misc]
    """End the run while the checkpoint of this step is written: that before it counts."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise StoppedError


def learn(model: Any, work: Path, *, stop: int = 0) -> Any:
    """Train on texts that begin with both rows, the second one twice."""
    texts = [[8, 9, 8, 9 + number % 2] for number in range(8)]
    return train(
        model,
        [{"input_ids": [40, 41, 41, *t], "labels": [-100] * 3 + t} for t in texts],
        Padding(0),
        Train(max_steps=6, per_device_train_batch_size=2, save_steps=1, learning_rate=0.3),
        seed=0,
        work=work,
        device=torch.device("cpu"),
        reporter=Silent(),
        callbacks=[Stop(stop)],
    )


def made(architecture: Build, *, way: Any = "none", lora: bool = False) -> Any:
    model = architecture("llama", real=True).requires_grad_(False)
    if lora:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])
        model = compose.attach(model, {"lora": config})
    soft_rows.add(model, ROWS, way=way)
    return model


@pytest.mark.parametrize(("way", "lora"), [("none", False), ("lstm", True)])
def test_rows_learn_and_a_run_that_is_killed_goes_on(
    architecture: Build, tmp_path: Path, way: Any, lora: bool
) -> None:
    whole = made(architecture, way=way, lora=lora)
    frozen = {n: p.clone() for n, p in whole.named_parameters() if not p.requires_grad}
    told = learn(whole, tmp_path / "whole")
    assert min(told.losses[3:]) < min(told.losses[:2])
    left = dict(whole.named_parameters())
    assert all(torch.equal(left[n], p) for n, p in frozen.items())
    with pytest.raises(StoppedError):
        learn(made(architecture, way=way, lora=lora), tmp_path / "cut", stop=3)
    again = made(architecture, way=way, lora=lora)
    assert learn(again, tmp_path / "cut").resumed_from == 2
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, left[name])


def test_states_of_frozen_blocks_are_not_kept_while_rows_are_trained(architecture: Build) -> None:
    model = made(architecture, lora=True)
    assert cacheable(model) is not None
    soft_rows.detach(model)
    assert cacheable(model) is None


def test_trained_tokens_in_a_prompt_are_read_when_words_are_scored(architecture: Build) -> None:
    model = made(architecture, lora=True)
    said, behind = [[5, 6], [5, 7, 8], [9]], [[41, 10]]
    with torch.no_grad():
        soft_rows.require(model).values[1] = model.model.embed_tokens.weight[11]
        found = likelihood.causal(model, [[3, 40, 4]], said, behind)
        words = likelihood.causal(model, [[3, 7, 4]], said, [[11, 10]])
    assert torch.allclose(found.words, words.words, atol=1e-6)
    assert found.behind_tokens.tolist() == [[1, 1, 1]] and words.behind_tokens.tolist() == [[2] * 3]
