"""Hints: what the layers of a teacher that runs beside its student have to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmkit.compress.options.learning import Attention, Distill, Hidden
from bmkit.errors import InputError, RecipeError
from bmkit.nn import walk
from bmkit.runtime.voice import place
from bmkit.train.states import Pairs, Seen, attention_loss, by_depth, state_loss, watched

PROJECTIONS = "bmkit_projections"
"""The name under which a student holds what is trained with it and not kept."""

Hint = Callable[[dict[str, Tensor]], Tensor]
"""Takes the batch that the student has just read; returns the mean loss of its layers."""


@dataclass(frozen=True)
class Hints:
    """What layers learn of the checkpoint at `teacher`: hidden states, attention, or both.

    (FitNets: Hints for Thin Deep Nets, arXiv 1412.6550.) The teacher's weights stay as they are
    stored, or rounded to `quant`; with `memory` they take so many bytes, and the rest is streamed.
    """

    teacher: Path
    hidden: Hidden | None
    attention: Attention | None
    device: torch.device
    quant: str | None = None
    memory: int | None = None
    seed: int = 0

    @contextmanager
    def for_(self, student: Any) -> Iterator[Hint]:
        """Yield the loss of a student's layers, while the teacher runs beside it.

        Projections are parameters of the student meanwhile. Raises InputError for models that are
        no single stack of blocks or tell no attention, RecipeError for layers that aren't there.
        """
        placed = place(self.teacher, device=self.device, quant=self.quant, memory=self.memory)
        teacher = placed.model
        with ExitStack() as stack:
            stack.callback(placed.close)
            counts = [walk.stack(m)[1] for m in (student, teacher)]
            hidden = _pairs("hidden", self.hidden, *counts)
            attention = _pairs("attention", self.attention, *counts)
            if attention:
                for model in (student, teacher):
                    model.set_attn_implementation("eager")
            pairs = [*hidden, *attention]
            seen = stack.enter_context(_watch(student, {i for i, _ in pairs}))
            told = stack.enter_context(_watch(teacher, {i for _, i in pairs}))
            self._probe(student, teacher, attention, seen, told)
            self._project(student, hidden, seen, told)
            stack.callback(delattr, student, PROJECTIONS)

            def loss(batch: dict[str, Tensor]) -> Tensor:
                _read(teacher, batch["input_ids"], batch["attention_mask"])
                return self._loss(student, hidden, attention, seen, told, batch["attention_mask"])

            yield loss

    def _probe(self, student: Any, teacher: Any, attention: Pairs, seen: Seen, told: Seen) -> None:
        """Let both read two tokens, so that their widths are known, and whether they tell all."""
        ids = torch.tensor([[1, 2]], device=self.device)
        mask = torch.ones_like(ids)
        for model, found, wanted in (
            (student, seen, [i for i, _ in attention]),
            (teacher, told, [i for _, i in attention]),
        ):
            _read(model, ids, mask)
            if any(i not in found.maps for i in wanted):
                raise InputError(
                    f"{type(model).__name__} tells no attention maps", hint="leave out `attention`"
                )

    def _project(self, student: Any, hidden: Pairs, seen: Seen, told: Seen) -> None:
        """Put a matrix behind each state of the student that has another width, or any."""
        draw = torch.Generator().manual_seed(self.seed)
        made = nn.ModuleDict()
        for number, (i, j) in enumerate(hidden):
            own, its = seen.states[i].shape[-1], told.states[j].shape[-1]
            assert self.hidden is not None  # there are pairs
            if own == its and self.hidden.projection == "auto":
                continue
            matrix = nn.Linear(own, its, bias=False)
            with torch.no_grad():
                if own == its:
                    nn.init.eye_(matrix.weight)
                else:
                    matrix.weight.normal_(0.0, own**-0.5, generator=draw)
            made[str(number)] = matrix.to(self.device)
        student.add_module(PROJECTIONS, made)

    def _loss(
        self, student: Any, hidden: Pairs, attention: Pairs, seen: Seen, told: Seen, mask: Tensor
    ) -> Tensor:
        total = torch.zeros((), device=mask.device)
        projections = getattr(student, PROJECTIONS)
        for number, (i, j) in enumerate(hidden):
            assert self.hidden is not None  # there are pairs
            states = seen.states[i]
            if str(number) in projections:
                states = projections[str(number)](states)
            share = self.hidden.weight / len(hidden)
            total = total + share * state_loss(states, told.states[j], mask)
        for i, j in attention:
            assert self.attention is not None  # there are pairs
            share = self.attention.weight / len(attention)
            total = total + share * attention_loss(seen.maps[i], told.maps[j], mask)
        return total


def of_step(
    step: Distill, teacher: Path, *, device: torch.device, memory: int | None, seed: int
) -> Hints | None:
    """Return the hints that a step asks for, if it does."""
    if step.hidden is None and step.attention is None:
        return None
    return Hints(teacher, step.hidden, step.attention, device, step.teacher_quant, memory, seed)


def _pairs(key: str, wanted: Hidden | Attention | None, students: int, teachers: int) -> Pairs:
    if wanted is None:
        return []
    pairs = by_depth(students, teachers) if wanted.layers == "auto" else wanted.layers
    for i, j in pairs:
        if i >= students or j >= teachers:
            raise RecipeError(
                f"{key}: there is no pair of layers [{i}, {j}]: the student has {students} layers, "
                f"the teacher {teachers}",
                hint="layers are numbered from 0",
            )
    return pairs


def _watch(model: Any, numbers: set[int]) -> Any:
    return watched(model.get_submodule(walk.stack(model)[0]), numbers)


@torch.no_grad()
def _read(model: Any, ids: Tensor, mask: Tensor) -> None:
    """Let a model without its head read rows of token ids."""
    body = getattr(model, model.base_model_prefix, model)
    body(input_ids=ids, attention_mask=mask, use_cache=False)
