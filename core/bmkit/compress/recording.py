"""What stands in the place of a model's blocks while it is seen how they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Stop(Exception):
    """All is known that was asked for."""


class Odd(Exception):
    """The blocks aren't called one after the other."""


REFUSALS = (Odd, IndexError, AttributeError, TypeError, ValueError, KeyError, RuntimeError)
"""What shows that a model doesn't take what stands for its blocks."""


class Recorder(nn.Module):
    """Stands for a block: notes what it is called with, and hands the hidden states on.

    Beside them it gives a mark for each of the `more` tensors that a block gives, if it gives a
    tuple at all: where a later block is called with a mark, that is what it is to be given.
    """

    def __init__(self, block: nn.Module, more: int | None, *, notes: bool = True) -> None:
        super().__init__()
        self.__dict__["block"] = block  # no submodule: its parameters are not there
        self.more, self.notes, self.last = more, notes, False
        self.__dict__["marks"] = [torch.empty(0) for _ in range(more or 0)]
        self.calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
        self.gives: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand on the first input [1, tokens, width]. Raises Odd if there is none, Stop at last."""
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or len(hidden) != 1:
            raise Odd("a block's first input is no [rows, tokens, width]")
        if self.notes:
            self.calls.append((hidden, args[1:], kwargs))
        if self.last:
            raise Stop
        given = hidden if self.gives is None else self.gives
        return given if self.more is None else (given, *self.marks)


def leaves(value: Any) -> list[Tensor]:
    """Return the tensors of nested tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    mapped(value, found.append)
    return found


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return `value` with its tensors changed, in tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        made = [mapped(one, change) for one in value]
        return tuple(made) if isinstance(value, tuple) else made
    if isinstance(value, dict):
        return {key: mapped(one, change) for key, one in value.items()}
    return value
