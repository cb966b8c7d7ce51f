"""Let gates inside a model learn what of it stays, by what its teacher says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmkit import model as models
from bmkit.compress.anatomy import Anatomy, Kind
from bmkit.compress.distill import Lesson, collate
from bmkit.compress.options.structure import Gates
from bmkit.compress.widths import Widths
from bmkit.nn.gates import Bounded, open_share, settled
from bmkit.report import Reporter
from bmkit.train.distil import Aim, has_plain_head, teaching_loss
from bmkit.train.trainer import train

LAYERS, HIDDEN = "layers", "hidden"


class Gated(nn.Module):
    """A student with gates on its activations: groups of heads, neurons, and what blocks add.

    Those on channels are the same wherever something is added to the hidden states.

    Only the gates are parameters of this module; the student's weights stay as they are.
    """

    def __init__(self, student: Any, anatomy: Anatomy, gates: Bounded) -> None:
        super().__init__()
        self._student = (student,)  # no submodule: what is saved are the gates
        self.gates = gates
        self.values: dict[str, Tensor] = {}
        """What the gates are at the moment, as `Bounded.draw` gives them."""
        self.handles: list[Any] = []
        blocks: Any = student.get_submodule(anatomy.stack)
        kinds: tuple[Kind, ...] = ("heads", "ffn")
        for number, block in enumerate(blocks):
            for kind in kinds:
                if kind in gates.log_alpha:
                    self._gate_inputs(anatomy, number, kind)
            if LAYERS in gates.log_alpha:
                hook = self._branch(number)
                self.handles.append(block.register_forward_hook(hook, with_kwargs=True))
            if HIDDEN in gates.log_alpha:
                for kind in kinds:
                    module = student.get_submodule(anatomy.inputs(number, kind))
                    self.handles.append(module.register_forward_hook(self._channels))
        if HIDDEN in gates.log_alpha:
            hook = self._first_channels
            self.handles.append(blocks[0].register_forward_pre_hook(hook, with_kwargs=True))

    @property
    def student(self) -> Any:
        """Return the model that the gates are in."""
        return self._student[0]

    def _gate_inputs(self, anatomy: Anatomy, number: int, kind: Kind) -> None:
        name = anatomy.inputs(number, kind)
        run = anatomy.run(name, kind)

        def gate(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            values = self.values[kind][number].repeat_interleave(run)
            return (args[0] * values, *args[1:])

        module = self.student.get_submodule(name)
        self.handles.append(module.register_forward_pre_hook(gate))

    def _branch(self, number: int) -> Any:
        def gate(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            after = out[0] if isinstance(out, tuple) else out
            new = before + self.values[LAYERS][0, number] * (after - before)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return gate

    def _channels(self, _: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out * self.values[HIDDEN][0]

    def _first_channels(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._channels(_, (), args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._channels(_, (), kwargs["hidden_states"])}

    def remove(self) -> None:
        """Take the gates out of the student."""
        for handle in self.handles:
            handle.remove()

    def loss(
        self, batch: dict[str, Tensor], *, temperature: float, plain: bool
    ) -> tuple[Tensor, int]:
        """Return a batch's divergence from the teacher with the penalty, as `teaching_loss` does.

        The gates are drawn anew, and their target goes a step further.
        """
        self.values = self.gates.draw()
        aim = Aim(temperature=temperature)
        total, count = teaching_loss(self.student, batch, aim=aim, plain=plain)
        self.gates.step += 1
        return total + count * self.gates.penalty(), count


def learn(
    path: Path,
    anatomy: Anatomy,
    target: Widths,
    taught: Sequence[Lesson],
    step: Gates,
    *,
    seed: int,
    work: Path,
    device: torch.device,
    reporter: Reporter,
) -> Bounded:
    """Train gates on the checkpoint at `path` until so many are open as `target` says.

    Peak memory: the model in float32, and a batch's activations. Raises DivergedError as `train`.
    """
    student = models.load_model(path, device=device, dtype="float32")
    student.requires_grad_(False)
    plain = has_plain_head(student)
    spec = step.train
    if spec.gradient_checkpointing is True:  # of the student, which the trainer doesn't know
        enable = getattr(student, "activation_checkpointing_enable", None)
        (enable or student.gradient_checkpointing_enable)()
        student.train()  # else it recomputes nothing
    spec = spec.model_copy(update={"gradient_checkpointing": False})
    gates = make(anatomy, target, _warmup(step, len(taught))).to(device)
    gated = Gated(student, anatomy, gates)
    examples = [{"input_ids": lesson.ids[:-1], "lesson": lesson} for lesson in taught]

    def loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        found: tuple[Tensor, int] = model.loss(batch, temperature=step.temperature, plain=plain)
        return found

    train(
        gated,
        examples,  # type: ignore[arg-type]
        collate,
        spec,
        seed=seed,
        work=work,
        device=device,
        reporter=reporter,
        loss=loss,
        recomputes=step.train.gradient_checkpointing is True,
    )
    return gates


def make(anatomy: Anatomy, target: Widths, warmup: int) -> Bounded:
    """Return gates for what `target` has less of."""
    now = anatomy.now
    sizes = {
        "heads": (now.layers, now.heads),
        "ffn": (now.layers, now.ffn),
        LAYERS: (1, now.layers),
        HIDDEN: (1, now.hidden),
    }
    fewer = [kind for kind in sizes if getattr(target, kind) != getattr(now, kind)]
    targets = {kind: getattr(target, kind) / getattr(now, kind) for kind in fewer}
    return Bounded({kind: sizes[kind] for kind in fewer}, targets, warmup)


def _warmup(step: Gates, texts: int) -> int:
    """Return after how many batches the target is reached."""
    spec = step.train
    if spec.max_steps > 0:
        batches = spec.max_steps * spec.gradient_accumulation_steps
    else:
        batches = math.ceil(texts / spec.per_device_train_batch_size * spec.num_train_epochs)
    return round(step.warmup * batches)


@torch.no_grad()
def expected(anatomy: Anatomy, gates: Bounded) -> float:
    """Return the expected share of the blocks' parameters that are left."""
    now = anatomy.now
    whole = anatomy.size(now) / now.layers
    each = torch.full((now.layers,), whole)
    shares = {kind: share.cpu() for kind, share in gates.expected().items()}
    for kind in ("heads", "ffn"):
        if kind in shares:
            own = whole - anatomy.size(replace(now, **{kind: 0})) / now.layers
            each -= own * (1 - shares[kind])
    if HIDDEN in shares:
        without = anatomy.size(replace(now, hidden=0)) / now.layers
        each = without + (each - without) * shares[HIDDEN]
    if LAYERS in gates.log_alpha:
        each *= open_share(gates.log_alpha[LAYERS][0]).cpu()
    return float(each.sum() / (whole * now.layers))


