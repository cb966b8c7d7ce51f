"""Where a model keeps what it has read of each session: one place each, of one target."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from bmkit.runtime.generate import EVERY
from bmkit.runtime.speculation.static import StaticTarget
from bmkit.runtime.speculation.targets import DecoderTarget, Target
from bmkit.runtime.speculation.tree import Tree

RECORDED = 64
"""Up to so many tokens go through a CUDA graph."""


class Place(Protocol):
    """Tokens that a model has read."""

    ids: list[int]
    last: Tensor | None
    """The logits [vocabulary] behind `ids`, if they are known."""

    def append(self, ids: Sequence[int]) -> Tensor:
        """Read more tokens, at least one; return the logits [vocabulary] behind the last."""

    def verify(self, ids: Sequence[int], guesses: Sequence[int]) -> Tensor:
        """Read more tokens, and guesses at what follows, behind some that were read before.

        Returns the logits [1 + guesses, vocabulary] behind the last of `ids` and each guess. All
        are held; wrong guesses are to be cut.
        """

    def cut(self, length: int) -> None:
        """Forget all tokens from `length` on."""


class TargetPlace:
    """A place of a target. Those of one target share a lock: one forward goes at a time.

    Memory: the cache grows by half of what it holds, up to `most` tokens if that is known.
    """

    def __init__(self, target: Target, number: int, lock: Lock, *, most: int | None = None) -> None:
        self.target, self.number, self.most = target, number, most
        self.ids: list[int] = []
        self.last: Tensor | None = None
        self._lock = lock

    def append(self, ids: Sequence[int]) -> Tensor:
        """Read more tokens; see `Place`."""
        known, self.last = len(self.ids), None
        whole = [*self.ids, *ids]
        with self._lock, torch.inference_mode():
            self._make_room(len(whole))
            if known and len(ids) <= RECORDED and isinstance(self.target, StaticTarget):
                logits = self._recorded(list(ids))
            else:
                logits = self.target.begin(self.number, whole, slots=0, adapter=EVERY, known=known)
        self.ids, self.last = whole, logits.float()
        return self.last

    def verify(self, ids: Sequence[int], guesses: Sequence[int]) -> Tensor:
        """Read more tokens, and guesses at what follows; see `Place`."""
        new = [*ids, *guesses]
        with self._lock, torch.inference_mode():
            self._make_room(len(self.ids) + len(new))
            logits = self._chain(new)[-1 - len(guesses) :].float().cpu()
        self.ids, self.last = [*self.ids, *new], None
        return logits

    def _recorded(self, ids: list[int]) -> Tensor:
        return self._chain(ids)[-1].cpu()

    def _chain(self, ids: Sequence[int]) -> Tensor:
        """Return the logits [ids, vocabulary] behind each token."""
        self.target.cut(self.number, len(self.ids))
        tree = Tree.of(ids[0])
        if len(ids) > 1:
            tree.add(list(ids[1:]), "", [1.0] * (len(ids) - 1))
        logits = self.target.forward({self.number: tree})[self.number]
        self.target.keep(self.number, range(len(ids)))
        return logits

    def _make_room(self, tokens: int) -> None:
        target = self.target
        if isinstance(target, DecoderTarget) and target.most is None:
            held = 0 if target.cache is None else target.cache.slots
            if tokens > held:
                wanted = tokens + tokens // 2 + 64
                target.least = max(tokens, min(wanted, self.most or wanted))

    def cut(self, length: int) -> None:
        """Forget tokens; see `Place`. The target hears of it when more is read."""
        if length < len(self.ids):
            del self.ids[length:]
            self.last = None
