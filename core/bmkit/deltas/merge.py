"""Deltas put into the weights that they change, after which there are none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from bmkit.deltas.compose import forget, load
from bmkit.deltas.held import base_of, is_prompt, switches
from bmkit.deltas.tuners.beside import Beside
from bmkit.deltas.tuners.width import bare
from bmkit.errors import InputError, RecipeError, first_line
from bmkit.nn.zeros import is_pruned


def merge(model: Any) -> Any:
    """Put the active deltas of `compose` into the weights, in place; return the plain model.

    Raises RecipeError, with nothing changed, if one of them has no place in the weights.
    """
    base = base_of(model)
    around, beside = require_mergeable(model)
    for layer in (*reversed(around), *beside):  # of layers around each other the inner one first
        if layer.active_adapters:
            layer.merge(adapter_names=list(layer.active_adapters))
    for layer in beside:
        layer.remove()
    done: tuple[str, ...] = ()
    for name, module in list(base.named_modules()):
        if name.startswith(done):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            plain = module.unload_and_optionally_merge_module(False, False, None)
        elif isinstance(module, BaseTunerLayer):
            plain = bare(module)
        else:
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(base.get_submodule(parent), attribute, plain)
        done = (*done, f"{name}.")
    forget(base)
    return base


def merged(model: Any, folders: Mapping[str, Path], what: Path) -> Any:
    """Put saved deltas into a model's weights, in place; return the plain model, `what` in errors.

    Raises InputError for deltas that don't fit, or would fill what was pruned; RecipeError as
    `merge` does.
    """
    pruned = [name for name, p in model.named_parameters() if is_pruned(p)]
    whole = merge(load(model, folders))
    named = dict(whole.named_parameters())
    if filled := [name for name in pruned if not is_pruned(named[name])]:
        raise InputError(
            f"{what} is pruned, and merging fills the zeros of {len(filled)} matrices, as "
            f"{filled[0]}",
            hint="train LoRA with `merge: true`, which keeps them, or keep the delta beside it",
        )
    return whole


def require_mergeable(model: Any) -> tuple[list[Any], list[Any]]:
    """Return the layers of the deltas: those around modules, and those beside them.

    Raises RecipeError if one of them has no place in the weights.
    """
    if is_prompt(model):
        raise _refused("what comes before a prompt has no place in the weights")
    inside = [m for m in switches(base_of(model)) if isinstance(m, BaseTunerLayer)]
    beside = [m for m in inside if isinstance(m, Beside)]
    around = [m for m in inside if not isinstance(m, Beside)]
    try:
        for layer in beside:
            layer.look()
    except ValueError as exc:
        raise _refused(first_line(exc)) from None
    for layer in around:
        if type(layer).merge is BaseTunerLayer.merge:
            raise _refused(f"{type(layer).__name__} can't be merged")
    return around, beside


def _refused(why: str) -> RecipeError:
    return RecipeError(f"merge: {why}", hint="leave merge out, and keep the deltas beside it")