@torch.no_grad()
def decide(
    gates: Bounded, target: Widths, layers: int
) -> tuple[list[int], dict[int, dict[Kind, Tensor]], dict[int, dict[Kind, Tensor]]]:
    """Return which layers stay, which units of each, ascending, and what their gates are."""
    kept: dict[int, dict[Kind, Tensor]] = {i: {} for i in range(layers)}
    values: dict[int, dict[Kind, Tensor]] = {i: {} for i in range(layers)}
    chosen = list(range(layers))
    if LAYERS in gates.log_alpha:
        chosen = sorted(gates.log_alpha[LAYERS][0].topk(target.layers).indices.tolist())
    for kind in ("heads", "ffn"):
        if kind not in gates.log_alpha:
            continue
        for i, row in enumerate(gates.log_alpha[kind].detach().cpu()):
            kept[i][kind] = row.topk(getattr(target, kind)).indices.sort().values
            values[i][kind] = settled(row)[kept[i][kind]]
    return chosen, kept, values


@torch.no_grad()
def channels(gates: Bounded, target: Widths) -> Tensor | None:
    """Return which channels of the hidden states stay, ascending; None if they have no gates."""
    if HIDDEN not in gates.log_alpha:
        return None
    row: Tensor = gates.log_alpha[HIDDEN][0].detach().cpu()
    return row.topk(target.hidden).indices.sort().values
