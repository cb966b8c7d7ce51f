"""Rivals on the same prompts, in turns: what people use instead, and bmkit without guesses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bmkit import model as models
from bmkit.deltas import plugged
from bmkit.plan import Job
from bmkit.runtime import experts
from bmkit.runtime.adapters import adapters_of
from bmkit.runtime.generate import Generation, generate, plain_defaults
from bmkit.specdec.recipe import SpecDecodeRecipe

Answerer = Callable[[Any], list[int]]
"""Answers a prompt (with `number`, `ids`, `adapter`) with token ids."""


@dataclass(frozen=True)
class Rival:
    """How somebody answers, and how often the target was run for it by now, prompts included."""

    answer: Answerer
    forwards: Callable[[], int]


@dataclass
class Tally:
    """How one of them did."""

    rows: int = 0
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    identical: int = 0

    @property
    def rate(self) -> float:
        """Return tokens per second, reading the prompts included."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def length(self) -> float:
        """Return tokens per forward of the target, those that read the prompts included."""
        return self.tokens / max(self.forwards, 1)


class Comparison:
    """Rivals by name, and how they and our own answers did."""

    def __init__(self, rivals: dict[str, Rival]) -> None:
        self.rivals = rivals
        self.own = Tally()
        self.tallies = {name: Tally() for name in rivals}
        self.warm = False

    def run(self, prompt: Any, own: Rival) -> None:
        """Let all answer one prompt, beginning with another one each time."""
        if not self.warm:  # what is made at the first call counts for nobody
            for rival in self.rivals.values():
                rival.answer(prompt)
            self.warm = True
        names: list[str | None] = [None, *self.rivals]
        first = self.own.rows % len(names)
        said: dict[str | None, list[int]] = {}
        for name in names[first:] + names[:first]:
            rival, tally = (
                (own, self.own) if name is None else (self.rivals[name], self.tallies[name])
            )
            before = rival.forwards()
            start = time.perf_counter()
            said[name] = rival.answer(prompt)
            tally.seconds += time.perf_counter() - start
            tally.forwards += rival.forwards() - before
            tally.tokens += len(said[name])
            tally.rows += 1
        for name, tally in self.tallies.items():
            tally.identical += said[name] == said[None]

    def values(self) -> dict[str, Any]:
        """Return what a report holds: `ratio` is how many times as fast bmkit's answers came."""
        return {
            name: {
                "tokens_per_second": round(tally.rate, 2),
                "ratio": round(self.own.rate / max(tally.rate, 1e-9), 3),
                "tokens_per_forward": round(tally.length, 4),
                "identical": tally.identical == tally.rows,
                "identical_rows": tally.identical,
                "rows": tally.rows,
            }
            for name, tally in self.tallies.items()
        }

    def table(self) -> list[str]:
        """Return the lines of a table."""
        rows = [("", "tokens/s", "this is", "tokens a forward", "same answers")]
        rows.append(("spec-decode", f"{self.own.rate:.1f}", "", f"{self.own.length:.2f}", ""))
        for name, found in self.values().items():
            same = f"{found['identical_rows']} of {found['rows']}"
            times = f"{found['ratio']:.2f} x"
            length = f"{found['tokens_per_forward']:.2f}"
            rows.append((name, f"{found['tokens_per_second']:.1f}", times, length, same))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]


class Transformers:
    """The target in transformers' own code and precision, and what it offers to speed it up."""

    def __init__(self, job: Job, tokenizer: Any, how: Generation, device: torch.device) -> None:
        recipe = job.recipe
        assert isinstance(recipe, SpecDecodeRecipe)  # the registry pairs recipe and engine
        self.tokenizer, self.how = tokenizer, how
        self.model = self._load(job, job.checkpoint, device)
        self.forwards = 0
        self.model.register_forward_hook(self._count)
        self.draft: Any = None
        self.draft_tokenizer: Any = None
        if "assisted" in recipe.compare and job.draft is not None:
            self.draft = self._load(job, job.draft.path, device)
            own = models.load_tokenizer(job.draft.path)
            if own.get_vocab() != tokenizer.get_vocab():
                self.draft_tokenizer = own

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def _load(self, job: Job, path: Any, device: torch.device) -> Any:
        model = models.load_model(path, device=device, dtype=job.recipe.dtype)
        plain_defaults(model)
        if path == job.checkpoint:
            asked_for = adapters_of(job)
            model = plugged.load(model, asked_for.folders, asked_for.wholes)
        experts.attach_stored(model, path)
        return model

    def _answer(self, prompt: Any, **more: Any) -> list[int]:
        with plugged.only(self.model, prompt.adapter):
            (answer,) = generate(
                self.model,
                self.tokenizer,
                [prompt.ids],
                self.how,
                numbers=[prompt.number],
                more=more,
            )
        return answer.token_ids

    def greedy(self, prompt: Any) -> list[int]:
        """Answer token by token."""
        return self._answer(prompt)

    def assisted(self, prompt: Any) -> list[int]:
        """Answer with the same draft, by transformers' assisted generation."""
        more = {"assistant_model": self.draft}
        if self.draft_tokenizer is not None:
            more |= {"tokenizer": self.tokenizer, "assistant_tokenizer": self.draft_tokenizer}
        return self._answer(prompt, **more)

    def prompt_lookup(self, prompt: Any) -> list[int]:
        """Answer with n-grams of the prompt as guesses."""
        return self._answer(prompt, prompt_lookup_num_tokens=10)
