"""`bmkit merge`: deltas into their base's weights, or LoRA deltas of one base into one delta."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import bmkit
from bmkit import artifact, env, place, registry
from bmkit.artifact import Artifact, Step
from bmkit.errors import InputError, UsageError
from bmkit.pipeline.resolve import find_base, find_model, warn_foreign_base
from bmkit.report import Reporter

VERSION = 1


def merge(
    model: str,
    adapters: Sequence[str],
    weights: Sequence[float] | None,
    reporter: Reporter,
    *,
    out: Path | None = None,
    force: bool = False,
) -> tuple[Artifact, bool]:
    """Merge what `model`, a delta or a model, and `adapters` name; return it, and if it was there.

    Without `weights` the result is a model. With one for each delta, it is a LoRA delta: their
    weighted sum. Raises InputError for what doesn't go together, UsageError for words that don't.
    """
    first = find_model(model, reporter)
    others = [find_model(name, reporter) for name in adapters]
    deltas = [*([first] if first.kind == "delta" else []), *others]
    base = find_base(first, reporter) if first.kind == "delta" else first
    for found in deltas:
        if found.kind != "delta":
            raise InputError(f"--adapter {found.path} is a {found.kind}, not a delta")
    for found in others:
        warn_foreign_base(found, base, reporter)
    folders = [folder for delta in deltas for folder in artifact.deltas(delta.path)]
    if not folders:
        raise UsageError("there is nothing to merge", hint="name a delta: -m DELTA, or --adapter")
    if weights is not None and len(weights) != len(folders):
        raise UsageError(f"--weights has {len(weights)} numbers for {len(folders)} deltas")
    digests = {"base": base.digest} | {f"delta.{i}": d.digest for i, d in enumerate(deltas)}
    recipe = {"weights": list(weights) if weights is not None else None}
    key = artifact.stage_key("merge", VERSION, recipe, digests)
    target = out or env.home() / "artifacts" / f"merge-{first.path.name}-{key[:8]}"
    if done := place.occupied(target, key, force=force):
        return done, True
    with place.create(target, key=key, force=force, wait=out is None) as scratch:
        if weights is None:
            names = {f"{i}-{folder.name}": folder for i, folder in enumerate(folders)}
            registry.load("bmkit.tune.merging:merged")(base.path, names, scratch)
            for delta in deltas:
                registry.load("bmkit.model:copy_side_files")(delta.path, scratch)
        else:
            registry.load("bmkit.tune.merging:summed")(folders, weights, scratch)
        inputs = {"base": base.entry()} | {f"delta.{i}": d.entry() for i, d in enumerate(deltas)}
        manifest = artifact.write_manifest(
            scratch,
            version=bmkit.__version__,
            kind="model" if weights is None else "delta",
            steps=[
                *first.steps,
                Step(stage="merge", name="merge", key=key, recipe=recipe, inputs=inputs),
            ],
            base=None if weights is None else base.entry(),
            loads_in=("transformers",) if weights is None else ("peft",),
        )
    artifact.remember(target, manifest)
    return Artifact(target, manifest.kind, manifest.digest, manifest), False
