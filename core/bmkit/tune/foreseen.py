"""What of a recipe can't work, told before anything is loaded. No torch here."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bmkit.data import rows
from bmkit.data.slices import dialogue
from bmkit.errors import InputError, RecipeError
from bmkit.tune.recipe import Task, TuneRecipe
from bmkit.tune.task import GENERATES, LABELLED, figures_of

DENSE = ("boft", "oft", "p_tuning", "prefix", "prompt", "trainable_tokens")
"""Methods that read the model's weights."""


def require_measured(recipe: TuneRecipe, task: Task) -> None:
    """Raise RecipeError for a gate, or a figure that says which weights are best, of other tasks.

    And for rows that are to be packed, where they can't be.
    """
    spec, figures = recipe.train, figures_of(task)
    name = spec.metric_for_best_model or "dev_loss"
    best = spec.load_best_model_at_end or spec.early_stopping_patience is not None
    asked: dict[str, str] = {"train.metric_for_best_model": name} if best else {}
    asked |= {f"gates.{gate}": re.sub("_(before|by_threshold)$", "", gate) for gate in recipe.gates}
    for key, wanted in asked.items():
        by_tag = task == "duplex" and wanted.startswith("dev_right_")
        if wanted.startswith("dev_") and wanted not in figures and not by_tag:
            raise RecipeError(
                f"{key}: `{wanted}` isn't measured, the task is {task}",
                hint=f"on held-out rows it measures {', '.join(figures)}",
            )
    if recipe.data.packing and task not in GENERATES:
        raise RecipeError(
            f"data.packing: rows can't be packed: the task is {task}", hint="leave it out"
        )


def require_front(recipe: TuneRecipe, task: Task) -> None:
    """Raise RecipeError for something in front of what fills gaps: PEFT knows no such task."""
    for spec in recipe.deltas:
        if spec.PROMPT and task == "masked_lm":
            raise RecipeError(
                f"deltas: `{spec.type}` can't be had where gaps are filled (task masked_lm)",
                hint="take a delta inside the model, as lora, adapter or bitfit",
            )


def require_rows(task: Task, files: Mapping[str, Path]) -> None:
    """Raise InputError naming the first row that says nothing the task can learn from.

    Rows with labels are looked at where these are counted.
    """
    if task in LABELLED:
        return
    for key, path in files.items():
        empty = True
        lacking = _no_dialogue if task == "duplex" and key != "data.mix" else rows.lacking
        with path.open("rb") as stream:
            for row in rows.read(stream):
                problem = row.problem if isinstance(row, rows.BadRow) else lacking(task, row.values)
                if problem:
                    raise InputError(f"{path}:{row.line}: {problem}")
                empty = False
        if empty:
            rows.read_all(path)


def _no_dialogue(_: str, values: dict[str, Any]) -> str | None:
    try:
        dialogue.of_values(values)
    except ValueError as exc:
        return str(exc)
    return None


def require_strength(recipe: TuneRecipe) -> None:
    """Raise RecipeError if a part is asked for of what no `lora` learns."""
    if recipe.strength < 1 and all(spec.type != "lora" for spec in recipe.deltas):
        raise RecipeError(
            "strength: there is no `lora` whose part it could be", hint="say `strength: 1`"
        )


def require_duplex(recipe: TuneRecipe, task: Task) -> None:
    """Raise RecipeError for what only goes with dialogues in slices, or doesn't go with them."""
    if task != "duplex":
        for key in ("mix", "own_words"):
            if not getattr(recipe.data, key):
                continue
            raise RecipeError(
                f"data.{key}: rows are mixed into dialogues in slices; the task is {task}",
                hint="put them into data.train",
            )
        return
    types = [spec.type for spec in recipe.deltas]
    if types and "lora" not in types:
        raise RecipeError(
            "deltas: the rows of the marks between slices are trained with `lora`",
            hint="put one beside the others, or `unfreeze: [all]` with `merge: true`",
        )
    if not types and "all" not in recipe.unfreeze:
        raise RecipeError(
            "unfreeze: the rows of the marks between slices have to be trained as well",
            hint="take `all`, or a delta of type lora",
        )
    if front := [spec.type for spec in recipe.deltas if spec.PROMPT]:
        raise RecipeError(
            f"deltas: `{front[0]}` stands in front of what is read, and a session has no front",
            hint="take deltas inside the model",
        )


def require_once(unfrozen: Collection[str], deltas: Mapping[str, Collection[str]]) -> None:
    """Raise RecipeError for a module that is trained itself and by a delta; by name, what it has.

    Of a module in one that is trained itself, a delta beside it is no second training of it.
    """
    for name, modules in deltas.items():
        for module in unfrozen:
            if module in modules:
                raise RecipeError(
                    f"unfreeze: {module} is trained twice: by itself and by `{name}`",
                    hint="take it out of `unfreeze`, or name it in the delta's exclude_modules",
                )


def require_shared(recipe: TuneRecipe, *, placed: bool) -> None:
    """Raise RecipeError for what doesn't go with frozen weights that processes share out."""
    if placed:
        raise RecipeError(
            "a budget and sharing the weights out (FSDP) can't be had together",
            hint="leave out --cpu-memory and --gpu-memory, or the launcher's --use_fsdp",
        )
    if recipe.merge:
        raise RecipeError(
            "merge: no process has the whole model where the weights are shared out (FSDP)",
            hint="tune without merge, then `bmkit merge` the delta",
        )
    if recipe.cache_states is True:
        raise RecipeError(
            "cache_states: they can't be kept where the weights are shared out (FSDP)",
            hint="leave it out",
        )


def require_placed(recipe: TuneRecipe, task: Task) -> None:
    """Raise RecipeError for what needs dense weights, which a budget doesn't leave."""
    if recipe.original is not None:
        raise RecipeError(
            "original: it is compared with dense weights, which a budget doesn't leave",
            hint="leave the budget out",
        )
    if recipe.unfreeze:
        raise RecipeError("unfreeze: weights in a budget stay as they are", hint="leave one out")
    if task == "duplex":
        raise RecipeError(
            "task: duplex trains rows of the embedding, which is packed or elsewhere in a budget",
            hint="leave the budget out",
        )
    if task in LABELLED or task == "masked_lm":
        raise RecipeError(
            f"task: {task} needs a head of its own, which can't be had in a budget",
            hint="leave the budget out, or take a checkpoint that has the head",
        )
    for spec in recipe.deltas:
        begun = getattr(spec, "init_lora_weights", "default")
        reads = getattr(spec, "use_dora", False) or getattr(spec, "target_parameters", ())
        if spec.type in DENSE or reads or begun in ("pissa", "olora"):
            raise RecipeError(
                f"deltas: `{spec.type}` as it is here reads the model's weights, which are packed "
                "or elsewhere in a budget",
                hint="plain lora, ia3, adapters and bitfit don't; or leave the budget out",
            )
