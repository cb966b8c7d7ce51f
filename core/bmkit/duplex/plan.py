"""What building data, what a session, and what measuring a model will do and need. No torch."""

from __future__ import annotations

from dataclasses import replace

from bmkit.duplex import held_out
from bmkit.duplex.recipe import DuplexRecipe
from bmkit.duplex.trained import known_of
from bmkit.errors import InputError, RecipeError
from bmkit.plan import RUNTIME_BYTES, Estimate, Job, Peak, read_headers
from bmkit.runtime.estimate import estimate as estimate_answers

RAM_BYTES = 200 * 2**20
"""The interpreter, the lists and some chats: input is read row by row."""
DIALOGUE_BYTES = 8_000
GROWTH = 4
"""Bytes of slices for each of a chat."""
LOGITS_BYTES = 600 * 2**20
"""Of the longest chat: they are made at once."""
REPORT_BYTES = 32 * 2**20


def estimate(job: Job) -> Estimate:
    """Return the steps and an upper bound of memory and disk. Raises InputError without sources."""
    recipe = job.recipe
    assert isinstance(recipe, DuplexRecipe)
    files = [path for dotted, path in job.files.items() if dotted.startswith("sources.")]
    if not files:
        raise InputError("there are no chats to build from", hint="name `sources`, or give --data")
    size = sum(path.stat().st_size for path in files)
    need = size * GROWTH
    if recipe.limit is not None:
        need = max(recipe.limit * DIALOGUE_BYTES, min(need, recipe.limit * size))
    count = "each chat once" if recipe.limit is None else f"{recipe.limit} dialogues"
    shares = {name: share for name, share in recipe.mix.items() if share > 0}
    total = sum(shares.values())
    mix = ", ".join(f"{name} {share / total:.0%}" for name, share in shares.items())
    step = f"build {count} of {len(files)} file{'s' * (len(files) > 1)}: {mix}"
    return Estimate([step], Peak(RAM_BYTES, 0, need * (2 if recipe.export != "none" else 1)))


def estimate_sessions(job: Job) -> Estimate:
    """Return what a model and the caches of its sessions take: as many as `job.rows`, else one."""
    recipe = job.recipe
    assert isinstance(recipe, DuplexRecipe)  # the registry pairs recipe and plan
    sessions = job.rows or 1
    rows = recipe.places(sessions)
    return estimate_answers(replace(job, recipe=recipe.generating(sessions), rows=rows))


def estimate_evaluation(job: Job) -> Estimate:
    """Say what will be measured, and what it needs: a session, and for `retain` the dense model.

    Raises InputError for a model that isn't a duplex one, or dialogues that can't be read.
    """
    recipe = job.recipe
    assert isinstance(recipe, DuplexRecipe)  # the registry pairs recipe and plan
    known_of(job)
    asked = recipe.eval
    dialogues = held_out.read(held_out.file_of(job.files), asked.limit)
    steps = [
        f"{suite}: {len(dialogues)} dialogues, punctuated and not"
        for suite in dict.fromkeys(asked.suites)
        if suite != "retain"
    ]
    peak = estimate_sessions(job).peak
    if "retain" in asked.suites:
        if job.base is None and "eval.before" not in job.models:
            raise RecipeError(
                "eval.before: it isn't said which model this one was before",
                hint="name it: -s eval.before=MODEL; or leave `retain` out",
            )
        steps.append("retain: ordinary chats and questions, before and after")
        dense = 4 * read_headers(job.checkpoint).dense_numel + LOGITS_BYTES
        on_gpu = recipe.device != "cpu"
        ram = RUNTIME_BYTES + (2**30 if on_gpu else dense)
        peak = Peak(max(peak.ram_bytes, ram), max(peak.gpu_bytes, dense * on_gpu), 0)
    return Estimate(steps, Peak(peak.ram_bytes, peak.gpu_bytes, REPORT_BYTES))
