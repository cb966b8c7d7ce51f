"""A dialogue in slices of time: what each side says in each of them, in text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from bmkit.data import rows
from bmkit.errors import InputError, did_you_mean

Tag = Literal[
    "mid", "end", "cont", "quiet", "pause", "stop", "barge", "side", "backchannel", "noise", "late"
]
"""What the agent's side of a slice is an answer to:

`mid`: the user speaks and hasn't finished; `pause`: the user is silent within a query; `end`: the
query ends here; `late`: it ended some slices ago, and is answered now; `cont`: the agent goes on;
`quiet`: there is nothing to say; `stop`: the user asks for silence; `barge`: the user interrupts,
and hasn't finished; `side`: a question in between ends here; `backchannel`: the user says `I see`
while the agent speaks; `noise`: words that aren't meant for the agent.
"""
TAGS: tuple[Tag, ...] = get_args(Tag)
UNFINISHED: tuple[Tag, ...] = ("mid", "pause", "barge")
"""The tags at which an agent that speaks takes the turn too early."""


@dataclass(frozen=True)
class Slice:
    """One slice: what the user says in it, and what the agent answers at its end.

    None is silence. Text is as it stands in the stream: the agent's next slice goes on where this
    one stopped, with its own leading space.
    """

    user: str | None
    agent: str | None
    tag: Tag
    weight: float = 1.0
    """Of the loss on the agent's side; 0 where it isn't to be learned."""

    @property
    def silent(self) -> bool:
        """Tell whether nobody says anything."""
        return self.user is None and self.agent is None


@dataclass(frozen=True)
class Dialogue:
    """Slices of one conversation. `kind` says which interaction it shows."""

    id: str
    kind: str
    slices: tuple[Slice, ...]
    lang: str = "en"
    meta: Mapping[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """Return the dialogue as a row of JSON."""
        slices = []
        for one in self.slices:
            row: dict[str, Any] = {"u": one.user, "a": one.agent, "tag": one.tag}
            slices.append(row if one.weight == 1.0 else {**row, "w": one.weight})
        found = {"id": self.id, "kind": self.kind, "lang": self.lang, "slices": slices}
        return {**found, "meta": dict(self.meta)} if self.meta else found


def of_values(values: Mapping[str, Any], *, number: int = 0) -> Dialogue:
    """Return the dialogue of a row of JSON; its id is `number` if it has none.

    Raises ValueError saying what is wrong with it.
    """
    listed = values.get("slices")
    if not isinstance(listed, list) or not listed:
        raise ValueError("it has no `slices`, a list of `u`, `a` and `tag`")
    slices = tuple(_slice(one, place) for place, one in enumerate(listed))
    meta = values.get("meta", {})
    if not isinstance(meta, dict):
        raise ValueError("`meta` is not an object")
    return Dialogue(
        str(values.get("id", number)),
        str(values.get("kind", "basic")),
        slices,
        str(values.get("lang", "en")),
        meta,
    )


def _slice(values: object, place: int) -> Slice:
    where = f"slice {place}"
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not an object")
    sides: list[str | None] = []
    for side in ("u", "a"):
        said = values.get(side)
        if said is not None and (not isinstance(said, str) or not said.strip()):
            raise ValueError(f"{where}: `{side}` is neither text nor null")
        sides.append(None if said is None else rows.require_text(said))
    tag = values.get("tag")
    if tag not in TAGS:
        near = did_you_mean(str(tag), TAGS, otherwise=", ".join(TAGS))
        raise ValueError(f"{where}: `{tag}` is not a tag; {near}")
    weight = values.get("w", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
        raise ValueError(f"{where}: `w` is not a weight")
    return Slice(sides[0], sides[1], tag, float(weight))


def read(path: Path) -> Iterator[Dialogue]:
    """Yield the dialogues of a file of JSON lines.

    Raises InputError naming the first bad line, or if there is no row.
    """
    with path.open("rb") as stream:
        number = -1
        for number, row in enumerate(rows.read(stream)):
            if isinstance(row, rows.BadRow):
                raise InputError(f"{path}:{row.line}: {row.problem}")
            try:
                yield of_values(row.values, number=number)
            except ValueError as exc:
                raise InputError(f"{path}:{row.line}: {exc}") from None
    if number < 0:
        raise InputError(f"{path} holds no rows", hint="it takes one dialogue a line")
