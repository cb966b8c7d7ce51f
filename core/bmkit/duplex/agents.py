"""What is measured: something that says, slice by slice, what an agent would say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bmkit.data.slices.dialogue import Dialogue, Tag


@dataclass(frozen=True)
class Spoken:
    """What an agent has done with a slice. `text` None is silence."""

    text: str | None
    p_idle: float | None = None
    """How likely silence was; None if the agent doesn't say."""
    seconds: float | None = None
    """How long it took on this machine."""

    @property
    def speaks(self) -> bool:
        """Tell whether something is said."""
        return self.text is not None


@dataclass(frozen=True)
class Decided:
    """A decision beside the right one."""

    tag: Tag
    wanted: bool
    """Whether the agent is to speak."""
    speaks: bool
    p_idle: float | None = None
    dialogue: str = ""
    """The id of the dialogue that it is in."""
    heard: str | None = None
    """What the user says in the slice, if the agent tells."""


class Session(Protocol):
    """A conversation under way."""

    def step(self, user: str | None) -> Spoken:
        """Take what the user said in a slice, and answer at its end."""


class Agent(Protocol):
    """Something to talk to."""

    @property
    def name(self) -> str:
        """Return what reports call it."""

    @property
    def wordless(self) -> bool:
        """Tell whether what it says means nothing."""

    def open(self) -> Session:
        """Begin a conversation that knows of no other."""

    def judge(self, dialogue: Dialogue) -> list[Decided]:
        """Return its decision at each slice, where all slices before went as they are written.

        A slice without weight isn't judged. An agent may divide what it is to say otherwise.
        """
