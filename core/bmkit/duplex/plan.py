"""What building data will do and need. No torch."""

from __future__ import annotations

from bmkit.duplex.recipe import DuplexRecipe
from bmkit.errors import InputError
from bmkit.plan import Estimate, Job, Peak

RAM_BYTES = 200 * 2**20
"""The interpreter, the lists and some chats: input is read row by row."""
DIALOGUE_BYTES = 8_000
GROWTH = 4
"""Bytes of slices for each of a chat."""


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
