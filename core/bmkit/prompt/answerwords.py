"""`infer` on a prompt that asks what a model knows: the likeliest answers of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bmkit.plan import Job
from bmkit.prompt.answer import Asked, Session
from bmkit.prompt.probing import Probe
from bmkit.prompting.labelwords import Word


@dataclass(frozen=True)
class ToldWords:
    """One row, and its likeliest answers."""

    streamed: ClassVar = False
    id: Any
    top: list[tuple[str, float]]

    def values(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        found = [{"token": text, "probability": round(share, 6)} for text, share in self.top]
        return {"id": self.id, "text": self.top[0][0].strip(), "top": found}

    def line(self) -> str:
        """Return what is printed as text."""
        text, share = self.top[0]
        return f"{text.strip()}\t{share:.4f}"


class ProbeSession(Session):
    """A prompt on its model, that tells the likeliest answers."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        kept = self.kept
        words = tuple(Word(one.text, tuple(one.ids)) for one in kept.candidates)
        self.probe = Probe(words, kept.probing.combine)

    def _tell(self, asked: list[Asked]) -> Sequence[ToldWords]:
        prompts = [prompt for found in asked for prompt in found.encoded]
        most = self.kept.probing.top

        def take(said: Tensor, _: list[int]) -> Tensor:
            shares, numbers = said.exp().topk(min(most, said.shape[1]))
            return torch.cat([shares, numbers.float()], 1)  # below 2**24, which a float32 holds

        said = self.probe.ask(self.opened.asker, prompts, take=take)
        half = said.shape[1] // 2
        return [
            ToldWords(found.id, self._named(row[:half].tolist(), row[half:].long().tolist()))
            for found, row in zip(asked, said, strict=True)
        ]

    def _named(self, shares: list[float], numbers: list[int]) -> list[tuple[str, float]]:
        known = self.probe.candidates
        texts = [known[at].text if known else self.tokenizer.decode([at]) for at in numbers]
        return list(zip(texts, shares, strict=True))
