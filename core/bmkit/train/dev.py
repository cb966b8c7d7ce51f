"""Measuring while a model is trained: by what its best weights are known, and when to stop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from bmkit import env
from bmkit.report import Reporter
from bmkit.train.learned import load_learned, save_learned


@dataclass(frozen=True)
class Dev:
    """What is measured on rows that aren't trained on, and what follows from it."""

    measure: Callable[[], Mapping[str, float]]
    """Returns figures by name; it leaves random numbers and the model as they are."""
    every: int | None = None
    """Steps between measurements; None: at the end of each epoch."""
    best: str | None = None
    """The figure by which the best weights are kept; None: the last ones are."""
    greater_is_better: bool = False
    patience: int | None = None
    """Measurements without a better one after which training stops."""


class Progress(TrainerCallback):  # type: ignore[misc]
    """Measure, keep the best weights in `work`, and stop where nothing gets better.

    What was measured up to step `start`, from which training goes on, is read again.
    """

    def __init__(self, dev: Dev, model: Any, work: Path, start: int, reporter: Reporter) -> None:
        self.dev, self.model, self.reporter = dev, model, reporter
        self.note, self.weights = work / "dev.json", work / "best.safetensors"
        self.history: list[dict[str, float]] = []
        if start and self.note.is_file():
            known = json.loads(self.note.read_text(encoding="utf-8"))
            self.history = [entry for entry in known if entry["step"] <= start]

    @property
    def _best(self) -> int | None:
        """Return the place in `history` of the best measurement, the first of equals."""
        if self.dev.best is None or not self.history:
            return None
        sign = -1 if self.dev.greater_is_better else 1
        values = [sign * entry[self.dev.best] for entry in self.history]
        return values.index(min(values))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure, if it is time to: before a checkpoint of this step is written."""
        if self.dev.every is None:
            whole = abs(state.epoch - round(state.epoch)) < 1e-6
            due = whole or state.global_step == state.max_steps
        else:
            due = state.global_step % self.dev.every == 0
        if due:
            self._measure(state, control)

    def _measure(self, state: Any, control: Any) -> None:
        step = state.global_step
        if self.history and self.history[-1]["step"] == step:
            return  # a stopped run had measured it
        training = self.model.training
        self.model.eval()
        found = dict(self.dev.measure())
        self.model.train(training)
        self.history.append({"step": float(step), "epoch": float(state.epoch), **found})
        said = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.reporter.info(f"step {step}: {said}")
        best = self._best
        if best == len(self.history) - 1 and state.is_world_process_zero:
            self.weights.parent.mkdir(parents=True, exist_ok=True)
            save_learned(self.model, self.weights)
        if state.is_world_process_zero:
            scratch = self.note.with_suffix(".partial")
            scratch.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(self.history), encoding="utf-8")
            scratch.replace(self.note)
        if self.out_of_patience:
            self.reporter.info(f"nothing better in {self.dev.patience} measurements: it stops")
            control.should_training_stop = True

    @property
    def out_of_patience(self) -> bool:
        """Tell whether training has stopped, because nothing got better for too long."""
        best = self._best
        if best is None or self.dev.patience is None:
            return False
        return len(self.history) - 1 - best >= self.dev.patience

    def take_best(self) -> int | None:
        """Put the best weights into the model; return their step, None if the last ones stay."""
        best = self._best
        if best is None:
            return None
        if env.process()[0]:
            return int(self.history[best]["step"])  # the first process keeps the weights
        load_learned(self.model, self.weights)
        return int(self.history[best]["step"])
