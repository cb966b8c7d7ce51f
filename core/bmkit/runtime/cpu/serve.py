"""Answer prompts on a Decoder, several at a time: a place that falls free takes the next prompt."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from transformers import LogitsProcessorList

from bmkit.errors import InputError, ResourceError
from bmkit.runtime import sampling
from bmkit.runtime.cpu.decoder import Cache, Decoder
from bmkit.runtime.generate import Answer, Generation
from bmkit.runtime.stream import TextStream, cut_at, visible


class Prompt(Protocol):
    """What is to be answered: its number in the run decides its random draws."""

    number: int
    ids: list[int]
    adapter: str | None


@dataclass
class _Row:
    prompt: Any
    limit: int
    steps: LogitsProcessorList
    start: float
    made: list[int] = field(default_factory=list)
    told: list[sampling.Chosen] = field(default_factory=list)
    stream: TextStream | None = None


_END = object()


class _Ahead:
    """An iterator read by a thread, so that a slow source doesn't hold up what is under way."""

    def __init__(self, source: Iterable[Any], size: int) -> None:
        self.queue: queue.Queue[Any] = queue.Queue(size)
        self.over = self.stopped = False
        self.reader = threading.Thread(target=self._read, args=(source,), daemon=True)
        self.reader.start()
        atexit.register(self.stop)

    def _read(self, source: Iterable[Any]) -> None:
        try:
            for item in source:
                self._put(item)
                if self.stopped:
                    return
            self._put(_END)
        except BaseException as exc:
            self._put(exc)

    def _put(self, item: Any) -> None:
        while not self.stopped:
            with suppress(queue.Full):
                self.queue.put(item, timeout=0.1)
                return

    def stop(self) -> None:
        """End the thread, unless it waits for its source: then it holds nothing and may be left.

        One that is in a library's code when Python ends would abort the process.
        """
        self.stopped = True
        self.reader.join(0.5)
        atexit.unregister(self.stop)

    def next(self, *, wait: bool) -> Any:
        """Return the next item; None if there is none yet (without `wait`) or no more."""
        if self.over:
            return None
        try:
            item = self.queue.get(block=wait)
        except queue.Empty:
            return None
        if item is _END:
            self.over = True
            return None
        if isinstance(item, BaseException):
            self.over = True
            raise item
        return item


