"""How a session runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from bmkit.duplex.policy import Policy
from bmkit.duplex.voice import Sampling


@dataclass(frozen=True)
class Settings:
    """How a session runs."""

    agent_tokens: int = 10
    """Most tokens that the agent says in a slice."""
    high: int = 3000
    """Tokens at which the oldest slices are forgotten."""
    low: int = 2000
    """Tokens that are left then."""
    sinks: int = 4
    """Tokens at the beginning whose slices stay."""
    ahead: int = 128
    """Tokens of what is left that are read in each slice beforehand, if there is a spare place."""
    guesses: int = 0
    """Most tokens that are guessed and read along while the agent speaks."""
    revisable: int = 8
    """Slices within which words may turn out to be others."""
    collapse_idle: bool = True
    evicts: bool = True
    """Whether anything is forgotten; else a session ends that is full."""
    draws: bool = False
    """Whether the decision to speak is drawn, as words are."""
    policy: Policy = field(default_factory=Policy)
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def soon(self) -> int:
        """Tokens from which on something is forgotten as soon as that keeps nobody waiting."""
        return (self.high + self.low) // 2
