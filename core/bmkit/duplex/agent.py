"""What an agent did in a slice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bmkit.duplex.policy import Decision, Reason


@dataclass(frozen=True)
class AgentSlice:
    """What the agent did in a slice."""

    slice: int
    epoch: int
    """Rises whenever something that was said or decided is taken back."""
    decision: Decision
    reason: Reason
    p_idle: float
    """How likely the model found silence."""
    text: str
    ids: tuple[int, ...]
    answer: int | None
    kv_length: int
    """Tokens in the cache."""
    forwards: int
    heard: str | None = None
    rewound: int = 0
    """Slices that the session went back to speak."""
    evicted: int = 0
    """Tokens that were forgotten before this slice."""
    cut: int = 0
    """Tokens of the user's words that didn't fit, and were left out."""
    interrupted: bool = False

    def values(self) -> dict[str, Any]:
        """Return what a transcript says of it."""
        found: dict[str, Any] = {"slice": self.slice, "epoch": self.epoch}
        found |= {"decision": self.decision, "reason": self.reason}
        found |= {"p_idle": round(self.p_idle, 4), "text": self.text, "ids": list(self.ids)}
        found |= {"answer": self.answer, "kv": self.kv_length, "forwards": self.forwards}
        for name in ("rewound", "evicted", "cut", "interrupted"):
            if value := getattr(self, name):
                found[name] = value
        return found
