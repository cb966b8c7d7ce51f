"""How much two texts have in common, by their words."""

from __future__ import annotations

import re
from collections.abc import Sequence

_FILLERS = """
about also and any are because been before but can could did does for from going had has have
her here him his how into is its just know like make more much need not now one only other
our out over she should some sorry tell than that the their them then there they thing this
time too use very want was well were what when where which who why will with would yes you
your
"""
FILLERS = frozenset(_FILLERS.split())
"""Words that say nothing about a topic."""


def words(text: str) -> list[str]:
    """Return a text's words in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def shares_words(first: str, second: str) -> bool:
    """Tell whether two texts have a word of three letters or more in common that says something."""
    return bool(_telling(first) & _telling(second))


def _telling(text: str) -> set[str]:
    found = (word.removesuffix("s") for word in words(text) if word not in FILLERS)
    return {word for word in found if len(word) > 2 or word.isdigit()}


def longest_common(said: str, wanted: str) -> float:
    """Return ROUGE-L: F1 of the longest common subsequence of words; 0 if a text has none.

    ROUGE: A Package for Automatic Evaluation of Summaries, aclanthology.org/W04-1013.
    """
    first, second = words(said), words(wanted)
    common = _subsequence(first, second)
    return 2 * common / (len(first) + len(second)) if common else 0.0


def _subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)  # of the words so far with each beginning of `second`
    for word in first:
        diagonal = 0
        for at, other in enumerate(second, 1):
            above = row[at]
            row[at] = diagonal + 1 if word == other else max(above, row[at - 1])
            diagonal = above
    return row[-1]
