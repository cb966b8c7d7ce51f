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
from bmkit.duplex.places import Place, TargetPlace
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
    places: int
    """Those of sessions, and spare ones at which what stays is read while a session forgets."""
    lock: Lock = field(default_factory=Lock)
    taken: set[int] = field(default_factory=set)
    spare: int = 0
    """How many of `taken` are spare ones."""
    _seats: Lock = field(default_factory=Lock)

    def session(self, settings: Settings | None = None) -> DuplexSession:
        """Return a new session at a free place. Raises ResourceError if there is none."""
        with self._seats:
            if len(self.taken) - self.spare >= self.sessions:
                raise ResourceError(f"all {self.sessions} places for sessions are taken")
            place = self._free()
        layout = self.known.layout
        return DuplexSession(place, self.tokenizer, layout, settings or self.settings, self)

    def end(self, session: DuplexSession) -> None:
        """Give a session's place to others."""
        if (spare := session.forgetting.taken()) is not None:
            self.give(spare)
        place = session.place
        if isinstance(place, TargetPlace):
            place.cut(0)
            with self._seats:
                self.taken.discard(place.number)

    def take(self) -> TargetPlace | None:
        """Return a spare place, if there is one: see `Spares`."""
        with self._seats:
            if self.spare >= self.places - self.sessions:
                return None
            self.spare += 1
            return self._free()

    def give(self, place: Place) -> None:
        """Take back a place: the spare one, or that of the session which has the spare one now."""
        if isinstance(place, TargetPlace):
            place.cut(0)
            with self._seats:
                self.taken.discard(place.number)
                self.spare -= 1

    def _free(self) -> TargetPlace:
        free = next(number for number in range(self.places) if number not in self.taken)
        self.taken.add(free)
        return TargetPlace(self.target, free, self.lock, most=self.settings.high)

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
        ahead=kv.ahead_tokens,
        guesses=recipe.sampling.prompt_lookup_num_tokens,
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
    engine = open_engine(replace(job, recipe=given, rows=recipe.places(sessions)), config)
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
        max(min(engine.rows, recipe.places(sessions)), sessions),
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
