"""What every benchmark result says beside its figures: machine, commit, command, load."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def facts() -> dict[str, Any]:
    """Return machine, versions, commit and command of this run."""
    from importlib.metadata import version

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    found = {"cpu": model, "cores": os.cpu_count(), "platform": platform.platform()}
    if gpu := _gpu():
        found["gpu"] = gpu
    return {
        "machine": found,
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {
            p: version(p) for p in ("torch", "transformers", "peft", "compressed-tensors")
        },
        "commit": commit,
        "command": " ".join(["python", *map(_portable, sys.argv)]),
    }


def _gpu() -> str | None:
    """Return the name of the first GPU, without opening it."""
    if shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None


def _portable(word: str) -> str:
    """Return a word of the command line without the folders of this machine."""
    return Path(word).name if word.startswith("/") else word


def save(name: str, values: dict[str, Any], *, say: bool = True) -> None:
    """Write scripts/bench/results/NAME.json and print it."""
    text = json.dumps(values, indent=1)
    folder = ROOT / "scripts" / "bench" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(text + "\n")
    if say:
        print(text)
