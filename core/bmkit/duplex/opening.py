"""From a job to sessions: the model is opened once, each session has a place of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from bmkit import model as models
from bmkit.data.slices.stored import Stored
from bmkit.deltas import plugged
from bmkit.duplex.places import TargetPlace
from bmkit.duplex.policy import Policy
from bmkit.duplex.recipe import DuplexRecipe
from bmkit.duplex.session import DuplexSession
from bmkit.duplex.settings import Settings
from bmkit.duplex.trained import known_of
from bmkit.duplex.voice import Sampling
from bmkit.errors import InputError, ResourceError
from bmkit.plan import Job
from bmkit.runtime.opening import Engine, open_engine
from bmkit.runtime.speculation.opened import target_of
from bmkit.runtime.speculation.targets import Target


@dataclass
class Opened:
    """A model that listens, with places for `sessions` conversations at once."""

    engine: Engine
    target: Target
    tokenizer: Any
    known: Stored
    settings: Settings
    period_ms: int
    sessions: int
    model: str
    """The digest of what was opened: a session is resumed with the same."""
    lock: Lock = field(default_factory=Lock)
    taken: set[int] = field(default_factory=set)

    def session(self, settings: Settings | None = None) -> DuplexSession:
        """Return a new session at a free place. Raises ResourceError if there is none."""
        free = next((n for n in range(self.sessions) if n not in self.taken), None)
        if free is None:
            raise ResourceError(f"all {self.sessions} places for sessions are taken")
        self.taken.add(free)
        settings = settings or self.settings
        place = TargetPlace(self.target, free, self.lock, most=settings.high)
        return DuplexSession(place, self.tokenizer, self.known.layout, settings)

    def end(self, session: DuplexSession) -> None:
        """Give a session's place to others."""
        place = session.place
        if isinstance(place, TargetPlace):
            place.cut(0)
            self.taken.discard(place.number)

    def head(self) -> dict[str, Any]:
        """Return what a session that goes on later is compared by."""
        return {"model": self.model, "scheme": self.known.scheme}

    def close(self) -> None:
        """Stop reading ahead."""
        self.engine.close()


def settings_of(recipe: DuplexRecipe, known: Stored, *, most: int | None = None) -> Settings:
    """Return how a session runs: as the recipe says, else as the model was trained.

    `most` is how many tokens the model, or a budget, has room for.
    """
    said, kv, policy = recipe.slice, recipe.kv, recipe.policy
    own = "agent_tokens" in said.model_fields_set
    tau = policy.tau if policy.tau is not None else known.threshold
    high = kv.high if most is None else min(kv.high, most)
    return Settings(
        agent_tokens=said.agent_tokens if own else known.agent_tokens,
        high=high,
        low=kv.low if kv.low < high else max(2 * high // 3, 1),
        sinks=kv.sink_tokens,
        revisable=kv.revisable_slices,
        collapse_idle=known.collapse_idle,
        evicts=kv.eviction == "window",
        draws=not recipe.sampling.greedy_decision,
        policy=Policy(
            threshold=tau if policy.type == "threshold" else None,
            max_wait=policy.max_wait_slices,
            on_max_wait=policy.on_max_wait,
            sure=policy.sure,
            cooldown=policy.cooldown_slices,
        ),
        sampling=Sampling(
            temperature=recipe.sampling.temperature,
            top_p=recipe.sampling.top_p,
            seed=recipe.seed,
        ),
    )


def period_of(recipe: DuplexRecipe, known: Stored) -> int:
    """Return the milliseconds of a slice: as the recipe says, else as the model was trained."""
    own = "period_ms" in recipe.slice.model_fields_set
    return recipe.slice.period_ms if own else known.slice_ms


def run(job: Job) -> Opened:
    """Open the job's model for as many sessions as `job.rows`, else one.

    Raises InputError for a model that hasn't learned to listen or can't be loaded, ResourceError
    for one whose cache can't be cut, or a budget that can't work.
    """
    recipe = job.recipe
    assert isinstance(recipe, DuplexRecipe)  # the registry pairs recipe and engine
    known, folder = known_of(job)
    if job.threads:
        torch.set_num_threads(job.threads)
    config = models.load_config(job.checkpoint)
    if models.task(config) != "generate" or config.is_encoder_decoder:
        raise InputError(f"{job.checkpoint} is no decoder: it can't go on from what was said")
    tokenizer = models.load_tokenizer(with_tokenizer(folder, job.checkpoint))
    sessions = job.rows or 1
    given = recipe.generating(sessions).model_copy(update={"device": recipe.device})
    engine = open_engine(replace(job, recipe=given, rows=sessions), config)
    if plugged.in_front(engine.model) is not None:
        raise InputError("a delta stands in front of what the model reads: a session has no front")
    if engine.rows < sessions:
        raise ResourceError(
            f"there is room for {engine.rows} sessions in the budget, {sessions} were asked for",
            hint="lower kv.high, or raise the budget",
        )
    if getattr(engine.model, "_is_stateful", False):
        raise ResourceError(
            f"{type(engine.model).__name__} keeps one state of all that it has read: a session "
            "can't take anything back",
            hint="take a model with attention in all of its layers",
        )
    digest = (job.base or job.model).digest
    name = f"{digest} {recipe.dtype} {engine.device}"
    target = target_of(engine, name, "auto")
    _require_marks(known, target, folder)
    room = [n for n in (models.context(config), engine.most_tokens) if n is not None]
    return Opened(
        engine,
        target,
        tokenizer,
        known,
        settings_of(recipe, known, most=min(room, default=None)),
        period_of(recipe, known),
        sessions,
        " ".join([digest, *(delta.digest for delta in job.deltas)]),
    )


def with_tokenizer(folder: Path, checkpoint: Path) -> Path:
    """Return which of both has a tokenizer: training may have given it tokens."""
    names = ("tokenizer.json", "tokenizer_config.json")
    return folder if any((folder / name).is_file() for name in names) else checkpoint


def _require_marks(known: Stored, target: Target, folder: Path) -> None:
    layout = known.layout
    largest = max(*layout.control, *layout.user, *layout.agent)
    if largest >= target.vocabulary:
        raise InputError(
            f"{folder} marks slices by token {largest}, the model has {target.vocabulary} tokens",
            hint="it was trained with tokens that were added: take the merged model",
        )
