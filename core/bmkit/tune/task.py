"""What rows are for, by their keys, and the head that a model needs for it. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmkit import env, plan
from bmkit.data import labelled, rows
from bmkit.plan import Headers
from bmkit.runtime.budget import Sizes
from bmkit.tune.recipe import DECISIONS, Task, TuneRecipe

BY_KEY: dict[str, Task] = {
    "label": "sequence_classification",
    "probabilities": "sequence_classification",
    "chosen": "preference",
    "tags": "token_classification",
    "slices": "duplex",
}
GENERATES = ("causal_lm", "duplex")
"""Tasks of saying the next token, whose rows can be packed."""
LABELLED = ("sequence_classification", "token_classification")


def task_of_rows(train: Path) -> Task | None:
    """Return the task that the first row's keys tell; None if they don't."""
    with train.open("rb") as stream:
        first = next(iter(rows.read(stream)), None)
    values = first.values if isinstance(first, rows.Row) else {}
    return next((task for key, task in BY_KEY.items() if key in values), None)


def task_of(recipe: TuneRecipe, config: Mapping[str, Any], train: Path) -> Task:
    """Return the task that a recipe means, by the keys of its first row, else by the model.

    `config` is the checkpoint's `config.json`.
    """
    if recipe.task != "auto":
        return recipe.task
    if (told := task_of_rows(train)) is not None:
        return told
    if plan.task(config) == "generate":
        return "seq2seq_lm" if config.get("is_encoder_decoder") else "causal_lm"
    return "masked_lm"


def quickest(recipe: TuneRecipe, config: Mapping[str, Any], train: Path) -> str:
    """Return the dtype that `dtype: quickest` means on this machine, for this `config.json`.

    Weights of the model itself that are trained would lose small steps in bfloat16.
    """
    task = task_of_rows(train) if recipe.task == "auto" else recipe.task
    stored = str(config.get("dtype") or config.get("torch_dtype"))
    whole = recipe.unfreeze or task in LABELLED
    quick = (
        recipe.device.startswith("cpu")
        and stored.endswith("bfloat16")
        and not whole
        and env.has_amx()
    )
    return "bfloat16" if quick else "auto"


def figures_of(task: Task) -> tuple[str, ...]:
    """Return what is measured on held-out rows of a task."""
    if task in LABELLED:
        return ("dev_loss", "dev_accuracy", "dev_f1")
    if task == "duplex":
        return ("dev_loss", *(f"dev_{name}" for name in DECISIONS))
    return ("dev_loss", "dev_accuracy") if task == "preference" else ("dev_loss",)


def new_head(recipe: TuneRecipe, headers: Headers, train: Path) -> tuple[int, int]:
    """Return how many labels a head gets that is trained with the deltas, and its parameters.

    Both are 0 for a task without labels. An encoder or encoder-decoder that classifies has a dense
    layer before the labels, as most have; it counts unless the checkpoint has one, a pooler.
    Raises InputError for rows without labels.
    """
    task = task_of_rows(train) if recipe.task == "auto" else recipe.task
    if task not in LABELLED:
        return 0, 0
    labels = len(recipe.data.labels or labelled.labels_of(train))
    width, config = Sizes.of(headers.config).hidden, headers.config
    reads = config.get("model_type") in plan.ENCODERS or config.get("is_encoder_decoder")
    biased = bool(reads) or task == "token_classification"
    count = labels * (width + biased)
    pooled = any(".pooler." in f".{tensor.name}" for tensor in headers.tensors)
    dense = task == "sequence_classification" or config.get("model_type") == "modernbert"
    if reads and dense and not pooled:
        count += width * width + width
    return labels, count
