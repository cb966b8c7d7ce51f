"""A row and its answer, as they are written; and how a recipe wants answers made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bmkit.runtime.generate import Answer, Generation
from bmkit.runtime.recipe import GenerateRecipe


@dataclass(frozen=True)
class Answered:
    """One row and its answer."""

    streamed: ClassVar = True
    """Whether its text was written while it was made."""

    id: Any
    prompt: str
    answer: Answer

    def values(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        answer = self.answer
        count = len(answer.token_ids)
        found = {
            "id": self.id,
            "prompt": self.prompt,
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish": answer.finish,
            "seconds": round(answer.seconds, 4),
            "tokens_per_second": round(count / max(answer.seconds, 1e-9), 2),
        }
        if answer.logprobs is not None:
            found["token_logprobs"] = [round(c.logprob, 6) for c in answer.logprobs]
            found["top_logprobs"] = [
                [[token, round(p, 6)] for token, p in c.top] for c in answer.logprobs
            ]
        return found

    def line(self) -> str:
        """Return what is printed as text."""
        return self.answer.text


MORE = (
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
)
"""Keys of a recipe that go to transformers' own processors."""


FORCED = ("forced_bos_token_id", "forced_eos_token_id")
"""What a checkpoint may say of an answer's first and last token."""


def how_to(recipe: GenerateRecipe, max_new_tokens: int, *, config: Any = None) -> Generation:
    """Return what a recipe says of choosing tokens; `config` is the checkpoint's for generating.

    transformers' own `generate` has that already.
    """
    r = recipe
    forced = {name: getattr(config, name, None) for name in FORCED}
    return Generation(
        max_new_tokens=max_new_tokens,
        sampled=r.sampled,
        temperature=1.0 if r.temperature is None else r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        min_p=r.min_p,
        repetition_penalty=r.repetition_penalty,
        more={
            **{name: value for name in MORE if (value := getattr(r, name))},
            **{name: value for name, value in forced.items() if value is not None},
        },
        stop_strings=tuple(r.stop_strings),
        seed=r.seed,
        logprobs=r.logprobs,
    )
