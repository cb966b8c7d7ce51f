"""Find the feed-forward of a block: the matrices that its neurons are rows and columns of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

NAMES = (
    ("gate_proj", "up_proj", "down_proj"),  # Llama, Mistral, Qwen, Gemma
    ("wi_0", "wi_1", "wo"),  # T5 1.1
    ("w1", "w3", "w2"),
    (None, "fc1", "fc2"),  # OPT, Phi
    (None, "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon, Bloom
    (None, "intermediate.dense", "output.dense"),  # BERT
    (None, "up_proj", "down_proj"),  # Nemotron
    (None, "c_fc", "c_proj"),  # Starcoder
    (None, "fc_in", "fc_out"),  # GPT-J
    (None, "lin1", "lin2"),  # DistilBERT
    (None, "wi", "wo"),  # T5
)
"""How families call gate, up and down."""


@dataclass(frozen=True)
class FeedForward:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where there is no gate.

    What goes into `down` are the activations of the neurons, whatever the activation is.
    """

    gate: str | None
    up: str
    down: str
    hidden: int
    width: int
    """How many neurons it has."""

    @property
    def rows(self) -> list[str]:
        """Return the names of the matrices whose rows are neurons."""
        return [name for name in (self.gate, self.up) if name is not None]


def find(block: nn.Module) -> FeedForward | None:
    """Return the feed-forward of a block, by the names and shapes of its linear layers.

    None if there is none that is known, or more than one, as in a mixture of experts.
    """
    modules = dict(block.named_modules())
    if any(name.rpartition(".")[2] == "experts" for name in modules):
        return None
    linears = {n: m for n, m in modules.items() if hasattr(m, "in_features")}
    found: dict[str, FeedForward] = {}
    for gate, up, down in NAMES:
        for name in linears:
            prefix = name.removesuffix(up)
            if name in found or prefix == name or (prefix and not prefix.endswith(".")):
                continue
            others = (None if gate is None else f"{prefix}{gate}", name, f"{prefix}{down}")
            if (one := _fits(linears, *others)) is not None:
                found[name] = one
    return next(iter(found.values())) if len(found) == 1 else None


def _fits(linears: Mapping[str, Any], gate: str | None, up: str, down: str) -> FeedForward | None:
    if down not in linears or (gate is not None and gate not in linears):
        return None
    width, hidden = linears[up].out_features, linears[up].in_features
    shapes = [(linears[n].out_features, linears[n].in_features) for n in (gate, up) if n]
    if any(shape != (width, hidden) for shape in shapes) or linears[down].in_features != width:
        return None
    return FeedForward(gate, up, down, hidden, width)
