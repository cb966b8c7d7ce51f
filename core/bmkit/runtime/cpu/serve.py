"""Answer prompts on a Decoder, several at a time: a place that falls free takes the next prompt."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bmkit.errors import ResourceError
from bmkit.runtime.ahead import Ahead
from bmkit.runtime.cpu.decoder import Cache, Decoder
from bmkit.runtime.generate import Answer, Generation
from bmkit.runtime.row import Row


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
    ) -> Generator[tuple[Any, Answer], None, None]:
        """Answer prompts (with `number`, `ids`, `adapter`), each as soon as it is done.

        Items that have no `ids` are handed through. `write` gets the text while it is made; use one
        row then. Raises InputError if the model's output is not a number.
        """
        source = Ahead(prompts, 2 * self.rows)
        try:
            yield from self._answer(source, write)
        finally:
            source.stop()

    def _answer(
        self, source: Ahead, write: Callable[[str], None] | None
    ) -> Iterator[tuple[Any, Answer]]:
        active: dict[int, Row] = {}
        while True:
            while len(active) < self.rows:
                prompt = source.next(wait=not active)
                if prompt is None:
                    break
                if not hasattr(prompt, "ids"):
                    yield prompt, None  # type: ignore[misc]
                    continue
                place = next(i for i in range(self.rows) if i not in active)
                row = Row(
                    prompt, self.how, self.tokenizer, self.eos, context=self.context, write=write
                )
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

    def _take(self, row: Row, scores: np.ndarray) -> Answer | None:
        """Choose a token; return the answer if it was the last one."""
        logits = torch.from_numpy(scores)
        token = row.choose(logits)
        if self.known is not None and row.made:  # a token is in the cache once it has been read
            self.known[1].append(row.made[-1])
        return row.take(token, logits)