class Server:
    """A decoder, a tokenizer, and how to answer."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        eos: Sequence[int],
        how: Generation,
        *,
        rows: int,
        most: int | None = None,
    ) -> None:
        self.decoder, self.tokenizer, self.eos, self.how = decoder, tokenizer, set(eos), how
        self.rows, self.most = rows, most
        self.context: int | None = getattr(decoder.config, "max_position_embeddings", None)
        self.cache: Cache | None = None
        self.reuse = False
        """Whether a prompt is read on from where it agrees with the one before it, as in a chat."""
        self.known: tuple[str | None, list[int]] | None = None  # what place 0 holds then

    def answer(
        self, prompts: Iterable[Any], *, write: Callable[[str], None] | None = None
    ) -> Iterator[tuple[Any, Answer]]:
        """Answer prompts (with `number`, `ids`, `adapter`), each as soon as it is done.

        Items that have no `ids` are handed through. `write` gets the text while it is made; use one
        row then. Raises InputError if the model's output is not a number.
        """
        source = _Ahead(prompts, 2 * self.rows)
        active: dict[int, _Row] = {}
        while True:
            while len(active) < self.rows:
                prompt = source.next(wait=not active)
                if prompt is None:
                    break
                if not hasattr(prompt, "ids"):
                    yield prompt, None  # type: ignore[misc]
                    continue
                place = next(i for i in range(self.rows) if i not in active)
                row = self._begin(prompt, write)
                cache = self.cache = self._room(self.cache, len(prompt.ids) + row.limit)
                cache.done[place] = known = self._known(prompt)
                self.decoder.choose(prompt.adapter)
                self.known = None
                logits = self.decoder.chain(cache, place, prompt.ids[known:])
                if self.reuse:
                    self.known = (prompt.adapter, list(prompt.ids))
                if (found := self._take(row, logits[0])) is not None:
                    yield prompt, found
                else:
                    active[place] = row
            if not active:
                if source.over:
                    source.stop()
                    return
                continue
            assert self.cache is not None  # an active row has one
            for adapter in dict.fromkeys(row.prompt.adapter for row in active.values()):
                places = [p for p, row in active.items() if row.prompt.adapter == adapter]
                self.decoder.choose(adapter)
                last = [active[p].made[-1] for p in places]
                logits = self.decoder.step(self.cache, last, places)
                self.cache.done[places] += 1
                for place, scores in zip(places, logits, strict=True):
                    row = active[place]
                    if (found := self._take(row, scores)) is not None:
                        del active[place]
                        yield row.prompt, found

    def _known(self, prompt: Any) -> int:
        """Return how many of a prompt's tokens the cache holds from the row before it."""
        if self.known is None or self.known[0] != prompt.adapter:
            return 0
        most = min(len(self.known[1]), len(prompt.ids) - 1)
        pairs = zip(self.known[1][:most], prompt.ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), most)

    def _begin(self, prompt: Any, write: Callable[[str], None] | None) -> _Row:
        how = self.how
        room = how.max_new_tokens
        if self.context is not None:
            room = min(room, self.context - len(prompt.ids))
        steps = LogitsProcessorList()
        if how.repetition_penalty != 1.0:
            steps.append(sampling.RepetitionPenalty(how.repetition_penalty, [0]))
        if how.sampled:
            steps += sampling.processors(
                [sampling.row_seed(how.seed, prompt.number)],
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
                min_p=how.min_p,
            )
        stream = TextStream(self.tokenizer, how.stop_strings, write) if write else None
        if stream is not None:
            stream.put(torch.tensor(prompt.ids))
        return _Row(prompt, room, steps, time.perf_counter(), stream=stream)

    def _room(self, cache: Cache | None, slots: int) -> Cache:
        """Return a cache of at least `slots`, with what the old one held."""
        if cache is not None and cache.slots >= slots:
            return cache
        if self.most is not None:
            if slots > self.most:
                raise ResourceError(
                    f"--cpu-memory was planned for {self.most} tokens a row, this one has {slots}",
                    hint="lower --max-new-tokens, or run without the budget",
                )
            slots = self.most  # so that it never grows: two caches at once would be too much
        larger = self.decoder.cache(self.rows, -(-slots // 64) * 64)
        if cache is not None:
            larger.keys[:, :, :, : cache.slots] = cache.keys
            larger.values[:, :, :, : cache.slots] = cache.values
            larger.done[:] = cache.done
        return larger

    def _take(self, row: _Row, scores: np.ndarray) -> Answer | None:
        """Choose a token; return the answer if it was the last one."""
        if row.steps:
            seen = torch.tensor([row.prompt.ids + row.made])
            token = int(row.steps(seen, torch.from_numpy(scores)[None].clone())[0].argmax())
        else:
            token = int(scores.argmax())
        if not np.isfinite(scores[token]):
            raise InputError("the model's output is not a number; its weights are damaged")
        if self.how.logprobs is not None:
            row.told.append(sampling.judge(torch.from_numpy(scores), token, self.how.logprobs))
        if self.known is not None and row.made:  # a token is in the cache once it has been read
            self.known[1].append(row.made[-1])
        row.made.append(token)
        if row.stream is not None:
            row.stream.put(torch.tensor([token]))
        ended = token in self.eos
        if not ended and len(row.made) < row.limit and not self._stopped(row.made):
            return None
        if row.stream is not None:
            row.stream.end()
        text, stopped = visible(row.made, self.tokenizer, self.how.stop_strings)
        finish = "stop" if stopped is not None else "eos" if ended else "length"
        seconds = time.perf_counter() - row.start
        told = row.told[:stopped] if self.how.logprobs is not None else None
        return Answer(text, row.made[:stopped], finish, seconds, told)

    def _stopped(self, made: list[int]) -> bool:
        stops = self.how.stop_strings
        if not stops:
            return False
        tail = made[-(4 * max(map(len, stops)) + 8) :]
        texts = (self.tokenizer.decode(tail, skip_special_tokens=s) for s in (True, False))
        return any(cut_at(text, stops) != text for text in texts)
