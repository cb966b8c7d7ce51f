"""Places in a block where inputs can be divided and weights multiplied, with nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 3e-5
"""A fold may change a block's output by so much, relative to its size: float32 leaves some 1e-6."""


@dataclass(frozen=True)
class Place:
    """Whose outputs are divided, and which linear layers take them, by names within the block."""

    giver: str
    """A norm, or a linear layer whose rows are divided."""
    takers: tuple[str, ...]
    offset: float = 0.0
    """What a norm adds to its weight: 1 in Gemma's."""

    def parameters(self) -> list[str]:
        """Return the names of the parameters that a fold changes, biases of norms among them."""
        return [f"{self.giver}.weight", f"{self.giver}.bias", *(f"{t}.weight" for t in self.takers)]


def places(block: nn.Module, run: Callable[[], Tensor]) -> list[Place]:
    """Find the places of a block in float32; `run` lets one row through it: [tokens, width].

    Each is tried out with random factors, and kept if the output stays. What is found of one block
    holds for others like it.
    """
    found = []
    generator = torch.Generator().manual_seed(0)
    for place in _candidates(block, run):
        width = getattr(block.get_submodule(place.takers[0]), "in_features", 0)
        factors = 4 ** (2 * torch.rand(width, generator=generator) - 1)
        if (undo := fold(block, place, factors, run)) is not None:
            undo()
            found.append(place)
    return found


def fold(
    block: nn.Module, place: Place, factors: Tensor, run: Callable[[], Tensor]
) -> Callable[[], None] | None:
    """Divide what `place` gives by `factors` [width], and multiply the weights that take it.

    Returns what takes it back; None, with nothing changed, if the block's output would change.
    """
    modules: dict[str, Any] = {n: block.get_submodule(n) for n in (place.giver, *place.takers)}
    before = {
        (n, key): p.detach().clone()
        for n, m in modules.items()
        for key, p in m.named_parameters(recurse=False)
    }

    def undo() -> None:
        for (name, key), value in before.items():
            getattr(modules[name], key).data.copy_(value)

    with torch.no_grad():
        wanted = run().clone()
        giver = modules[place.giver]
        factors = factors.to(giver.weight.device)
        weight = giver.weight.data
        if weight.ndim == 2:
            weight /= factors[:, None]
        else:
            weight.copy_((weight + place.offset) / factors - place.offset)
        if getattr(giver, "bias", None) is not None:
            giver.bias.data /= factors
        for name in place.takers:
            modules[name].weight.data *= factors
        error = (run() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    if float(error) <= TOLERANCE:
        return undo
    undo()
    return None


def _candidates(block: nn.Module, run: Callable[[], Tensor]) -> list[Place]:
    """Return what may be a place: a norm and the layers on its output; two layers in a row."""
    given: dict[int, tuple[Tensor, str]] = {}  # holds the tensors, so that ids stay theirs
    takers: dict[int, list[str]] = {}

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, nn.Linear):
                takers.setdefault(id(args[0]), []).append(name)
            elif isinstance(output, Tensor):
                given[id(output)] = (output, name)
            kept.append((args, output))

        return look

    kept: list[Any] = []
    leaves = {n: m for n, m in block.named_modules() if n and not list(m.children())}
    hooks = [m.register_forward_hook(watch(n)) for n, m in leaves.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in hooks:
            handle.remove()
    found = []
    for key, names in takers.items():
        name = given[key][1] if key in given else None
        weight = getattr(leaves.get(name or ""), "weight", None)
        if name is not None and isinstance(weight, Tensor) and weight.ndim == 1:
            found += [Place(name, tuple(names), offset) for offset in (0.0, 1.0)]
    return found + _in_a_row(leaves)


def _in_a_row(leaves: dict[str, nn.Module]) -> list[Place]:
    linears = {n: m for n, m in leaves.items() if isinstance(m, nn.Linear)}
    found = []
    for name, layer in linears.items():
        for other, after in linears.items():
            near = _near(name, other)
            if near and name != other and layer.out_features == after.in_features:
                found.append(Place(name, (other,)))
    return found


def _near(name: str, other: str) -> bool:
    """Tell whether two layers lie in one module, or in two of one (as BERT's values and output)."""
    one, two = name.split("."), other.split(".")
    return one[:-1] == two[:-1] or (len(one) > 2 and one[:-2] == two[:-2])


def changed(block: nn.Module, kept: Sequence[Place]) -> dict[str, Tensor]:
    """Return the parameters of a block that folds at `kept` have changed, by name within it."""
    names = dict.fromkeys(name for place in kept for name in place.parameters())
    own = dict(block.named_parameters())
    return {name: own[name].detach() for name in names if name in own}
