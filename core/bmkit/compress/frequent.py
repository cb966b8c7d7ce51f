"""The tokens that are said most: a draft's head that knows only those costs little.

What a draft can't say the target says by itself, so nothing is lost (FR-Spec: Accelerating
Large-Vocabulary Language Models via Frequency-Ranked Speculative Sampling, arXiv 2502.14856).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def ranked(texts: Iterable[Sequence[int]], count: int, vocabulary: int) -> list[int]:
    """Return the `count` most frequent tokens of `texts`, in the order of their numbers.

    Where texts hold fewer, the ones with the lowest numbers are added: vocabularies are built
    from what is frequent.
    """
    seen: Counter[int] = Counter()
    for text in texts:
        seen.update(text)
    found = [token for token, _ in seen.most_common(count)]
    known = set(found)
    for token in range(vocabulary):
        if len(found) >= count:
            break
        if token not in known:
            found.append(token)
    return sorted(found)


def covered(texts: Iterable[Sequence[int]], tokens: Iterable[int]) -> float:
    """Return the share of all tokens of `texts` that are among `tokens`."""
    known, right, whole = set(tokens), 0, 0
    for text in texts:
        right += sum(token in known for token in text)
        whole += len(text)
    return right / max(whole, 1)
