"""Open what a job names as a model to talk to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from bmkit import model as models
from bmkit.deltas import plugged
from bmkit.duplex.places import TargetPlace
from bmkit.duplex.policy import Policy
from bmkit.duplex.recipe import DuplexRecipe
from bmkit.duplex.session import DuplexSession
from bmkit.duplex.settings import Settings
from bmkit.duplex.trained import known_of
from bmkit.duplex.voice import Sampling
from bmkit.errors import InputError
from bmkit.plan import Job
from bmkit.runtime.opening import open_engine
from bmkit.runtime.recipe import GenerateRecipe
from bmkit.runtime.speculation.targets import DecoderTarget, ModelTarget, Target


def run(job: Job) -> Opened:
    """Open the job's model for one session."""
    return Opened(job)


class Opened:
    """A duplex model that is ready, with its tokenizer and how it is run."""

    def __init__(self, job: Job) -> None:
        recipe = job.recipe
        assert isinstance(recipe, DuplexRecipe)
        self.known, _ = known_of(job)
        self.tokenizer = tokenizer_of(job)
        config = models.load_config(job.checkpoint)
        if models.task(config) != "generate":
            raise InputError(f"{job.checkpoint} doesn't generate text")
        asked = GenerateRecipe(
            kind="duplex",
            device=recipe.device,
            dtype=recipe.dtype,
            batch_size=1,
            max_new_tokens=recipe.kv.high,
        )
        self.engine = open_engine(replace(job, recipe=asked, rows=1), config)
        if plugged.in_front(self.engine.model) is not None:
            raise InputError("a delta stands in front of what the model reads: it has no session")
        self.target: Target
        if self.engine.decoder is not None:
            self.target = DecoderTarget(self.engine.decoder, 1, self.engine.most_tokens)
        else:
            self.target = ModelTarget(self.engine.model, chunk=self.engine.chunk)
        context = models.context(config)
        high = min(recipe.kv.high, context) if context else recipe.kv.high
        asked_tau = recipe.policy.tau if recipe.policy.tau is not None else self.known.threshold
        self.settings = Settings(
            agent_tokens=self.known.agent_tokens,
            high=high,
            low=min(recipe.kv.low, high * 2 // 3),
            sinks=recipe.kv.sink_tokens,
            collapse_idle=self.known.collapse_idle,
            policy=Policy(
                threshold=asked_tau if recipe.policy.type == "threshold" else None,
                max_wait=recipe.policy.max_wait_slices,
                on_max_wait=recipe.policy.on_max_wait,
                cooldown=recipe.policy.cooldown_slices,
            ),
            sampling=Sampling(
                temperature=recipe.sampling.temperature,
                top_p=recipe.sampling.top_p,
                seed=recipe.seed,
            ),
        )

    def session(self) -> DuplexSession:
        """Return a new session."""
        place = TargetPlace(self.target, 0, Lock(), most=self.engine.most_tokens)
        return DuplexSession(place, self.tokenizer, self.known.layout, self.settings)

    def close(self) -> None:
        """Stop reading ahead."""
        self.engine.close()


def tokenizer_of(job: Job) -> Any:
    """Return the tokenizer that the model was trained with: a delta's own, if it has one."""
    own = Path(job.model.path) / "tokenizer_config.json"
    return models.load_tokenizer(job.model.path if own.is_file() else job.checkpoint)
