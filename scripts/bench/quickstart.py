"""The quickstart from an empty directory: a fresh clone, no venv, no cache. Wall time, per stage.

python scripts/bench/quickstart.py
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import machine


def main() -> None:
    """Clone, run scripts/quickstart, read the stages' times from what it says."""
    facts = machine.facts()
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "bmkit"
        subprocess.run(["git", "clone", "--quiet", machine.ROOT, clone], check=True)
        start = time.monotonic()
        done = subprocess.run(
            [clone / "scripts" / "quickstart"],
            env={**os.environ, "BMKIT_HOME": str(Path(name) / "home")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        wall = time.monotonic() - start
    said = done.stdout
    print(said)

    def seconds(pattern: str) -> float | None:
        match = re.search(pattern, said)
        return float(match[1]) if match else None

    def line(name: str) -> str | None:
        match = re.search(rf"^{name}\s+(.*)$", said, re.MULTILINE)
        return match[1] if match else None

    machine.save(
        "quickstart",
        {
            **facts,
            "wall_seconds": round(wall, 1),
            "install_seconds": seconds(r"installed in (\d+) s"),
            "pull_seconds": seconds(r"pull: wrote \S+ in ([\d.]+) s"),
            "compress_seconds": seconds(r"compress: wrote \S+ in ([\d.]+) s"),
            "tune_seconds": seconds(r"tune: wrote \S+ in ([\d.]+) s"),
            **{name: line(name) for name in ("model", "delta", "held-out loss", "before", "after")},
            "load_average_after": os.getloadavg()[0],
        },
    )


if __name__ == "__main__":
    main()
