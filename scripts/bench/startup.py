"""How long `bmkit --help` takes, in CPU time, and which modules it loads.

python scripts/bench/startup.py
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

import machine

HEAVY = ("torch", "transformers", "peft", "numpy", "rich", "yaml", "pydantic", "safetensors")
RUNS = 15


def cpu_seconds(code: str) -> float:
    """Return the CPU time of one fresh interpreter that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Interleave `--help`, `--version`, an empty interpreter and `import torch`."""
    facts = machine.facts()
    run = (
        "import sys; sys.argv = ['bmkit', {!r}]; import bmkit_cli.main as m\n"
        "try: m.main()\nexcept SystemExit: pass"
    )
    codes = {
        "python": "pass",
        "bmkit --help": run.format("--help"),
        "bmkit --version": run.format("--version"),
    }
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(RUNS):
        for name, code in codes.items():
            times[name].append(cpu_seconds(code))
    listing = codes["bmkit --help"] + "\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    seen = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True
    )
    loaded = {line.partition(".")[0] for line in seen.stderr.splitlines()}
    medians = {name: round(statistics.median(t), 4) for name, t in times.items()}
    machine.save(
        "startup",
        {
            **facts,
            "runs": RUNS,
            "cpu_seconds_median": medians,
            "cpu_seconds_min": {name: round(min(t), 4) for name, t in times.items()},
            "over_empty_interpreter": round(medians["bmkit --help"] / medians["python"], 2),
            "heavy_modules_loaded_by_help": sorted(loaded & set(HEAVY)),
        },
    )


if __name__ == "__main__":
    main()
