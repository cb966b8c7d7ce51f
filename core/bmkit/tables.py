"""Tables of what was measured, after each step or of each label, as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

HEADS: Mapping[str, str] = {
    "bytes": "bytes",
    "parameters": "weights",
    "nonzeros": "not zero",
    "flops_per_token": "FLOPs/token",
    "perplexity": "perplexity",
    "decode": "decode tok/s",
    "prefill": "prefill tok/s",
    "rows": "rows",
    "told": "told",
    "right": "right",
    "f1": "F1",
    "accuracy": "accuracy",
    "dev_accuracy": "on dev",
    "train_loss": "train loss",
    "train": "train",
    "dev": "dev",
    "test": "test",
    "slices": "slices",
    "idle": "silent",
}
SHARES = ("perplexity", "decode", "prefill", "f1", "accuracy", "dev_accuracy", "train_loss", "idle")


def lines(rows: Sequence[Mapping[str, float | int | str]]) -> list[str]:
    """Return a head and a line for each of `rows`; nothing for no rows."""
    if not rows:
        return []
    columns = [key for key in HEADS if any(key in line for line in rows)]
    cells = [["", *(HEADS[key] for key in columns)]]
    for line in rows:
        cells.append([str(line["step"]), *(_cell(key, line.get(key)) for key in columns)])
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in cells
    ]


def _cell(key: str, value: float | int | str | None) -> str:
    if value is None:
        return "-"
    if key in SHARES:
        return f"{value:.4g}"
    number = float(value)
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000 or unit == "T":
            break
        number /= 1000
    return f"{number:.4g} {unit}".rstrip()
