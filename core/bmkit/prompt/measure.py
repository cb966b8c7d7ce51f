"""How well labels were told: accuracy and F1, by label and in all. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Row = dict[str, float | int | str]


def measure(
    told: Sequence[Collection[int]],
    right: Sequence[Collection[int]],
    labels: Sequence[str],
    none: str | None = None,
) -> tuple[dict[str, float], list[Row]]:
    """Return the figures of all rows, and a line for each label.

    `accuracy` is the share of rows whose labels are all right; `macro_f1` the mean of the F1 of
    labels that a row has or was told to have; `micro_f1` that of all labels of all rows together.
    Neither counts the label `none`, of rows that are nothing.
    """
    lines: list[Row] = []
    scores: list[float] = []
    hits = misses = 0
    for number, label in enumerate(labels):
        pairs = [(number in t, number in r) for t, r in zip(told, right, strict=True)]
        hit = sum(t and r for t, r in pairs)
        miss = sum(t != r for t, r in pairs)
        score = f1(hit, miss)
        if label != none:
            scores += [score] if hit or miss else []
            hits, misses = hits + hit, misses + miss
        counts = {"rows": sum(r for _, r in pairs), "told": sum(t for t, _ in pairs), "right": hit}
        lines.append({"step": label, **counts, "f1": round(score, 6)})
    exact = sum(set(t) == set(r) for t, r in zip(told, right, strict=True))
    figures = {
        "accuracy": exact / len(right),
        "macro_f1": sum(scores) / max(len(scores), 1),
        "micro_f1": f1(hits, misses),
    }
    return {name: round(value, 6) for name, value in figures.items()}, lines


def f1(hit: int, miss: int) -> float:
    """Return F1 of what was told rightly, and of what was told wrongly or not at all, counted."""
    return 2 * hit / (2 * hit + miss) if hit else 0.0
