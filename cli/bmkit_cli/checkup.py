"""What `bmkit doctor` looks at."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from bmkit import __version__, env
from bmkit.errors import ResourceError

FLOORS = {
    "torch": (2, 11),
    "transformers": (5, 17),
    "peft": (0, 21),
    "accelerate": (1, 10),
    "compressed-tensors": (0, 20),
    "safetensors": (0, 6),
    "gguf": (0, 17),
    "numba": (0, 62),
}

EXTRAS = {"optimum-quanto": "quanto", "gptqmodel": "gptq", "tensorboard": "tensorboard"}
"""What may be there besides, each with the extra of bmkit that brings it."""


def look() -> dict[str, Any]:
    """Return what bmkit stands on: versions, devices, memory, disk, and what is wrong with them."""
    packages = {}
    problems = []
    for name, floor in FLOORS.items():
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed")
            continue
        if _numbers(packages[name]) < floor:
            problems.append(f"{name} {packages[name]} is older than {'.'.join(map(str, floor))}")
    home = env.home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        writable = os.access(home, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        problems.append(f"BMKIT_HOME {home} is not writable")
    return {
        "bmkit": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "ram_available": env.format_bytes(env.available_ram_bytes()),
        "home": str(home),
        "home_free": env.format_bytes(env.free_disk_bytes(home)),
        "devices": _devices(problems) if "torch" in packages else [],
        "packages": packages,
        "extras": {name: _extra(name, extra) for name, extra in EXTRAS.items()},
        "problems": problems,
    }


def _extra(name: str, extra: str) -> str:
    """Return the version of an optional package, or how to get it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed (pip install 'bmkit[{extra}]')"


def _devices(problems: list[str]) -> list[str]:
    """Ask torch; a build that fails to import is a finding, not an end."""
    try:
        from bmkit import model

        found = model.devices()
    except (ImportError, OSError) as exc:
        problems.append(f"torch can't be imported: {exc}")
        return []
    if env.has_nvidia_gpu() and not any(name.startswith("cuda") for name in found):
        problems.append("there is an NVIDIA GPU, but this torch build can't use it")
    return found


def flat(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the findings as lines of key and value."""
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from ((name, str(version)) for name, version in value.items())
        elif isinstance(value, list):
            yield from ((key, str(entry)) for entry in value or ["none"])
        else:
            yield key, str(value)


def complain(found: Mapping[str, Any]) -> None:
    """Raise ResourceError if something is wrong."""
    if found["problems"]:
        raise ResourceError(
            "; ".join(found["problems"]), hint="reinstall with: pip install --upgrade bmkit"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(p) for p in version.split("+")[0].split(".")[:2] if p.isdigit())
