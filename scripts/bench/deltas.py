"""What each delta method makes of the same rows: scores, parameters, bytes, seconds.

python scripts/bench/deltas.py [--rows 280] [--only lora adapter]

SmolLM2-135M-Instruct, each method's built-in recipe with its learning rate: SST-2 as a classifier
(a new head, trained with the delta), SNIPS' seven requests likewise, and GSM8K, where the loss on
held-out solutions is told. Single runs: differences of a hundredth or two mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine

from bmkit import registry

DATA = machine.ROOT.parent / "shared" / "data"
RESULT = "deltas"


def sst2(split: str, count: int) -> Iterator[dict[str, str]]:
    """Yield reviews, as many of each kind."""
    with (DATA / "sst2" / f"{split}.tsv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    kinds = [[r for r in rows if r[-1] == label][: count // 2] for label in "01"]
    for pair in zip(*kinds, strict=True):
        for row in pair:
            yield {"text": row[0], "label": ["negative", "positive"][int(row[-1])]}


def snips(split: str, count: int) -> Iterator[dict[str, str]]:
    """Yield requests, as many of each of seven kinds."""
    names = {"train": "train", "dev": "validate"}
    files = sorted((DATA / "snips").glob(f"{names[split]}_*.json"))
    for file in files:
        kind = file.stem.partition("_")[2]
        found = json.loads(file.read_text(encoding="utf-8", errors="replace"))[kind]
        for row in found[: count // len(files)]:
            yield {"text": "".join(part["text"] for part in row["data"]), "label": kind}


def gsm8k(split: str, count: int) -> Iterator[dict[str, str]]:
    """Yield questions and their worked solutions."""
    name = "train_2000" if split == "train" else "test"
    with (DATA / "gsm8k" / f"{name}.jsonl").open(encoding="utf-8") as file:
        for _, line in zip(range(count), file, strict=False):
            row = json.loads(line)
            yield {"prompt": row["question"], "completion": row["answer"]}


TASKS = {"sst2": sst2, "snips": snips, "gsm8k": gsm8k}


def write(folder: Path, task: str, rows: int, held_out: int) -> Path:
    """Write a task's rows; return the folder with both splits."""
    out = folder / task
    out.mkdir(exist_ok=True)
    count = rows // 4 if task == "gsm8k" else rows
    for split, many in (("train", count), ("dev", held_out // 4 if task == "gsm8k" else held_out)):
        lines = [json.dumps(row) + "\n" for row in TASKS[task](split, many)]
        (out / f"{split}.jsonl").write_text("".join(lines))
    return out


def tune(method: str, model: Path, data: Path, out: Path) -> dict[str, Any]:
    """Run a method's built-in recipe; return its figures."""
    start = time.monotonic()
    classifies = data.name != "gsm8k"
    batch = 16 if classifies else 4
    done = subprocess.run(
        [
            *("bmkit", "tune", method, "-m", str(model), "--data", str(data), "-o", str(out)),
            *("-s", f"train.per_device_train_batch_size={batch}", "-s", "data.max_length=256"),
            *("-s", f"train.num_train_epochs={2 if classifies else 1}", "--json", "--force"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    found = json.loads(done.stdout)["metrics"]
    names = ("dev_accuracy", "dev_loss", "dev_loss_before", "trainable_parameters", "delta_bytes")
    kept = {name: found[name] for name in names if name in found}
    return {**kept, "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    """Run the benchmark; keep each line as it gets done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="default: the pulled SmolLM2-135M")
    parser.add_argument("--rows", type=int, default=280)
    parser.add_argument("--held-out", type=int, default=210)
    parser.add_argument("--only", nargs="*", help="methods to run; the others' lines stay")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    given = parser.parse_args()
    facts = machine.facts()
    file = machine.ROOT / "scripts" / "bench" / "results" / f"{RESULT}.json"
    lines = json.loads(file.read_text())["methods"] if file.is_file() else {}
    model = given.model or Path(
        subprocess.run(
            ["bmkit", "pull", "smollm2-135m", "-q"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    names = given.only or [m.name for m in registry.METHODS if m.stage == "tune"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for task in given.tasks:
            data = write(work, task, given.rows, given.held_out)
            for name in names:
                found = tune(name, model, data, work / "out")
                lines.setdefault(name, {})[task] = found
                print(f"{task:8}{name:18}{found}", flush=True)
                machine.save(RESULT, {**facts, "rows": given.rows, "methods": lines}, say=False)


if __name__ == "__main__":
    main()
