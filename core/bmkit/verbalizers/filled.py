"""Words at several masks as one text, which a model that goes on with a text says in turn.

Of a causal model that is all from the first mask to the end; of a T5 the words with the sentinels
between them; of a BART its own text up to the last word.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from bmkit.prompting.encode import Encoded, Kind
from bmkit.verbalizers import likelihood

Words = Sequence[Sequence[int]]
"""The tokens of a word for each mask."""


def score(
    model: Any,
    prompts: Sequence[Encoded],
    kind: Kind,
    choices: Sequence[Sequence[Words]],
    *,
    by: Literal["sum", "mean"] = "sum",
    mask_token: int | None = None,
    batch_tokens: int = likelihood.BATCH_TOKENS,
) -> Tensor:
    """Return the log-likelihoods of each row's choices, [rows, choices].

    A choice has words for all masks; each is said behind those before it. `mean` is that by
    token. A masked model has one mask (see `pseudo`). Raises InputError for what is longer than
    the context.
    """
    if kind == "masked":
        alone = [[words[0] for words in own] for own in choices]
        said = likelihood.score(
            model, prompts, kind, alone, mask_token=mask_token, batch_tokens=batch_tokens
        )
        return said.sums if by == "sum" else said.means
    texts = [[text(p, kind, w) for w in own] for p, own in zip(prompts, choices, strict=True)]
    if kind == "causal":
        ids = [prompt.ids for prompt in prompts]
        said = likelihood.causal(model, ids, texts, batch_tokens=batch_tokens)
    else:
        said = likelihood.seq2seq(
            model,
            [prompt.ids for prompt in prompts],
            [prompt.decoder_ids[: prompt.reads[0] + 1] for prompt in prompts],
            texts,
            batch_tokens=batch_tokens,
        )
    return said.sums if by == "sum" else said.means


def text(prompt: Encoded, kind: Kind, words: Words) -> list[int]:
    """Return the tokens from the first mask on, with `words` in the masks' places."""
    found = list(words[0])
    for gap, word in zip(_gaps(prompt, kind), [*words[1:], []], strict=True):
        found += [*gap, *word]
    return found


def _gaps(prompt: Encoded, kind: Kind) -> list[list[int]]:
    """Return what stands behind each mask, up to the next one."""
    masks = prompt.masks
    if kind == "causal":
        whole = [*prompt.ids, *prompt.behind]
        return [whole[a:b] for a, b in zip(masks, [*masks[1:], len(whole)], strict=True)]
    between = list(itertools.pairwise(masks))
    if prompt.decoder_ids[prompt.reads[0]] == prompt.ids[masks[0]]:  # a sentinel, as T5 has them
        return [*([prompt.ids[after]] for _, after in between), []]
    return [*(prompt.ids[before + 1 : after] for before, after in between), []]
