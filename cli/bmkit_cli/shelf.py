"""What `bmkit cache` shows and removes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bmkit import artifact, env, place
from bmkit.errors import InputError


def contents() -> list[dict[str, Any]]:
    """Return models, artifacts, compiled kernels, training leftovers and scratch in BMKIT_HOME."""
    found = []
    for group in ("models", "artifacts", "kernels", "work"):
        for folder in sorted((env.home() / group).glob("*")) + sorted(
            (env.home() / group).glob(".*.partial")
        ):
            if folder.is_dir():
                size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
                kind = _kind(group, folder)
                found.append({"path": str(folder), "kind": kind, "group": group, "bytes": size})
    return found


def _kind(group: str, folder: Path) -> str:
    if group == "work" or folder.name.startswith("."):
        return "leftover"
    if group == "kernels":
        return "kernels"
    try:
        return artifact.read_manifest(folder).kind
    except InputError:
        return "damaged"


def prune(*, models: bool) -> list[dict[str, Any]]:
    """Remove artifacts, kernels and leftovers, with `models` also those; what is in use stays."""
    removed = []
    for entry in contents():
        folder = Path(entry["path"])
        if entry["group"] == "models" and entry["kind"] != "leftover" and not models:
            continue
        try:
            with place.hold(folder, str(folder)):
                shutil.rmtree(folder)
        except InputError:  # another bmkit is writing it
            continue
        removed.append(entry)
    return removed
