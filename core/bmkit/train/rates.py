"""Learning rates that some modules have of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

Rates = Sequence[tuple[nn.Module, float]]
"""Modules, each with the peak learning rate of its parameters."""


def apart(optimizer: Any, rates: Rates) -> Any:
    """Return the optimizer with groups of their own for the parameters of `rates`."""
    own = {id(p): rate for module, rate in rates for p in module.parameters()}
    for group in list(optimizer.param_groups) if own else ():
        rest = {name: value for name, value in group.items() if name != "params"}
        for rate in dict.fromkeys(own.values()):
            taken = [p for p in group["params"] if own.get(id(p)) == rate]
            if taken:
                group["params"] = [p for p in group["params"] if own.get(id(p)) != rate]
                optimizer.add_param_group({**rest, "params": taken, "lr": rate})
    return optimizer
