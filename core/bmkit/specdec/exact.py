"""Whether an answer is what the target says alone: token by token, or a tie that fell otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from bmkit.runtime.row import Row
from bmkit.runtime.speculation.engine import Speculator

ROUNDING = {torch.float32: 64 * 2.0**-23, torch.bfloat16: 8 * 2.0**-7, torch.float16: 8 * 2.0**-10}
"""How far scores of one text may lie apart by rounding, as a share of the largest."""


@dataclass(frozen=True)
class Difference:
    """Where an answer left what the target says alone."""

    id: Any
    position: int
    """Tokens of the answer before it."""
    said: int | None
    """The token that was said; None where the answer ended."""
    alone: int | None
    gap: float
    """How much better the target, asked for this place alone, likes one of them."""
    tie: bool
    """Whether rounding explains it."""

    def values(self) -> dict[str, Any]:
        """Return what a report holds."""
        return {
            "id": self.id,
            "position": self.position,
            "said": self.said,
            "alone": self.alone,
            "gap": self.gap,
            "tie": self.tie,
        }


@dataclass
class Exactness:
    """What was found of all answers so far."""

    dtype: torch.dtype
    rows: int = 0
    tokens: int = 0
    identical: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def ties(self) -> int:
        """Return how many answers differ by a tie."""
        return sum(d.tie for d in self.differences)

    def values(self) -> dict[str, Any]:
        """Return what a report holds."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "identical": self.identical,
            "near_ties": self.ties,
            "mismatches": len(self.differences) - self.ties,
            "differences": [d.values() for d in self.differences],
        }

    def check(self, plain: Speculator, prompt: Any, said: list[int]) -> None:
        """Answer `prompt` by `plain`, which doesn't guess, and compare with what was said."""
        _, answer, _ = next(plain.answer([prompt]))
        assert answer is not None  # a prompt is answered
        self.rows += 1
        self.tokens += len(said)
        alone = answer.token_ids
        if alone == said:
            self.identical += 1
            return
        pairs = zip(said, alone, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(said), len(alone)))
        self.differences.append(self._judge(plain, prompt, said, alone, at))

    def _judge(
        self, plain: Speculator, prompt: Any, said: list[int], alone: list[int], at: int
    ) -> Difference:
        one = said[at] if at < len(said) else None
        other = alone[at] if at < len(alone) else None
        if one is None or other is None:  # the same tokens, another end
            return Difference(prompt.id, at, one, other, float("inf"), False)
        target = plain.target
        scores = target.begin(
            0,
            [*prompt.ids, *said[:at]] if target.start is None else prompt.ids,
            slots=at + 2,
            adapter=prompt.adapter,
        )
        if target.start is not None:
            scores = _read_on(target, scores, said[:at])
        row = Row(prompt, plain.how, plain.tokenizer, plain.eos, context=None, before=target.start)
        row.made = said[:at]
        seen = torch.tensor([row.before + row.made])
        judged = row.steps(seen, scores[None].clone())[0] if row.steps else scores
        gap = abs(float(judged[one] - judged[other]))
        largest = float(scores[torch.isfinite(scores)].abs().max())
        limit = ROUNDING.get(self.dtype, ROUNDING[torch.float32]) * largest
        return Difference(prompt.id, at, one, other, gap, gap <= limit)


def _read_on(target: Any, scores: Any, tokens: list[int]) -> Any:
    """Read the beginning of an answer after the start token; return the scores behind it."""
    from bmkit.runtime.speculation.tree import Tree

    for token in tokens:
        scores = target.forward({0: Tree.of(token)})[0][-1]
        target.keep(0, [0])
    return scores
