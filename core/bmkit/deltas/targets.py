"""Where the deltas of a recipe go, in a model that is loaded or from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bmkit.deltas import address
from bmkit.deltas.modules import Kind, Module
from bmkit.deltas.roles import roles_there
from bmkit.errors import RecipeError

SECOND = ("feedforward_modules", "input_modules")
"""Further modules that some methods name."""
STACKED: tuple[Kind, ...] = ("parameter",)


def addressed(spec: Any, modules: Mapping[str, Module]) -> tuple[list[str], list[str]]:
    """Return the modules that a delta goes to, and those that it names besides.

    Both are empty for one that goes to no module. Raises RecipeError as `address.matched` does.
    """
    if not spec.targets or (spec.target_modules == [] and getattr(spec, "target_parameters", ())):
        return [], []
    own, besides = (
        address.matched(modules, kinds=spec.KINDS, method=f"`{spec.type}`", **where)
        if where["target_modules"] or number == 0
        else []
        for number, where in enumerate(_places(spec, modules))
    )
    _require_patterns(spec, own)
    _require_sizes(spec, [(name, modules[name].shape) for name in own])
    return own, besides


def parameters_addressed(
    spec: Any, modules: Mapping[str, Module], stacked: Mapping[str, Module]
) -> list[str]:
    """Return the parameters of experts that a delta goes to, of those in `stacked`.

    Raises RecipeError as `address.matched` does, and if the model has none.
    """
    patterns = getattr(spec, "target_parameters", ())
    if not patterns:
        return []
    if not stacked:
        raise RecipeError(
            "target_parameters: the model has no experts that share a parameter",
            hint="target_modules names layers",
        )
    where = spec.targets | {"target_modules": patterns}
    found = address.matched(
        {**modules, **stacked},
        kinds=STACKED,
        method=f"`{spec.type}` by this key",
        key="target_parameters",
        **where,
    )
    _require_sizes(spec, [(name, stacked[name].shape[1:]) for name in found])
    return found


def _require_patterns(spec: Any, found: list[str]) -> None:
    """Raise RecipeError for a rank or alpha of a module that the delta doesn't go to."""
    for key in ("rank_pattern", "alpha_pattern"):
        for end in getattr(spec, key, {}):
            if not any(name == end or name.endswith(f".{end}") for name in found):
                short = sorted({name.rpartition(".")[2] for name in found})
                raise RecipeError(
                    f"{key}: no module of the delta's ends in `{end}`",
                    hint=f"there are: {', '.join(short)}",
                )


def _require_sizes(spec: Any, found: list[tuple[str, tuple[int, ...]]]) -> None:
    """Raise RecipeError for ranks above all layers' own, and blocks that don't divide inputs."""
    most = max((min(shape) for _, shape in found if shape), default=0)
    for key in ("r", "init_r"):
        rank = getattr(spec, key, None)
        if rank is not None and spec.type != "vera" and rank > most:
            raise RecipeError(
                f"{key}: {rank} is above the rank of all layers that it goes to",
                hint=f"up to {most} makes a difference",
            )
    for name, shape in found:
        for key in ("oft_block_size", "boft_block_size"):
            size = getattr(spec, key, None)
            if size is not None and shape[-1] % size:
                fits = [n for n in range(2, min(shape[-1], 257)) if shape[-1] % n == 0]
                raise RecipeError(
                    f"{key}: {size} doesn't divide the {shape[-1]} inputs of {name}",
                    hint=f"these do: {', '.join(map(str, fits))}" if fits else None,
                )


def _places(spec: Any, modules: Mapping[str, Module]) -> list[dict[str, Any]]:
    asked = {"target_modules", *SECOND} & spec.model_fields_set
    if spec.type == "parallel_adapter" and not asked and "mlp" not in roles_there(modules):
        # A feed-forward that is no module of its own, as BERT's: from its first layer to its last.
        pair = (["attn", "mlp.down"], ["attn", "mlp.up"])
        return [spec.targets | {"target_modules": part} for part in pair]
    second = next((found for key in SECOND if (found := getattr(spec, key, None))), None)
    return [spec.targets, spec.targets | {"target_modules": second}]
