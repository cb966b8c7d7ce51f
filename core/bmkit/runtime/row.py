"""One prompt while it is answered: what was said, what may follow, when it is over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bmkit.errors import InputError
from bmkit.runtime import sampling
from bmkit.runtime.generate import Answer, Generation, choices
from bmkit.runtime.stream import TextStream, cut_at, visible


class Prompt(Protocol):
    """What is to be answered: its number in the run decides its random draws."""

    number: int
    ids: list[int]
    adapter: str | None


def likeliest(scores: Tensor) -> tuple[list[int], list[float]]:
    """Return the likeliest token of each row of `scores` [rows, vocabulary], and its score.

    A device is waited for once.
    """
    if scores.device.type == "cpu":  # numpy is many times as quick as torch here
        values = scores.detach().numpy()
        tokens = values.argmax(-1)
        return tokens.tolist(), values[range(len(values)), tokens].tolist()
    best, where = scores.max(-1)
    most, tokens = torch.stack((best.double(), where.double())).tolist()
    return [int(token) for token in tokens], most


def require_finite(score: float) -> None:
    """Raise InputError if the score of a token that was chosen is no number."""
    if not math.isfinite(score):
        raise InputError("the model's output is not a number; its weights are damaged")


class Row:
    """A prompt and its answer so far."""

    def __init__(
        self,
        prompt: Any,
        how: Generation,
        tokenizer: Any,
        eos: Collection[int],
        *,
        context: int | None,
        write: Callable[[str], None] | None = None,
        before: Sequence[int] | None = None,
    ) -> None:
        """Begin an answer. `before` is what stands before it, if not the prompt: its start token,
        for an encoder-decoder."""
        self.prompt, self.how, self.tokenizer, self.eos = prompt, how, tokenizer, eos
        self.start = time.perf_counter()
        self.before = list(prompt.ids if before is None else before)
        self.limit = how.max_new_tokens
        if context is not None:
            self.limit = min(self.limit, context - (len(prompt.ids) if before is None else 0))
        self.made: list[int] = []
        self.told: list[sampling.Chosen] = []
        self.steps = choices(
            how,
            [prompt.number],
            padding=[0],
            start=len(self.before),
            eos=list(eos),
            most=len(self.before) + self.limit,
        )
        self.stream = TextStream(tokenizer, how.stop_strings, write) if write else None
        if self.stream is not None:
            self.stream.put(torch.tensor(prompt.ids))

    @property
    def left(self) -> int:
        """Return how many tokens the answer may still have."""
        return self.limit - len(self.made)

    def choose(self, scores: Tensor) -> int:
        """Choose the next token by `scores` [vocabulary].

        Raises InputError if the scores are no numbers.
        """
        if self.steps:
            seen = torch.tensor([self.before + self.made])
            token = int(self.steps(seen, scores[None].clone())[0].argmax())
            require_finite(float(scores[token]))
            return token
        (token,), (score,) = likeliest(scores[None].float())
        require_finite(score)
        return token

    def take(self, token: int, scores: Tensor) -> Answer | None:
        """Add a token that was chosen by `scores`; return the answer if it was the last one."""
        if self.how.logprobs is not None:
            self.told.append(sampling.judge(scores, token, self.how.logprobs))
        self.made.append(token)
        if self.stream is not None:
            self.stream.put(torch.tensor([token]))
        ended = token in self.eos
        if not ended and self.left > 0 and not self._stopped():
            return None
        if self.stream is not None:
            self.stream.end()
        text, stopped = visible(self.made, self.tokenizer, self.how.stop_strings)
        finish = "stop" if stopped is not None else "eos" if ended else "length"
        seconds = time.perf_counter() - self.start
        told = self.told[:stopped] if self.how.logprobs is not None else None
        return Answer(text, self.made[:stopped], finish, seconds, told)

    def _stopped(self) -> bool:
        stops = self.how.stop_strings
        if not stops:
            return False
        tail = self.made[-(4 * max(map(len, stops)) + 8) :]
        texts = (self.tokenizer.decode(tail, skip_special_tokens=s) for s in (True, False))
        return any(cut_at(text, stops) != text for text in texts)
