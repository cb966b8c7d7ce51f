"""Words to inputs: the model that `-m` names, and the base that a delta names."""

from __future__ import annotations

from pathlib import Path

from bmkit import artifact, env, plan
from bmkit.artifact import Artifact
from bmkit.errors import InputError
from bmkit.prompt.kept import own_model
from bmkit.pull import run as pulls
from bmkit.pull.source import can_be_fetched, understand
from bmkit.report import Reporter


def find_model(text: str, reporter: Reporter, *, bring: bool = True) -> Artifact:
    """Return the artifact, checkpoint, adapter or pulled model that `text` names.

    A `.gguf` file, a known name or a hub id is pulled first; without `bring` it must have been.
    """
    source = understand(text)
    if source.kind == "directory" and source.path is not None:
        return artifact.open_artifact(source.path)
    if bring:
        return pulls.pull(text, reporter)[0]
    if found := pulls.find(text):
        return found
    raise InputError(f"{text} is not here yet", hint=f"bring it with: bmkit pull {text}")


def find_base(delta: Artifact, reporter: Reporter, *, bring: bool = True) -> Artifact:
    """Return the model that `delta`, or a prompt, was made on.

    Its recorded path is used if the content there is still the same, else the cache is searched
    for that content. Raises InputError saying how to name the base by hand.
    """
    hint = f"name the base yourself: -m BASE --adapter {delta.path}"
    entry = delta.manifest.base if delta.manifest else None
    if entry is None:
        return _base_of_adapter(delta, reporter, hint, bring=bring)
    said = f"the base of {delta.path} is gone: {entry.path}"
    if entry.path is not None and Path(entry.path).exists():
        try:
            found = artifact.open_artifact(Path(entry.path))
            if found.digest == entry.digest:
                return found
            said = (
                f"the base of {delta.path} has changed: {entry.path} has digest "
                f"{found.digest[:12]}…, the {delta.kind} was made on {entry.digest[:12]}…"
            )
        except InputError as exc:
            said = f"the base of {delta.path} has changed: {exc}"
    for folder in ("models", "artifacts"):
        for place, manifest in artifact.scan(env.home() / folder):
            if manifest.digest == entry.digest:
                return artifact.open_artifact(place)
    if entry.name is not None and bring and can_be_fetched(entry.name):
        found = pulls.pull(entry.name, reporter)[0]
        if found.digest == entry.digest:
            return found
    raise InputError(said, hint=hint)


def find_asked(prompt: Artifact, reporter: Reporter, *, bring: bool = True) -> Artifact:
    """Return the model that a prompt is asked on: its own, if it has one, else its base."""
    own = own_model(prompt.path)
    if own is not None:
        return artifact.open_artifact(own)
    return find_base(prompt, reporter, bring=bring)


def _base_of_adapter(delta: Artifact, reporter: Reporter, hint: str, *, bring: bool) -> Artifact:
    config = plan.read_json(delta.path / "adapter_config.json")
    named = config.get("base_model_name_or_path")
    if not named:
        raise InputError(f"{delta.path} names no base model", hint=hint)
    try:
        return find_model(str(named), reporter, bring=bring)
    except InputError as exc:
        raise InputError(f"the base of {delta.path} is gone: {exc}", hint=hint) from None


TAUGHT = "train.jsonl"
"""Rows in an artifact, to learn from."""


def taught_rows(teacher: Artifact) -> Path:
    """Return the rows that a prompt has labelled. Raises InputError if there are none."""
    path = teacher.path.absolute() / TAUGHT
    if not path.is_file():
        raise InputError(
            f"{teacher.path} has labelled no rows to learn from",
            hint="name some in data.unlabelled of its recipe, or give others with --data",
        )
    return path


def warn_foreign_base(adapter: Artifact, model: Artifact, reporter: Reporter) -> None:
    """Warn if `adapter` was trained on something else than `model`."""
    entry = adapter.manifest.base if adapter.manifest else None
    if entry is not None and entry.digest != model.digest:
        reporter.warn(
            f"{adapter.path} was trained on {entry.name or entry.path} "
            f"({entry.digest[:12]}…), not on {model.path} ({model.digest[:12]}…)"
        )
