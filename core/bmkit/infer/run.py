"""The infer engine: rows in, answers out, in order."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bmkit import env
from bmkit import model as models
from bmkit.data import chat, rows
from bmkit.data.rows import BadRow, Row
from bmkit.errors import InputError, ResourceError
from bmkit.infer.plan import Chosen, choose
from bmkit.infer.recipe import InferRecipe
from bmkit.plan import Job, read_headers
from bmkit.runtime.generate import Answer, Generation, eos_ids, generate, plain_defaults

WINDOW_BATCHES = 8
"""Rows of this many batches are sorted by length together: less padding, answers still flow."""


@dataclass(frozen=True)
class Answered:
    """One row and its answer."""

    id: Any
    prompt: str
    answer: Answer


@dataclass(frozen=True)
class _Prompt:
    number: int
    id: Any
    text: str
    ids: list[int]


@dataclass(frozen=True)
class _Bad:
    number: int
    row: BadRow


_NOTHING: tuple[Any, Any] = (None, None)


class Session:
    """A model, loaded with its adapters, that answers rows."""

    def __init__(self, job: Job) -> None:
        recipe = job.recipe
        assert isinstance(recipe, InferRecipe)  # the registry pairs recipe and engine
        self.recipe = recipe
        if job.threads:
            torch.set_num_threads(job.threads)
        self.device = models.pick_device(recipe.device)
        self.tokenizer = models.load_tokenizer(job.checkpoint)
        config = models.load_config(job.checkpoint)
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.tokens = 0
        self.seconds = 0.0
        self.raw = recipe.raw or self.tokenizer.chat_template is None
        self.chosen = choose(job, read_headers(job.checkpoint))
        self.rows = recipe.batch_size
        self.chunk: int | None = None
        self.placed: Any = None
        self.server = self._server(job, config)
        if self.server is None:
            self.rss_before_bytes = env.rss_bytes()
            model = self._placed(job) or models.load_model(
                job.checkpoint, device=self.device, dtype=recipe.dtype
            )
            plain_defaults(model)
            self.model = models.attach(model, [delta.path for delta in job.deltas])

    def _server(self, job: Job, config: Any) -> Any:
        """Return what answers on packed weights, where the device and the model allow it."""
        found = self.chosen.placement
        if self.chosen.way != "packed" or found is None:
            return None
        from bmkit.runtime import cpu
        from bmkit.runtime.cpu import load
        from bmkit.runtime.cpu.serve import Server

        if not cpu.compiled():
            job.reporter.info("compiling kernels for this machine, once (some 15 seconds)")

        threads = torch.get_num_threads()
        load.warm(threads)
        env.forget_peak_rss()
        self.rss_before_bytes = env.rss_bytes()
        decoder = load.load_decoder(
            job.checkpoint, threads=threads, quant=self.recipe.quant, placement=found
        )
        budget = job.cpu_memory is not None  # then two unpacked blocks may be too much
        differ = load.tiny_difference(config) if budget else load.largest_difference(decoder)
        if differ > load.TOLERANCE:
            said = f"the fused blocks differ from the model's own code by {differ:.1e}"
            if budget or self.recipe.quant:
                raise ResourceError(said, hint="this model runs without budget and quant only")
            job.reporter.warn(f"{said}; not used")
            self.chosen = Chosen("dense", None)
            return None
        if job.deltas:
            load.attach(decoder, [delta.path for delta in job.deltas])
        eos = eos_ids(models.load_generation_config(job.checkpoint), self.tokenizer)
        how = self._how(self.recipe.max_new_tokens)
        most = found.tokens if job.cpu_memory is not None else None
        rows = min(self.recipe.batch_size, job.rows or self.recipe.batch_size)
        return Server(decoder, self.tokenizer, eos, how, rows=rows, most=most)

    def _placed(self, job: Job) -> Any:
        """Return the model on placed weights, in transformers' own code; None if it isn't to be."""
        found = self.chosen.placement
        if self.chosen.way != "placed" or found is None:
            return None
        from bmkit.runtime import cpu

        if self.device.type == "cpu" and not cpu.compiled():
            job.reporter.info("compiling kernels for this machine, once (some 5 seconds)")
        from bmkit.runtime.placed import load
        from bmkit.runtime.placed.model import Room, place_model

        model = load.empty(job.checkpoint)
        model.generation_config = models.load_generation_config(job.checkpoint)
        stored = models.stored_dtype(model.config)
        dtype = models.compute_dtype(self.recipe.dtype, stored, self.device)
        if self.device.type == "cpu":
            load.warm()
        env.forget_peak_rss()
        self.rss_before_bytes = env.rss_bytes()
        self.rows = found.rows
        limit = job.cpu_memory if self.device.type == "cpu" else job.gpu_memory
        weights = None if limit is None else limit - found.fixed_bytes + found.rest_bytes
        room = Room(weights, None if self.device.type == "cpu" else job.cpu_memory)
        if room.device is not None and not getattr(model, "_is_stateful", False):
            self.chunk = found.chunk
        self.placed = place_model(
            job.checkpoint,
            model,
            device=self.device,
            dtype=dtype,
            quant=self.recipe.quant,
            room=room,
        )
        return model

    def answer(
        self, given: Iterable[Row | BadRow], *, write: Callable[[str], None] | None = None
    ) -> Iterator[Answered | BadRow]:
        """Answer rows of `prompt` or `messages`, batched by length, in the order they came.

        A row that can't be used comes back as a BadRow in its place. `write` gets the text of each
        answer while it is made; rows are then answered one at a time.
        """
        if self.server is not None:
            yield from self._serve(given, write)
            return
        size = 1 if write else self.rows
        window = size if write else size * WINDOW_BATCHES
        numbered = enumerate(given)
        while taken := list(itertools.islice(numbered, window)):
            done: dict[int, Answered | BadRow] = {}
            prompts = []
            for number, row in taken:
                found = self._read(number, row)
                if isinstance(found, _Bad):
                    done[number] = found.row
                else:
                    prompts.append(found)
            waiting = [number for number, _ in reversed(taken)]
            for batch in [*self._batches(prompts, size), []]:
                while waiting and waiting[-1] in done:
                    yield done.pop(waiting.pop())
                for prompt, answer in self._batch(batch, write):
                    done[prompt.number] = Answered(prompt.id, prompt.text, answer)

    def _serve(
        self, given: Iterable[Row | BadRow], write: Callable[[str], None] | None
    ) -> Iterator[Answered | BadRow]:
        """Answer on packed weights: rows begin and end when they can, and come back in order."""
        if write:
            self.server.rows = 1
        prompts = (self._read(number, row) for number, row in enumerate(given))
        found = self.server.answer(prompts, write=write)
        done: dict[int, Answered | BadRow] = {}
        due = 0
        while True:
            start = time.perf_counter()
            prompt, answer = next(found, _NOTHING)
            self.seconds += time.perf_counter() - start
            if prompt is None:
                return
            if isinstance(prompt, _Prompt):
                self.tokens += len(answer.token_ids)
                done[prompt.number] = Answered(prompt.id, prompt.text, answer)
            else:
                done[prompt.number] = prompt.row
            while due in done:
                yield done.pop(due)
                due += 1

    def peak_gpu_bytes(self) -> int:
        """Return the most GPU memory that torch has held, 0 on the CPU."""
        on_gpu = self.device.type == "cuda"
        return int(torch.cuda.max_memory_reserved(self.device)) if on_gpu else 0

    def _batches(self, prompts: list[_Prompt], size: int) -> list[list[_Prompt]]:
        """Group prompts by length, those that are due first coming first.

        A prompt near the end of the context is answered alone: what it leaves room for must not
        bound the answers of others.
        """
        most = self.recipe.max_new_tokens
        groups = [[p] for p in prompts if self._room(p) < most]
        roomy = sorted((p for p in prompts if self._room(p) == most), key=lambda p: -len(p.ids))
        groups += [roomy[i : i + size] for i in range(0, len(roomy), size)]
        return sorted(groups, key=lambda group: min(p.number for p in group))

    def _room(self, prompt: _Prompt) -> int:
        most = self.recipe.max_new_tokens
        return most if self.context is None else min(most, self.context - len(prompt.ids))

    def _batch(
        self, prompts: list[_Prompt], write: Callable[[str], None] | None
    ) -> list[tuple[_Prompt, Answer]]:
        if not prompts:
            return []
        how = self._how(min(map(self._room, prompts)))
        start = time.perf_counter()
        answers = generate(
            self.model,
            self.tokenizer,
            [p.ids for p in prompts],
            how,
            numbers=[p.number for p in prompts],
            write=write,
            chunk=self.chunk,
        )
        self.seconds += time.perf_counter() - start
        self.tokens += sum(len(a.token_ids) for a in answers)
        return list(zip(prompts, answers, strict=True))

    def _how(self, max_new_tokens: int) -> Generation:
        r = self.recipe
        return Generation(
            max_new_tokens=max_new_tokens,
            sampled=r.sampled,
            temperature=1.0 if r.temperature is None else r.temperature,
            top_k=r.top_k,
            top_p=r.top_p,
            min_p=r.min_p,
            repetition_penalty=r.repetition_penalty,
            stop_strings=tuple(r.stop_strings),
            seed=r.seed,
        )

    def _read(self, number: int, row: Row | BadRow) -> _Prompt | _Bad:
        def bad(text: str) -> _Bad:
            return _Bad(number, BadRow(row.line, text))

        if isinstance(row, BadRow):
            return _Bad(number, row)
        try:
            text, ids = self._tokenise(row.values)
        except ValueError as exc:
            return bad(str(exc))
        if not ids:
            return bad("the prompt is empty")
        if self.context is not None and len(ids) >= self.context:
            return bad(f"the prompt has {len(ids)} tokens, the model reads {self.context}")
        return _Prompt(number, row.values.get("id", number), text, ids)

    def _tokenise(self, values: dict[str, Any]) -> tuple[str, list[int]]:
        messages = values.get("messages")
        if messages is not None:
            if problem := rows.messages_problem(messages):
                raise ValueError(problem)
            if self.raw:
                raise ValueError("it holds `messages`, which need a chat template (and no --raw)")
            text = str(messages[-1]["content"])
        elif isinstance(values.get("prompt"), str):
            text = values["prompt"]
            messages = [{"role": "user", "content": text}]
        else:
            raise ValueError(rows.unknown_shape(values, "`prompt` or `messages`"))
        if self.raw:
            return text, self._start(self.tokenizer(rows.require_text(text))["input_ids"])
        if self.recipe.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.recipe.system}, *messages]
        whole = rows.require_text(chat.render(self.tokenizer, messages, answer=True))
        return text, self.tokenizer(whole, add_special_tokens=False)["input_ids"]

    def _start(self, ids: list[int]) -> list[int]:
        """Drop an end token that some tokenizers put after every text."""
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            return ids[:-1]
        return ids


def run(job: Job) -> Session:
    """Load what the job names. Raises InputError for what can't be loaded."""
    if job.model.kind not in {"model", "delta"}:
        raise InputError(f"{job.model.path} is a {job.model.kind}")
    return Session(job)
