"""How much of a text that was asked for is in what was said: exact match, token F1, ROUGE-L."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = ("a", "an", "the")


def words(text: str) -> list[str]:
    """Return a text's words: runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def exact_match(said: str, wanted: str) -> float:
    """Return 1 if both have the same words but for articles, else 0 (SQuAD, arXiv 1606.05250)."""
    return float(_telling(said) == _telling(wanted))


def token_f1(said: str, wanted: str) -> float:
    """Return F1 of words, articles left out, in any order (SQuAD, arXiv 1606.05250)."""
    mine, theirs = _telling(said), _telling(wanted)
    if not mine or not theirs:
        return float(mine == theirs)
    return _f1((Counter(mine) & Counter(theirs)).total(), len(mine), len(theirs))


def rouge_l(said: str, wanted: str) -> float:
    """Return F1 of the longest common subsequence of words (ROUGE-L, Lin 2004), not stemmed."""
    mine, theirs = words(said), words(wanted)
    if not mine or not theirs:
        return float(mine == theirs)
    return _f1(_common(mine, theirs), len(mine), len(theirs))


MEASURES: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}


def measure(said: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the means of all measures; where a row wants one of several texts, of its best."""
    return {
        name: round(
            sum(max(by(a, b) for b in own) for a, own in zip(said, wanted, strict=True))
            / max(len(said), 1),
            6,
        )
        for name, by in MEASURES.items()
    }


def _telling(text: str) -> list[str]:
    found = words(text)
    return [word for word in found if word not in ARTICLES] or found


def _f1(hits: int, mine: int, theirs: int) -> float:
    return 2 * hits / (mine + theirs)


def _common(mine: Sequence[str], theirs: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    before = [0] * (len(theirs) + 1)
    for word in mine:
        row = [0]
        for at, other in enumerate(theirs):
            longer = before[at] + 1 if word == other else max(before[at + 1], row[at])
            row.append(longer)
        before = row
    return before[-1]
