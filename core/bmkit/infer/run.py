"""The infer engine: rows in, answers, scores, labels or embeddings out, in order."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

import torch

from bmkit import model as models
from bmkit.data.rows import BadRow, Row
from bmkit.deltas import plugged
from bmkit.errors import InputError, ResourceError, UsageError, an_artifact
from bmkit.infer import encode, score
from bmkit.infer.recipe import InferRecipe
from bmkit.plan import Job
from bmkit.runtime import heads
from bmkit.runtime.adapters import adapters_of
from bmkit.runtime.answered import Answered, how_to
from bmkit.runtime.generate import Answer, eos_ids, generate
from bmkit.runtime.opening import open_engine, peak_gpu_bytes
from bmkit.runtime.prompts import Bad, Prompt, Reader

WINDOW_BATCHES = 8
"""Rows of this many batches are sorted by length together: less padding, answers still flow."""


Result = Answered | score.Scored | encode.Labelled | encode.Tagged | encode.Embedded
_NOTHING: tuple[Any, Any] = (None, None)
_READING: dict[str, Any] = {"classify": "encode", "embed": "encode", "tag": "tag"}
"""How rows are read for a model's task, where it isn't to generate."""


class Session:
    """A model, loaded with its adapters, that answers rows."""

    def __init__(self, job: Job) -> None:
        recipe = job.recipe
        assert isinstance(recipe, InferRecipe)  # the registry pairs recipe and engine
        self.recipe = recipe
        if job.threads:
            torch.set_num_threads(job.threads)
        self.tokenizer = models.load_tokenizer(job.checkpoint)
        config, head = _config(job, self.tokenizer)
        task = models.task(config)
        if recipe.score and task != "generate":
            raise UsageError(f"{job.checkpoint} doesn't generate text: it has nothing to --score")
        self.encodes = task if task != "generate" else None
        self.context = models.context(config)
        self.encoder_decoder = bool(config.is_encoder_decoder)
        self.tokens = self.scored_tokens = 0
        self.logprob = self.seconds = 0.0
        self.adapters = adapters_of(job).names
        self.reader = Reader(
            self.tokenizer,
            recipe,
            context=self.context,
            encoder=self.encoder_decoder or self.encodes is not None,
            task="score" if recipe.score else _READING.get(task, "generate"),
            adapters=self.adapters,
            headed=head is not None,
        )
        self.pads = config.model_type not in models.READ_PADDING
        self.pooling = encode.Pooling.of(job.checkpoint) if task == "embed" else None
        self.tags = task == "tag"
        self.engine = open_engine(job, config, head=head is not None)
        self.reader.most = self.engine.most_tokens
        self.rss_before_bytes = self.engine.rss_before_bytes
        front = plugged.in_front(self.engine.model)
        if front is not None:  # positions are counted from behind what stands in front
            self.pads = False
            if self.context is not None:
                self.context = self.reader.context = self.context - front
        self.front = front
        self.server = self._server(job)
        self.static = self._static(job.rows)

    def _server(self, job: Job) -> Any:
        if self.engine.decoder is None:
            return None
        from bmkit.runtime.cpu.serve import Server

        eos = eos_ids(models.load_generation_config(job.checkpoint), self.tokenizer)
        return Server(
            self.engine.decoder,
            self.tokenizer,
            eos,
            how_to(self.recipe, self.recipe.max_new_tokens),
            rows=self.engine.rows,
            most=self.engine.most_tokens,
        )

    def _static(self, rows: int | None) -> bool:
        """Tell whether the cache has a fixed size: compiling for it pays for many prompts only."""
        if self.engine.model is None:
            return False
        streams = self.engine.placed is not None and self.engine.placed.streamed_bytes > 0
        many = rows is None or rows >= 8 * self.recipe.batch_size
        can = not getattr(self.engine.model, "_is_stateful", False) and not self.encoder_decoder
        can = can and not streams and self.front is None
        if self.recipe.cache == "static" and not can:
            raise ResourceError(
                "cache: static can't be had with this model, or with weights that are streamed",
                hint="leave it at auto",
            )
        if self.recipe.cache != "auto":
            return self.recipe.cache == "static"
        return self.engine.device.type == "cuda" and many and can

    def close(self) -> None:
        """End: nothing is kept."""

    def answer(
        self,
        given: Iterable[Row | BadRow],
        *,
        write: Callable[[str], None] | None = None,
        done: int = 0,
    ) -> Iterator[Result | BadRow]:
        """Answer rows of `prompt` or `messages`, batched by length, in the order they came.

        A row that can't be used comes back as a BadRow in its place. `write` gets the text of each
        answer while it is made; rows are then answered one at a time. The first `done` rows that
        can be used are passed over: an earlier run has answered them.
        """
        read = self._rest(given, done)
        if self.recipe.score:
            yield from map(self._score, read)
        elif self.encodes:
            yield from self._encode(read)
        elif self.server is not None:
            yield from self._serve(read, write)
        else:
            yield from self._generate(read, write)

    def _rest(self, given: Iterable[Row | BadRow], done: int) -> Iterator[Prompt | Bad]:
        for number, row in enumerate(given):
            found = self.reader.read(number, row)
            if done and isinstance(found, Prompt):
                done -= 1
            else:
                yield found

    def _generate(
        self, read: Iterator[Prompt | Bad], write: Callable[[str], None] | None
    ) -> Iterator[Result | BadRow]:
        """Answer in transformers' own code, rows of like length together."""
        size = 1 if write else self.engine.rows
        window = size if write else size * WINDOW_BATCHES
        while taken := list(itertools.islice(read, window)):
            done: dict[int, Result | BadRow] = {}
            prompts = []
            for found in taken:
                if isinstance(found, Bad):
                    done[found.number] = found.row
                else:
                    prompts.append(found)
            waiting = [found.number for found in reversed(taken)]
            for batch in [*self._batches(prompts, size), []]:
                while waiting and waiting[-1] in done:
                    yield done.pop(waiting.pop())
                for prompt, answer in self._batch(batch, write):
                    done[prompt.number] = Answered(prompt.id, prompt.text, answer)

    def _serve(
        self, read: Iterator[Prompt | Bad], write: Callable[[str], None] | None
    ) -> Iterator[Result | BadRow]:
        """Answer on packed weights: rows begin and end when they can, and come back in order."""
        if write:
            self.server.rows = 1
        numbers: list[int] = []

        def noted() -> Iterator[Prompt | Bad]:
            for prompt in read:
                numbers.append(prompt.number)
                yield prompt

        done: dict[int, Result | BadRow] = {}
        due = 0
        with closing(self.server.answer(noted(), write=write)) as found:
            while True:
                start = time.perf_counter()
                prompt, answer = next(found, _NOTHING)
                self.seconds += time.perf_counter() - start
                if prompt is None:
                    return
                if isinstance(prompt, Prompt):
                    self.tokens += len(answer.token_ids)
                    done[prompt.number] = Answered(prompt.id, prompt.text, answer)
                else:
                    done[prompt.number] = prompt.row
                while due < len(numbers) and numbers[due] in done:
                    yield done.pop(numbers[due])
                    due += 1

    def _score(self, prompt: Prompt | Bad) -> Result | BadRow:
        if isinstance(prompt, Bad):
            return prompt.row
        start = time.perf_counter()
        if self.engine.decoder is not None:
            self.engine.decoder.choose(prompt.adapter)
            found = score.packed(self.engine.decoder, prompt.ids, prompt.scored, self.context)
        else:
            with plugged.only(self.engine.model, prompt.adapter):
                found = score.score(self.engine.model, prompt.ids, prompt.scored, self.context)
        seconds = time.perf_counter() - start
        result = score.Scored(prompt.id, prompt.text, prompt.ids, found, seconds)
        self.seconds += seconds
        self.tokens += len(prompt.ids)
        self.scored_tokens += len(found)
        self.logprob += result.logprob
        return result

    def _encode(self, read: Iterator[Prompt | Bad]) -> Iterator[Result | BadRow]:
        """Read rows in the order they came, some together."""
        config = self.engine.model.config
        pad = getattr(config.get_text_config(), "pad_token_id", None)
        if pad is None:
            pad = self.tokenizer.pad_token_id or 0
        # A decoder that classifies looks for its last token by its config's padding token.
        alone = self.encodes == "classify" and config.pad_token_id is None
        while taken := list(itertools.islice(read, 1 if alone else self.engine.rows)):
            good = [p for p in taken if isinstance(p, Prompt)]
            start = time.perf_counter()
            vectors = iter(self._vectors(good, pad))
            self.seconds += time.perf_counter() - start
            self.tokens += sum(len(p.ids) for p in good)
            for found in taken:
                if isinstance(found, Bad):
                    yield found.row
                elif self.pooling is not None:
                    yield encode.Embedded(found.id, found.text, next(vectors))
                elif self.tags:
                    yield self._tagged(found, next(vectors))
                else:
                    labels = self.engine.model.config.id2label
                    pairs = {str(labels[i]): p for i, p in enumerate(next(vectors))}
                    yield encode.Labelled(found.id, found.text, pairs)

    def _vectors(self, prompts: list[Prompt], pad: int) -> list[Any]:
        """Return what the model says of prompts, those of one adapter read together."""
        found: list[Any] = [None] * len(prompts)
        for adapter in dict.fromkeys(p.adapter for p in prompts):
            mine = [i for i, p in enumerate(prompts) if p.adapter == adapter]
            with plugged.only(self.engine.model, adapter):
                rows, types = ([getattr(prompts[i], n) for i in mine] for n in ("ids", "types"))
                said = encode.encode(self.engine.model, rows, pad, self.pooling, types)
            for i, vector in zip(mine, said, strict=True):
                found[i] = vector
        return found

    def _tagged(self, prompt: Prompt, shares: Any) -> encode.Tagged:
        labels = self.engine.model.config.id2label
        best = shares[list(prompt.places)].max(-1)
        tags = [str(labels[i]) for i in best.indices.tolist()]
        return encode.Tagged(prompt.id, prompt.text, prompt.words, tags, best.values.tolist())

    def peak_gpu_bytes(self) -> int:
        """Return the most GPU memory that was held, CUDA's own included; 0 on the CPU."""
        return peak_gpu_bytes(self.engine.device)

    def figures(self) -> dict[str, Any]:
        """Return what a report says besides time and memory."""
        if not self.recipe.score:
            return {}
        mean = -self.logprob / max(self.scored_tokens, 1)
        whole = score.Scored(None, "", [], [-mean], 0.0)
        return {
            "logprob": round(self.logprob, 6),
            "scored_tokens": self.scored_tokens,
            "perplexity": round(whole.perplexity, 6),
        }

    def _batches(self, prompts: list[Prompt], size: int) -> list[list[Prompt]]:
        """Group prompts of one adapter by length, those that are due first coming first.

        A model that reads padding as text gets prompts of the same length together.
        A prompt near the end of the context is answered alone: what it leaves room for must not
        bound the answers of others.
        """
        most = self.recipe.max_new_tokens
        groups = [[p] for p in prompts if self._room(p) < most]
        roomy = sorted((p for p in prompts if self._room(p) == most), key=lambda p: -len(p.ids))
        kinds: dict[Any, list[Prompt]] = {}
        for p in roomy:
            kinds.setdefault((p.adapter, None if self.pads else len(p.ids)), []).append(p)
        for mine in kinds.values():
            groups += [mine[i : i + size] for i in range(0, len(mine), size)]
        return sorted(groups, key=lambda group: min(p.number for p in group))

    def _room(self, prompt: Prompt) -> int:
        most = self.recipe.max_new_tokens
        if self.context is None:
            return most
        return min(most, self.context - (0 if self.encoder_decoder else len(prompt.ids)))

    def _batch(
        self, prompts: list[Prompt], write: Callable[[str], None] | None
    ) -> list[tuple[Prompt, Answer]]:
        if not prompts:
            return []
        how = how_to(self.recipe, min(map(self._room, prompts)))
        start = time.perf_counter()
        with plugged.only(self.engine.model, prompts[0].adapter):
            answers = generate(
                self.engine.model,
                self.tokenizer,
                [p.ids for p in prompts],
                how,
                numbers=[p.number for p in prompts],
                write=write,
                chunk=self.engine.chunk,
                static=self.static,
            )
        self.seconds += time.perf_counter() - start
        self.tokens += sum(len(a.token_ids) for a in answers)
        return list(zip(prompts, answers, strict=True))


def _config(job: Job, tokenizer: Any) -> tuple[Any, heads.Head | None]:
    """Return the model's config, with the head that its adapter was trained with, if it was."""
    found = {head for path in job.adapter_paths if (head := heads.read(path))}
    if len(found) > 1:
        raise InputError("these adapters were trained with different labels or tasks")
    if not found:
        return models.load_config(job.checkpoint), None
    (head,) = found
    if head.task == "masked_lm":
        raise InputError(
            "this adapter was trained to fill gaps, which `infer` doesn't",
            hint="use it in `bmkit prompt`, or merge it: bmkit tune with merge: true",
        )
    return heads.config_of(job.checkpoint, head, tokenizer), head


def run(job: Job) -> Session:
    """Load what the job names. Raises InputError for what can't be loaded."""
    if job.model.kind not in {"model", "delta"}:
        raise InputError(f"{job.model.path} is {an_artifact(job.model.kind)}")
    return Session(job)
