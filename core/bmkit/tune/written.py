"""What a run leaves beside weights: every step's figures, and a picture of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bmkit.artifact import EVENTS
from bmkit.data.slices import stored
from bmkit.data.slices.stored import Stored
from bmkit.data.slices.tokens import Marked
from bmkit.picture import lines

METRICS = "metrics.jsonl"
PICTURE = "loss.svg"


def write_history(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write what was measured, a step a line, and its loss as a curve.

    Nothing in it depends on the clock: the same run writes the same bytes.
    """
    text = "".join(json.dumps(_rounded(entry)) + "\n" for entry in history)
    (folder / METRICS).write_text(text, encoding="utf-8")
    curves = {
        name: [(entry["step"], entry[key]) for entry in history if key in entry]
        for name, key in (("trained on", "loss"), ("held out", "dev_loss"))
    }
    curves = {name: points for name, points in curves.items() if points}
    if curves:
        picture = lines(curves, "loss", "step")
        (folder / PICTURE).write_text(picture, encoding="utf-8")


def write_events(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write what was measured as a file for TensorBoard, which has to be installed."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(folder))
    for entry in history:
        for name, value in entry.items():
            part = "dev" if name.startswith("dev_") else "train"
            if name not in ("step", "epoch"):
                tag = f"{part}/{name.removeprefix('dev_')}"
                writer.add_scalar(tag, value, int(entry["step"]))
    writer.close()
    for file in folder.glob(f"{EVENTS}.*"):  # named by the time and the machine
        file.rename(folder / f"{EVENTS}.bmkit")


def write_duplex(folder: Path, known: Stored | None, marks: Marked | None, tokenizer: Any) -> None:
    """Write what makes a model a duplex one, if it is, and a tokenizer that has got tokens."""
    if known is not None:
        stored.write(folder, known)
    if marks is not None and marks.added:
        tokenizer.save_pretrained(folder)


def _rounded(entry: Mapping[str, float]) -> dict[str, float]:
    whole = {"step": int(entry["step"])}
    return whole | {k: float(f"{v:.6g}") for k, v in entry.items() if k != "step"}
