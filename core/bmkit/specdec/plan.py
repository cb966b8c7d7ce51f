"""What `spec-decode` will do and need, from headers alone."""

from __future__ import annotations

from dataclasses import replace

from bmkit.plan import Estimate, Job
from bmkit.runtime.estimate import estimate as of_target
from bmkit.specdec.recipe import SpecDecodeRecipe


def estimate(job: Job) -> Estimate:
    """Say what will be loaded, what guesses, and the memory it takes.

    What is expected to be made a second holds without any guess that is right.
    """
    recipe = job.recipe
    assert isinstance(recipe, SpecDecodeRecipe)  # the registry pairs recipe and plan
    found = of_target(job)
    sources = ["the prompt", "answers"]
    if job.phrases is not None:
        sources.append(f"the pool at {job.phrases}")
    steps = [*found.steps[:-1]]
    if job.draft is not None:
        steps.append(f"load {job.draft.path} as draft")
    steps += [f"guess by phrases of {', '.join(sources)}; verify", found.steps[-1]]
    return replace(found, steps=steps)
