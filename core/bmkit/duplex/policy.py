"""Whether the agent speaks, given how likely the model finds silence; every choice has a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Decision = Literal["speak", "listen"]
Reason = Literal["argmax", "threshold", "drawn", "max_wait", "cooldown", "abort"]
"""`argmax` and `threshold`: what the model finds; `drawn`: as often as it finds; `max_wait`: the
user has waited for an answer; `cooldown`: the agent was interrupted just now, or told to be silent;
`abort`: it was stopped in this slice."""


@dataclass(frozen=True)
class Verdict:
    """A decision and why it was taken."""

    speaks: bool
    reason: Reason


@dataclass(frozen=True)
class Policy:
    """How decisions are taken."""

    threshold: float | None = None
    """The agent speaks if silence is less likely than this; None: if it isn't the likeliest."""
    max_wait: int | None = 2
    """After so many slices of silence behind a query without an answer, the session goes back to
    where it ended, and the agent speaks there; None: never."""
    on_max_wait: Literal["rewind", "speak"] = "rewind"
    """`speak`: it speaks in the present slice instead."""
    sure: float = 0.995
    """It stays silent if silence was likelier than this there: it was told to, or wasn't asked."""
    cooldown: int = 0
    """Slices that the agent stays silent after it was interrupted."""

    def decide(
        self, p_idle: float, *, likeliest: bool, rest: int = 0, draw: float | None = None
    ) -> Verdict:
        """Decide. `likeliest`: whether silence is; `rest`: slices of cooldown that are left.

        With `draw`, from [0, 1), it is silent as often as the model finds.
        """
        if rest > 0:
            return Verdict(False, "cooldown")
        if draw is not None:
            return Verdict(draw >= p_idle, "drawn")
        if self.threshold is None:
            return Verdict(not likeliest, "argmax")
        return Verdict(p_idle < self.threshold, "threshold")

    def is_due(self, waited: int) -> bool:
        """Tell whether the user has waited long enough, now and not before."""
        return self.max_wait is not None and waited == self.max_wait

    def forces(self, p_idle: float) -> bool:
        """Tell whether the agent is to speak where it has been silent."""
        return p_idle <= self.sure
