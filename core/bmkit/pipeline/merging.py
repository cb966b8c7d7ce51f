"""`bmkit merge`: deltas or a prompt into their base, or LoRA deltas of one base into one delta."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bmkit
from bmkit import artifact, env, place, registry
from bmkit.artifact import Artifact, Step
from bmkit.errors import InputError, UsageError, an_artifact
from bmkit.pipeline.resolve import find_asked, find_base, find_model, warn_foreign_base
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
    """Merge what `model` and `adapters` name; return it, and if it was there.

    `model` is a delta, a model, or a prompt alone. Without `weights` the result is a model. With
    one for each delta, it is a LoRA delta: their weighted sum. Raises InputError for what doesn't
    go together, UsageError for words that don't.
    """
    first = find_model(model, reporter)
    if first.kind not in ("model", "delta", "prompt"):
        takes = "`bmkit merge` takes a model, a delta or a prompt"
        raise InputError(f"{first.path} is {an_artifact(first.kind)}; {takes}")
    if first.kind == "prompt":
        if adapters or weights is not None:
            raise UsageError("a prompt is merged alone", hint="leave --adapter and --weights out")
        return _merge_prompt(first, reporter, out=out, force=force)
    others = [find_model(name, reporter) for name in adapters]
    deltas = [*([first] if first.kind == "delta" else []), *others]
    base = find_base(first, reporter) if first.kind == "delta" else first
    for found in deltas:
        if found.kind != "delta":
            raise InputError(f"--adapter {found.path} is {an_artifact(found.kind)}, not a delta")
    for found in others:
        warn_foreign_base(found, base, reporter)
    folders = [folder for delta in deltas for folder in artifact.deltas(delta.path)]
    if not folders:
        raise UsageError("there is nothing to merge", hint="name a delta: -m DELTA, or --adapter")
    if weights is not None and len(weights) != len(folders):
        raise UsageError(f"--weights has {len(weights)} numbers for {len(folders)} deltas")

    def fill(scratch: Path) -> None:
        if weights is None:
            names = {f"{i}-{folder.name}": folder for i, folder in enumerate(folders)}
            registry.load("bmkit.tune.merging:merged")(base.path, names, scratch)
            for delta in deltas:
                registry.load("bmkit.model:copy_side_files")(delta.path, scratch)
        else:
            registry.load("bmkit.tune.merging:summed")(folders, weights, scratch)

    inputs = {"base": base} | {f"delta.{i}": d for i, d in enumerate(deltas)}
    recipe = {"weights": list(weights) if weights is not None else None}
    return _made(first, inputs, recipe, fill, out=out, force=force)


def _merge_prompt(
    prompt: Artifact, reporter: Reporter, *, out: Path | None, force: bool
) -> tuple[Artifact, bool]:
    """Merge a prompt, and the delta that it was made on, into the model that it is asked on."""
    base = find_asked(prompt, reporter)
    inputs, folders = {"base": base, "prompt": prompt}, list[Path]()
    if base.kind == "delta":
        folders = artifact.deltas(base.path)
        inputs |= {"base": find_base(base, reporter), "delta.0": base}

    def fill(scratch: Path) -> None:
        merged = registry.load("bmkit.prompt.merging:merged")
        for said in merged(inputs["base"].path, folders, prompt.path, scratch):
            reporter.info(f"merge: {said}")

    return _made(prompt, inputs, {"weights": None}, fill, out=out, force=force)


def _made(
    first: Artifact,
    inputs: Mapping[str, Artifact],
    recipe: dict[str, Any],
    fill: Callable[[Path], None],
    *,
    out: Path | None,
    force: bool,
) -> tuple[Artifact, bool]:
    """Return what was merged: a model, or with weights a delta; and whether it was there."""
    digests = {name: found.digest for name, found in inputs.items()}
    key = artifact.stage_key("merge", VERSION, recipe, digests)
    target = out or env.home() / "artifacts" / f"merge-{first.path.name}-{key[:8]}"
    if done := place.occupied(target, key, force=force):
        return done, True
    whole = recipe["weights"] is None
    with place.create(target, key=key, force=force, wait=out is None) as scratch:
        fill(scratch)
        entries = {name: found.entry() for name, found in inputs.items()}
        step = Step(stage="merge", name="merge", key=key, recipe=recipe, inputs=entries)
        manifest = artifact.write_manifest(
            scratch,
            version=bmkit.__version__,
            kind="model" if whole else "delta",
            steps=[*first.steps, step],
            base=None if whole else entries["base"],
            loads_in=("transformers",) if whole else ("peft",),
        )
    artifact.remember(target, manifest)
    return Artifact(target, manifest.kind, manifest.digest, manifest), False
