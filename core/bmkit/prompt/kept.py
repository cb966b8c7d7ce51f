"""The prompts of an artifact: one, or those of an ensemble, each in a folder. No torch here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bmkit.errors import InputError
from bmkit.prompt import stored
from bmkit.prompt.stored import KeptPrompt
from bmkit.prompt.tasks import longest

FILE = "ensemble.json"
MEMBERS = "members"
"""Where an ensemble has its prompts."""
WHOLE = "model"
"""Where a prompt has a model of its own, a checkpoint."""


class KeptMember(BaseModel):
    """A member: the name of its folder, and how much it counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w-]+$")
    weight: float = Field(ge=0)


class KeptEnsemble(BaseModel):
    """What an ensemble's file says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    aggregate: Literal["probabilities", "logarithms"]
    members: list[KeptMember] = Field(min_length=1)


@dataclass(frozen=True)
class Kept:
    """All prompts of an artifact."""

    folders: Sequence[Path]
    prompts: Sequence[KeptPrompt]
    ensemble: KeptEnsemble | None = None

    @property
    def first(self) -> KeptPrompt:
        """Return the only one, or an ensemble's first."""
        return self.prompts[0]

    @property
    def tokens(self) -> int:
        """Return how many tokens there can be of a prompt, with what may be said behind it."""
        return max(longest(p.task, p.max_seq_length, p.generate) for p in self.prompts)


def own_model(folder: Path) -> Path | None:
    """Return the model that a prompt has of its own; of those of an ensemble's members the first.

    None for a prompt that is asked on what it was made on.
    """
    found = [folder / WHOLE, *sorted(folder.glob(f"{MEMBERS}/*/{WHOLE}"))]
    return next((path for path in found if path.is_dir()), None)


def read(folder: Path) -> Kept:
    """Read what is in an artifact's directory. Raises InputError if it is missing or damaged."""
    if not (folder / FILE).is_file():
        return Kept([folder], [stored.read(folder)])
    try:
        found = KeptEnsemble.model_validate_json((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as exc:
        raise InputError(f"{folder / FILE} is damaged: {str(exc).splitlines()[0]}") from None
    folders = [folder / MEMBERS / PurePosixPath(member.name).name for member in found.members]
    prompts = [stored.read(path) for path in folders]
    if any((p.labels, p.task) != (prompts[0].labels, prompts[0].task) for p in prompts):
        raise InputError(f"{folder} is damaged: its members tell different labels")
    return Kept(folders, prompts, found)


def write(folder: Path, ensemble: KeptEnsemble) -> None:
    """Write an ensemble's file into an artifact's directory, beside its members."""
    text = json.dumps(ensemble.model_dump(mode="json"), indent=1)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def described(folder: Path) -> list[str]:
    """Return the lines that people are shown of an artifact's prompts."""
    kept = read(folder)
    if kept.ensemble is None:
        return stored.described(kept.first)
    lines = [f"ensemble {len(kept.prompts)} prompts, the mean of their {kept.ensemble.aggregate}"]
    for member, prompt in zip(kept.ensemble.members, kept.prompts, strict=True):
        lines.append(f"member   {member.name}, weight {member.weight:.4f}")
        lines += [f"  {line}" for line in stored.described(prompt)]
    return lines


def values(folder: Path) -> dict[str, Any]:
    """Return what `bmkit show --json` prints of an artifact's prompts."""
    kept = read(folder)
    if kept.ensemble is None:
        return kept.first.model_dump(mode="json")
    members = [
        {**member.model_dump(), "prompt": prompt.model_dump(mode="json")}
        for member, prompt in zip(kept.ensemble.members, kept.prompts, strict=True)
    ]
    return {**kept.ensemble.model_dump(mode="json"), "members": members}
