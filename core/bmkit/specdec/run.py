"""The spec-decode engine: rows in, the target's own answers out, and how they were found."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from bmkit import model as models
from bmkit.data.rows import BadRow, Row
from bmkit.deltas import plugged
from bmkit.errors import InputError, ResourceError, an_artifact
from bmkit.plan import Job
from bmkit.runtime import frequent
from bmkit.runtime.adapters import adapters_of
from bmkit.runtime.answered import Answered, how_to
from bmkit.runtime.choose import draft_job
from bmkit.runtime.generate import Answer, eos_ids
from bmkit.runtime.opening import Engine, open_engine, peak_gpu_bytes
from bmkit.runtime.prompts import Bad, Prompt, Reader
from bmkit.runtime.speculation import calibrate, pool
from bmkit.runtime.speculation.draft import Draft
from bmkit.runtime.speculation.engine import ALONE, Settings, Speculator, Stats
from bmkit.runtime.speculation.opened import may_be_static, target_of
from bmkit.runtime.speculation.phrases import Phrases
from bmkit.runtime.speculation.retokenised import Retokenised
from bmkit.runtime.speculation.static import StaticTarget
from bmkit.runtime.speculation.targets import DecoderTarget, Target
from bmkit.specdec.compare import Comparison, Rival, Transformers
from bmkit.specdec.exact import Exactness
from bmkit.specdec.recipe import SpecDecodeRecipe


@dataclass(frozen=True)
class Spoken(Answered):
    """A row, its answer, and where each of its tokens came from."""

    streamed: ClassVar = True
    origins: tuple[str, ...] = ()
    """`target`, `draft`, `prompt`, `answers` (rejected guesses, corrected), `history`, `window`."""
    decode: Callable[[list[int]], str] = field(default=str, repr=False)

    def pieces(self) -> list[str]:
        """Return the text that each token adds: of a character of several, the last one adds it."""
        whole, ids = self.answer.text, self.answer.token_ids
        found, before = [], 0
        for count in range(1, len(ids) + 1):
            pairs = enumerate(zip(self.decode(ids[:count]), whole, strict=False))
            part = next((i for i, (a, b) in pairs if a != b), None)
            if part is None:
                part = min(len(self.decode(ids[:count])), len(whole))
            after = max(part, before)
            found.append(whole[before:after])
            before = after
        if found:
            found[-1] += whole[before:]
        return found

    def values(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {**super().values(), "origins": list(self.origins)}


class Session:
    """A target, what guesses for it, and what was learned so far."""

    def __init__(self, job: Job) -> None:
        recipe = job.recipe
        assert isinstance(recipe, SpecDecodeRecipe)  # the registry pairs recipe and engine
        self.recipe, self.job = recipe, job
        if job.threads:
            torch.set_num_threads(job.threads)
        self.tokenizer = models.load_tokenizer(job.checkpoint)
        config = models.load_config(job.checkpoint)
        if models.task(config) != "generate":
            raise InputError(f"{job.checkpoint} doesn't generate text")
        self.context = models.context(config)
        self.adapters = adapters_of(job).names
        self.digest = pool.tokenizer_digest(self.tokenizer)
        self.vocabulary = max(len(self.tokenizer), int(config.get_text_config().vocab_size))
        self.pool = self._pool(job.phrases)
        self.reader = Reader(
            self.tokenizer,
            recipe,
            context=self.context,
            encoder=bool(config.is_encoder_decoder),
            task="generate",
            adapters=self.adapters,
        )
        self.engine = open_engine(job, config)
        if plugged.in_front(self.engine.model) is not None:
            raise InputError(
                "a delta stands in front of what the model reads: guesses can't be verified then",
                hint="use infer, or a delta inside the model",
            )
        spare = recipe.guesses
        if self.engine.most_tokens is not None:
            self.reader.most = self.engine.most_tokens - spare
        self.rss_before_bytes = self.engine.rss_before_bytes
        self.generation = models.load_generation_config(job.checkpoint)
        self.eos = eos_ids(self.generation, self.tokenizer)
        if recipe.cache == "static" and not may_be_static(self.engine):
            raise ResourceError(
                "cache: static can't be had with this model, its dtype or its weights' place",
                hint="leave it at auto",
            )
        name = f"{(job.base or job.model).digest} {recipe.dtype} {self.engine.device}"
        self.target = target_of(self.engine, name, recipe.cache)
        if not (self.target.trees or config.is_encoder_decoder):
            job.reporter.warn(
                f"{type(self.engine.model).__name__} takes no mask of ours: guesses are "
                "verified one chain at a time"
            )
        self.draft = self._draft(job, config)
        reader = self.target if self.draft is None else self.draft.model
        if recipe.window and (not reader.trees or isinstance(self.draft, Retokenised)):
            job.reporter.warn("window: none is used, what would read it takes chains only")
        self.server = self.speculator = self.speculate(self.engine.rows)
        if job.phrases is not None:
            self.speculator.said = []
        self.tokens = 0
        self.seconds = 0.0
        self.exactness: Exactness | None = None
        if recipe.verify_exact:
            dtype = torch.float32 if self.engine.model is None else self.engine.model.dtype
            self.exactness = Exactness(dtype)
        self.comparison = Comparison(self._rivals()) if recipe.compare else None

    def _pool(self, path: Path | None) -> Phrases:
        if path is None or not path.exists():
            return Phrases(limit=pool.LIMIT)
        return pool.read(path, self.digest, self.vocabulary)

    def _draft(self, job: Job, config: Any) -> Draft | None:
        if job.draft is None:
            return None
        recipe = self.recipe
        where = job.draft.path
        tokenizer = models.load_tokenizer(where)
        same = pool.tokenizer_digest(tokenizer) == self.digest
        own = models.load_config(where)
        if models.task(own) != "generate":
            raise InputError(f"the draft {where} doesn't generate text")
        if own.is_encoder_decoder or config.is_encoder_decoder:
            raise ResourceError(
                "a draft can't guess for an encoder-decoder",
                hint="leave -d out: phrases of the prompt and of answers are guesses too",
            )
        own_size = own.get_text_config().vocab_size
        opened = open_engine(draft_job(job), own, said=frequent.read(where, own_size))
        if job.draft.path != job.checkpoint and _size(opened) > _size(self.engine):
            job.reporter.warn(f"the draft {where} is larger than its target")
        name = f"{job.draft.digest} draft {recipe.of_draft().quant} {opened.device}"
        model = target_of(opened, name, recipe.cache)
        if isinstance(model, DecoderTarget) and same:
            model.least = self.engine.most_tokens or 0  # a budget has no room for two caches
            model.rows = self.engine.rows
        if not same:
            if not recipe.retokenise:
                raise InputError(
                    f"the draft {where} has another tokenizer than its target",
                    hint="`-s retokenise=true` lets them exchange text",
                )
            return Retokenised(model, tokenizer, self.tokenizer, context=models.context(own))
        return Draft(
            model,
            phrases=min(recipe.topk, 2),
            length=min(recipe.phrase_length, 6),
            context=models.context(own),
            window=recipe.window,
            levels=recipe.levels,
            alike=job.draft.path == job.checkpoint,
        )

    def speculate(self, rows: int, *, settings: Settings | None = None) -> Speculator:
        """Return what answers: as the recipe says, or by other `settings` with nothing learned."""
        recipe = self.recipe
        found = settings or Settings(
            draft_length=recipe.draft_length,
            topk=recipe.topk,
            phrase_length=recipe.phrase_length,
            adaptive=recipe.adaptive,
            window=recipe.window,
            levels=recipe.levels,
        )
        speculator = Speculator(
            self.target,
            self.tokenizer,
            self.eos,
            how_to(recipe, recipe.max_new_tokens, config=self.generation),
            rows=rows,
            context=self.context,
            draft=self.draft if found.draft_length != 0 else None,
            history=self.pool if settings is None else None,
            settings=found,
        )
        kind = f"{recipe.quant} {recipe.dtype} {self.engine.device} {torch.get_num_threads()}"
        kind += f" {self.job.cpu_memory} {self.job.gpu_memory}"
        model = (self.job.base or self.job.model).digest
        speculator.costs = calibrate.costs(self.target, f"{model} {kind}")
        if self.draft is not None and self.job.draft is not None:
            draft = f"{self.job.draft.digest} draft {recipe.of_draft().quant} {kind}"
            self.draft.costs = calibrate.costs(self.draft.model, draft)
        return speculator

    def _rivals(self) -> dict[str, Rival]:
        """Return what answers the same prompts, by its name."""
        wanted = self.recipe.compare
        found: dict[str, Rival] = {}
        for name, settings in (("greedy", ALONE), ("lookahead", LOOKAHEAD)):
            if name in wanted:
                found[name] = _alone(self.speculate(1, settings=settings))
        theirs = [name for name in wanted if name not in found]
        if theirs:
            how = how_to(self.recipe, self.recipe.max_new_tokens)
            them = Transformers(self.job, self.tokenizer, how, self.engine.device)
            methods = {
                "transformers": them.greedy,
                "assisted": them.assisted,
                "prompt-lookup": them.prompt_lookup,
            }
            found |= {name: Rival(methods[name], lambda: them.forwards) for name in theirs}
        return {name: found[name] for name in wanted}

    def answer(
        self,
        given: Iterable[Row | BadRow],
        *,
        write: Callable[[str], None] | None = None,
        done: int = 0,
    ) -> Iterator[Spoken | BadRow]:
        """Answer rows of `prompt` or `messages`, in the order they came.

        A row that can't be used comes back as a BadRow in its place. `write` gets the text of each
        answer while it is made; rows are then answered one at a time. The first `done` rows that
        can be used are passed over. What was said goes to the pool, also if the run is stopped.
        """
        said: list[tuple[Prompt, list[int]]] = []
        rows = self._compared if self.comparison is not None else self._together
        try:
            for prompt, found in rows(given, write, done):
                if self.exactness is not None and isinstance(found, Spoken):
                    said.append((prompt, found.answer.token_ids))
                yield found
            if self.exactness is not None:
                plain = self.speculate(1, settings=ALONE)
                for prompt, ids in said:
                    self.exactness.check(plain, prompt, ids)
        finally:
            if not self.speculator.reuse:
                self.close()

    def _together(
        self, given: Iterable[Row | BadRow], write: Callable[[str], None] | None, done: int
    ) -> Iterator[tuple[Any, Spoken | BadRow]]:
        """Answer several rows at a time."""
        if write:
            self.speculator.rows = 1
        numbers: list[int] = []
        found = self.speculator.answer(self._read(given, done, numbers), write=write)
        ready: dict[int, tuple[Any, Spoken | BadRow]] = {}
        due = 0
        with closing(found):
            while True:
                start = time.perf_counter()
                prompt, answer, origins = next(found, (None, None, []))
                self.seconds += time.perf_counter() - start
                if prompt is None:
                    return
                spoken = prompt.row if answer is None else self._spoken(prompt, answer, origins)
                ready[prompt.number] = (prompt, spoken)
                while due < len(numbers) and numbers[due] in ready:
                    yield ready.pop(numbers[due])
                    due += 1

    def _compared(
        self, given: Iterable[Row | BadRow], write: Callable[[str], None] | None, done: int
    ) -> Iterator[tuple[Any, Spoken | BadRow]]:
        """Answer one row at a time, in turns with the others."""
        assert self.comparison is not None  # the caller has looked
        self.speculator.rows = 1
        last: list[Spoken] = []

        def own(prompt: Any) -> list[int]:
            start = time.perf_counter()
            _, answer, origins = next(self.speculator.answer([prompt], write=write))
            self.seconds += time.perf_counter() - start
            assert answer is not None  # a prompt is answered
            last.append(self._spoken(prompt, answer, origins))
            return answer.token_ids

        for prompt in self._read(given, done, []):
            if isinstance(prompt, Bad):
                yield prompt, prompt.row
                continue
            self.comparison.run(prompt, Rival(own, self.speculator.stats.forwards))
            yield prompt, last.pop()

    def _spoken(self, prompt: Any, answer: Answer, origins: list[str]) -> Spoken:
        self.tokens += len(answer.token_ids)

        def decode(ids: list[int]) -> str:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))

        return Spoken(prompt.id, prompt.text, answer, tuple(origins), decode)

    def _read(
        self, given: Iterable[Row | BadRow], done: int, numbers: list[int]
    ) -> Iterator[Prompt | Bad]:
        for number, row in enumerate(given):
            found = self.reader.read(number, row)
            if done and isinstance(found, Prompt):
                done -= 1
                continue
            numbers.append(number)
            yield found

    def close(self) -> None:
        """Add what was said to the pool on disk; of a chat, once it is over."""
        path, said = self.job.phrases, self.speculator.said
        if path is None or not said:
            return
        pool.add(path, said, tokenizer=self.digest, vocabulary=self.vocabulary)
        self.speculator.said = []

    def peak_gpu_bytes(self) -> int:
        """Return the most GPU memory that was held, CUDA's own included; 0 on the CPU."""
        return peak_gpu_bytes(self.engine.device)

    def figures(self) -> dict[str, Any]:
        """Return what a report says besides time and memory."""
        found = figures(self.speculator)
        found["cache"] = _cache(self.target)
        if self.draft is not None:
            found["draft_cache"] = _cache(self.draft.model)
        if self.comparison is not None:
            found["compare"] = self.comparison.values()
        if self.exactness is not None:
            found["exact"] = self.exactness.values()
        return found

    def rounds(self) -> list[int]:
        """Return how many tokens each forward of the target has given."""
        return self.speculator.stats.rounds

    def told(self) -> list[str]:
        """Return what is said to people at the end of a run."""
        found = figures(self.speculator)
        rate = self.tokens / max(self.seconds, 1e-9)
        lines = [
            f"{self.tokens} tokens in {self.seconds:.2f} s, {rate:.1f} a second; "
            f"{found['target_forwards']} forwards of the target, {found['draft_forwards']} of a "
            f"draft, {found['mean_accepted_length']:.2f} tokens a forward"
        ]
        sources = found["acceptance"]["by_source"]
        right = [f"{name} {s['accepted']} of {s['verified']}" for name, s in sources.items()]
        if right:
            lines.append(f"guesses that were right: {', '.join(right)}")
        if self.comparison is not None:
            lines += self.comparison.table()
        if (exact := self.exactness) is not None:
            wrong = len(exact.differences) - exact.ties
            lines.append(
                f"{exact.identical} of {exact.rows} answers are the target's own token by token; "
                f"{exact.ties} differ by a tie of two tokens, {wrong} by more"
            )
        return lines


