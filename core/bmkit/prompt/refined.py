"""Label words of a knowledge base, refined on rows without labels (KPT, arXiv 2108.02035)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bmkit.prompt.ask import Asker
from bmkit.prompt.labels import Verbalizer
from bmkit.prompt.verbalizerspec import VerbalizerSpec
from bmkit.prompting.encode import Encoded
from bmkit.verbalizers import manual, refine


def knowledgeable(
    told: Verbalizer, asker: Asker, prompts: Sequence[Encoded], spec: VerbalizerSpec
) -> Verbalizer:
    """Return the verbalizer without words that are rare at the mask, or go with another label.

    `prompts` are those of rows whose labels nobody looks at. A label keeps one word at least.
    """
    words = refine.frequent(told.words, asker.prior(prompts), spec.candidate_frac)
    told = replace(told, words=words)
    scores = told.word_scores(asker.logprobs(prompts, told.question))
    there = told.columns.words
    logprobs = manual.normalise(scores, there)
    return replace(told, words=refine.relevant(words, logprobs, there, spec.relevance))
