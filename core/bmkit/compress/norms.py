"""A model's norms where its hidden width is cut: a mean is over fewer channels then."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmkit.compress.anatomy import Anatomy
from bmkit.runtime.placed.load import empty


def norms_in(whole: Any, anatomy: Anatomy, layer: int | None) -> dict[str, Any]:
    """Return the norms of a block, or those outside of all blocks, by their weights' names."""
    found = {}
    for name, sides in anatomy.sides.items():
        module, _, last = name.rpartition(".")
        one = last == "weight" and len(anatomy.shapes[name]) == 1
        if one and sides[0].kind == "hidden" and anatomy.layer(name) == layer:
            found[name] = whole.get_submodule(module)
    return found


def shares(sums: Tensor) -> Any:
    """Return a hook that adds to `sums` what share of each place's energy each channel has."""

    def add(_: Any, args: tuple[Tensor, ...]) -> None:
        energy = args[0].reshape(-1, args[0].shape[-1]).float().square()
        sums.add_((energy / energy.sum(-1, keepdim=True).clamp_min(1e-30)).sum(0).cpu())

    return add


def is_raised(norm: Any, width: int, device: torch.device) -> bool:
    """Tell whether a norm multiplies by 1 + its weight: it says something where that is zero."""
    weight = norm.weight.data
    norm.weight.data = torch.zeros_like(weight)
    said = norm(torch.linspace(-1, 1, width, device=device)[None])
    if getattr(norm, "bias", None) is not None:
        said = said - norm.bias
    norm.weight.data = weight
    return bool(said.abs().max() > 0.1)


@torch.no_grad()
def norms_of_zeros(source: Path, anatomy: Anatomy, kept: Tensor) -> dict[str, tuple[float, float]]:
    """Return what `Survey.norms` does, where all channels but `kept` are zero in what goes in.

    So norms ahead of the blocks, in whose inputs nothing is zero yet, stay as they are.
    """
    whole = empty(source)
    order = [name for name, _ in whole.named_modules()]
    found = {}
    for layer in (None, *range(anatomy.now.layers)):
        for name, norm in norms_in(whole, anatomy, layer).items():
            if order.index(name.rpartition(".")[0]) < order.index(anatomy.stack):
                continue
            plain = copy.deepcopy(norm).to_empty(device="cpu")
            for value in plain.parameters():
                value.zero_()
            raised = is_raised(plain, anatomy.now.hidden, torch.device("cpu"))
            found[name] = ((anatomy.now.hidden / len(kept)) ** 0.5, float(raised))
    return found
