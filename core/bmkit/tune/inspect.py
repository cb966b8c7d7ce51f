"""The model as a tree, with a recipe's deltas in it: shapes alone, no weights."""

from __future__ import annotations

from typing import Any

import torch

from bmkit import model as models
from bmkit.deltas import view
from bmkit.plan import Job
from bmkit.runtime import heads
from bmkit.tune.attach import attach
from bmkit.tune.base import Base
from bmkit.tune.duplex import grow
from bmkit.tune.objectives import objective
from bmkit.tune.recipe import TuneRecipe


def tree(job: Job) -> Any:
    """Return the tree of the job's model and of what would be trained.

    Raises RecipeError for deltas that go nowhere or don't go with the model.
    """
    recipe = job.recipe
    assert isinstance(recipe, TuneRecipe)  # the registry pairs recipe and engine
    tokenizer = models.load_tokenizer(job.checkpoint)
    config = models.load_config(job.checkpoint)
    goal = objective(recipe, config, job.files["data.train"], tokenizer, job.checkpoint)
    fresh: list[str] = []
    if goal.head is None:
        model: Any = models.empty_model(job.checkpoint)
        if goal.marks is not None:
            grow(model, goal.marks, tokenizer)
    else:
        import transformers

        config = heads.config_of(job.checkpoint, goal.head, tokenizer)
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
        fresh = heads.trained_with(job.checkpoint, model)
    base = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    with torch.device("meta"):
        model, _ = attach(job, recipe, goal, Base(model, fresh), tokenizer)
    return view.view(model, base)