LOOKAHEAD = Settings(draft_length=0, harvest=False, window=5, levels=4, sources=("answers",))
"""Lookahead decoding (arXiv 2402.02057): a Jacobi window, and the phrases that it finds."""


def _alone(speculator: Speculator) -> Rival:
    def answer(prompt: Any) -> list[int]:
        _, found, _ = next(speculator.answer([prompt]))
        assert found is not None  # a prompt is answered
        return found.token_ids

    return Rival(answer, speculator.stats.forwards)


def _cache(target: Target) -> str:
    """Say where keys and values are: in the fused decoder's arrays, or in a cache of which kind."""
    if isinstance(target, DecoderTarget):
        return "fused"
    return "static" if isinstance(target, StaticTarget) else "dynamic"


def _size(engine: Engine) -> int:
    if engine.decoder is not None:
        return int(engine.decoder.bytes_a_token)
    return sum(p.numel() * p.element_size() for p in engine.model.parameters())


def figures(speculator: Speculator) -> dict[str, Any]:
    """Return what was counted: forwards, tokens a forward, what was right, what it cost."""
    stats: Stats = speculator.stats
    forwards = max(stats.target_forwards, 1)
    found: dict[str, Any] = {
        "target_forwards": stats.target_forwards,
        "mean_accepted_length": round(stats.steps_tokens / max(stats.row_forwards, 1), 4),
        "nodes_a_forward": round(stats.nodes / forwards, 2),
        "draft_forwards": 0,
        "acceptance": {
            "by_source": {
                name: {
                    "verified": stats.verified[name],
                    "accepted": stats.accepted[name],
                    "share": round(stats.accepted[name] / count, 4),
                }
                for name, count in sorted(stats.verified.items())
                if count
            },
            "by_depth": {
                str(depth): round(stats.depth_right[depth] / count, 4)
                for depth, count in sorted(stats.depth_tried.items())
                if count
            },
            "per_forward": dict(sorted(Counter(stats.rounds).items())),
        },
        "chosen": {
            "tokens_a_forward": {str(k): v for k, v in sorted(stats.sizes.items())},
            "drafted": {str(k): v for k, v in sorted(stats.drafted.items())},
        },
        "phases": {
            "verify_seconds": round(stats.verify_seconds, 4),
            "draft_seconds": 0.0,
            "other_seconds": round(stats.seconds - stats.verify_seconds, 4),
        },
        "cost": {str(k): round(v, 6) for k, v in sorted(speculator.costs.table().items())},
    }
    draft = speculator.draft
    if draft is not None:
        found["draft_forwards"] = draft.forwards
        found["draft_tokens"] = draft.tokens
        found["phases"]["draft_seconds"] = round(stats.draft_seconds, 4)
        found["phases"]["other_seconds"] = round(
            stats.seconds - stats.verify_seconds - stats.draft_seconds, 4
        )
        found["draft_cost"] = {str(k): round(v, 6) for k, v in sorted(draft.costs.table().items())}
    return found


def run(job: Job) -> Session:
    """Load what the job names. Raises InputError for what can't be loaded."""
    if job.model.kind not in {"model", "delta"}:
        raise InputError(f"{job.model.path} is {an_artifact(job.model.kind)}")
    return Session(job)
