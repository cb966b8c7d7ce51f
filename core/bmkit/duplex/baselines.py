"""Rules to compare with: they take turns as a machine does that listens or speaks.

All of them fall silent at any word of the user, and know when their own answer is over, as
a model that answers in one go does. What they say is nothing but a number of words.
"""

from __future__ import annotations

from dataclasses import dataclass

from bmkit.data.slices.dialogue import Dialogue
from bmkit.duplex.agents import Agent, Decided, Session, Spoken

ENDINGS = (".", "?", "!", "…", "。", "？", "！")  # noqa: RUF001
WORDS = " and so on and on and on"
"""What a rule says in a slice: seven words, about ten tokens."""


@dataclass(frozen=True)
class AlwaysIdle:
    """Never speaks."""

    name: str = "always_idle"
    wordless: bool = True

    def open(self) -> Session:
        """Begin a conversation."""
        return _Silence()

    def judge(self, dialogue: Dialogue) -> list[Decided]:
        """Decide for silence in each slice."""
        return [
            Decided(one.tag, one.agent is not None, speaks=False)
            for one in dialogue.slices
            if one.weight
        ]


class _Silence:
    def step(self, user: str | None) -> Spoken:
        return Spoken(None)


@dataclass(frozen=True)
class Punctuation:
    """Speaks once the user's words end with a full stop, a question mark or an exclamation mark."""

    length: int = 3
    """Slices of an answer, when nobody says how long it is."""
    name: str = "punctuation"
    wordless: bool = True

    def open(self) -> Session:
        """Begin a conversation."""
        return _Rule(self)

    def judge(self, dialogue: Dialogue) -> list[Decided]:
        """Decide at each slice; an answer under way ends where the written one does."""
        return _judged(self, dialogue)

    def answers(self, heard: str | None, silent: int) -> bool:
        """Tell whether an answer begins: `heard` is said now, or was before `silent` slices."""
        return heard is not None and silent == 0 and heard.rstrip().endswith(ENDINGS)


@dataclass(frozen=True)
class VoiceActivity:
    """Speaks after `slices` slices of silence behind words of the user."""

    slices: int = 1
    length: int = 3
    wordless: bool = True

    @property
    def name(self) -> str:
        """Return `vad_` and the number of slices."""
        return f"vad_{self.slices}"

    def open(self) -> Session:
        """Begin a conversation."""
        return _Rule(self)

    def judge(self, dialogue: Dialogue) -> list[Decided]:
        """Decide at each slice; an answer under way ends where the written one does."""
        return _judged(self, dialogue)

    def answers(self, heard: str | None, silent: int) -> bool:
        """Tell whether an answer begins: `heard` is said now, or was before `silent` slices."""
        return heard is not None and silent == self.slices


Rule = Punctuation | VoiceActivity


class _Rule:
    """A conversation with a rule."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.heard: str | None = None
        """What the user has said last, until it is answered."""
        self.silent = 0
        self.left = 0
        """Slices of the answer that are still to come."""

    def step(self, user: str | None) -> Spoken:
        self.silent = 0 if user is not None else self.silent + 1
        if user is not None:
            self.heard, self.left = user, 0
        if self.rule.answers(self.heard, self.silent):
            self.heard, self.left = None, self.rule.length
        if not self.left:
            return Spoken(None)
        self.left -= 1
        return Spoken(WORDS)


def _judged(rule: Rule, dialogue: Dialogue) -> list[Decided]:
    found = []
    heard: str | None = None
    silent = 0
    spoke = False
    for one in dialogue.slices:
        silent = 0 if one.user is not None else silent + 1
        heard = heard if one.user is None else one.user
        goes_on = spoke and one.user is None and one.agent is not None
        speaks = goes_on or rule.answers(heard, silent)
        if one.weight:
            found.append(Decided(one.tag, one.agent is not None, speaks))
        spoke = one.agent is not None
        if spoke:
            heard = None
    return found


def baselines(length: int) -> list[Agent]:
    """Return all rules, with answers of `length` slices."""
    return [
        Punctuation(length),
        VoiceActivity(1, length),
        VoiceActivity(2, length),
        AlwaysIdle(),
    ]
