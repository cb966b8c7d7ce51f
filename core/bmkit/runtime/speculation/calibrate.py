"""What a forward costs on this machine by its number of tokens, measured once and remembered."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from bmkit import env
from bmkit.runtime.speculation.policy import Costs
from bmkit.runtime.speculation.tree import Tree

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32)
ROUNDS = 3
SECONDS = 20.0
"""Of measuring, after which larger forwards are left to be learned on the way."""


def costs(target: Any, name: str) -> Costs:
    """Return the cost of forwards of a target; `name` says which model, device and threads.

    Only their ratios are kept from run to run: the level is learned again in each.
    """
    file = _file(f"{name} {type(target).__name__} {_graphics(target)}")
    known = _read(file)
    if known is None:
        known = measure(target)
        _write(file, {str(k): v for k, v in known.items()})
    return Costs(known)


def reads_trees(target: Any, name: str) -> bool:
    """Tell whether a target verifies trees, and let it verify chains if not; see its `check`."""
    from transformers import __version__

    file = _file(f"{name} trees {__version__}")
    try:
        target.trees = bool(json.loads(file.read_text(encoding="utf-8"))["trees"])
    except (OSError, ValueError, KeyError, TypeError):
        target.check()
        _write(file, {"trees": target.trees})
    return bool(target.trees)


def _write(file: Path, values: Any) -> None:
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}.partial")
        scratch.write_text(json.dumps(values), encoding="utf-8")
        scratch.replace(file)


def _file(name: str) -> Path:
    where = " ".join((name, _processor()))
    return env.home() / "costs" / f"{hashlib.sha256(where.encode()).hexdigest()[:16]}.json"


def _processor() -> str:
    """Return what tells this machine's processor from another."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line
    return "unknown"


def _graphics(target: Any) -> str:
    """Return what tells a target's GPU from another."""
    import torch

    device = getattr(target, "device", None)
    on_gpu = device is not None and device.type == "cuda"
    return str(torch.cuda.get_device_name(device)) if on_gpu else ""


def _read(file: Path) -> dict[int, float] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        known = {int(k): float(v) for k, v in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return known if known and all(v > 0 for v in known.values()) else None


def measure(target: Any) -> dict[int, float]:
    """Measure forwards of SIZES tokens after a short prompt; nothing of it is kept."""
    target.begin(0, [0] * 8, slots=max(SIZES) + 8, adapter=None)
    found: dict[int, list[float]] = {}
    begun = time.perf_counter()
    for turn in range(ROUNDS + 1):
        for size in SIZES:
            tree = Tree.of(0)
            tree.add([0] * (size - 1), "", [1.0] * (size - 1))
            start = time.perf_counter()
            float(target.forward({0: tree})[0][0, 0])  # waits for a device
            seconds = time.perf_counter() - start
            target.keep(0, [])
            slow = seconds > 1 and not target.recorded
            if turn or slow:  # the first of a size makes its room
                found.setdefault(size, []).append(seconds)
            if time.perf_counter() - begun > SECONDS and found:
                break
        if time.perf_counter() - begun > SECONDS and found:
            break
    rising = 0.0
    measured = {}
    for size, times in sorted(found.items()):
        rising = max(rising, median(times))
        measured[size] = rising
    return measured
