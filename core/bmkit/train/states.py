"""What a student's layers learn of a teacher's: their hidden states, their attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Pairs = Sequence[tuple[int, int]]
"""Numbers, from 0, of a student's block and of the teacher's block that it learns from."""


def by_depth(students: int, teachers: int) -> list[tuple[int, int]]:
    """Pair each block of a student with the teacher's at the same share of the depth.

    The last one learns from the last one.
    """
    return [(i, max(round((i + 1) * teachers / students), 1) - 1) for i in range(students)]


def state_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared difference of two layers' hidden states, each of length 1 a channel.

    States are [batch, time, width]; `mask` [batch, time] is 0 where there is padding. A state is
    divided by the root of its mean square: else the few of some hundred times the usual size, as
    decoders have at their first token, would be all that counts. So it is 2 - 2·cos(student,
    teacher), as in DistilBERT, arXiv 1910.01108. NaN if nothing is left of the mask.
    """
    there = mask.bool()
    return (_unit(student[there]) - _unit(teacher[there])).square().mean()


def _unit(states: Tensor) -> Tensor:
    whole = states.float()
    return whole * (whole.square().mean(-1, keepdim=True) + 1e-12).rsqrt()


def attention_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the mean divergence KL(teacher ‖ student) of two layers' attention maps.

    Maps are [batch, heads, time, time], each row a distribution over the keys; rows of padding
    (0 in `mask` [batch, time]) don't count. Where the numbers of heads differ, they are averaged
    first. (MiniLM, arXiv 2002.10957, which takes the last layers alone.)
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = (maps.mean(1, keepdim=True) for maps in (student, teacher))
    there = mask.bool()
    p, q = (maps.transpose(1, 2)[there].float() for maps in (teacher, student))
    each = torch.xlogy(p, p) - p * q.clamp_min(1e-30).log()  # [rows, heads, keys]
    return each.sum(-1).mean()


class Seen:
    """What blocks of a model have said in its last forward pass, by their numbers."""

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}
        """What came out of a block: [batch, time, width]."""
        self.maps: dict[int, Tensor] = {}
        """A block's attention [batch, heads, time, time], if it told."""

    def clear(self) -> None:
        """Forget the last pass, before the next one."""
        self.states, self.maps = {}, {}


@contextmanager
def watched(blocks: Sequence[nn.Module], numbers: Iterable[int]) -> Iterator[Seen]:
    """Note what those of a model's `blocks` say that have `numbers`, while the block runs.

    Attention is told by models that run `eager` attention. What a gradient checkpoint computes
    again in the backward pass isn't noted a second time.
    """
    seen = Seen()

    def state_of(number: int) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            seen.states.setdefault(number, out[0] if isinstance(out, tuple) else out)

        return hook

    def map_of(number: int) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            parts = out[1:] if isinstance(out, tuple) else ()
            for part in parts:
                if isinstance(part, Tensor) and part.ndim == 4:
                    seen.maps.setdefault(number, part)

        return hook

    hooks = [blocks[0].register_forward_pre_hook(lambda *_: seen.clear())]
    for number in numbers:
        block = blocks[number]
        hooks.append(block.register_forward_hook(state_of(number)))
        inner = (m for m in block.modules() if m is not block)
        hooks += [m.register_forward_hook(map_of(number)) for m in inner]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()
