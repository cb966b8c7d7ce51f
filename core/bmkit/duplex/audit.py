"""What was built, counted: kinds, tags, lengths, silence, repetitions, and leaks between splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bmkit.data.slices import cut
from bmkit.data.slices.dialogue import Dialogue
from bmkit.duplex.sketch import Sketch
from bmkit.duplex.speech import unpunctuated
from bmkit.duplex.transitions import SPLITS

HELD_OUT = ("dev", "test")
WORDS = 4
"""Words from which on a query counts as one that may leak: shorter ones are everybody's."""


@dataclass
class _Split:
    """What is counted of one split."""

    kinds: Counter[str] = field(default_factory=Counter)
    unpunctuated: int = 0
    chats: Sketch = field(default_factory=Sketch)
    queries: Sketch = field(default_factory=Sketch)
    transitions: set[str] = field(default_factory=set)


class Audit:
    """Counts over dialogues, in memory that doesn't grow with them."""

    def __init__(self) -> None:
        self.splits = {split: _Split() for split in SPLITS}
        self.kinds: dict[str, Counter[str]] = {}
        self.tags: dict[str, Counter[str]] = {}
        self.words: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()
        self.rows = Sketch()
        self.skipped = 0
        self.read = 0

    def add(self, split: str, dialogue: Dialogue, queries: Iterable[str] = ()) -> None:
        """Count a dialogue, made of chats with these queries."""
        found = self.splits[split]
        found.kinds[dialogue.kind] += 1
        found.unpunctuated += not dialogue.meta.get("punctuated", True)
        for chat in dialogue.meta.get("chats", ()):
            found.chats.add(chat)
        for query in queries:
            if len(query.split()) >= WORDS:
                found.queries.add(unpunctuated(query))
        found.transitions.update(dialogue.meta.get("transitions", ()))
        self.rows.add(repr([(one.user, one.agent) for one in dialogue.slices]))
        counted = self.kinds.setdefault(dialogue.kind, Counter())
        for one in dialogue.slices:
            counted["slices"] += 1
            counted["idle"] += one.agent is None
            tag = self.tags.setdefault(one.tag, Counter())
            tag["silent" if one.agent is None else "spoken"] += 1
            tag["not learned"] += one.weight == 0
            if one.user is not None:
                self.words[len(one.user.split())] += 1
            if one.agent is not None:
                self.tokens[cut.about(one.agent)] += 1

    def metrics(self) -> dict[str, float | int | str]:
        """Return the figures of the manifest."""
        splits = self.splits
        slices = sum(one["slices"] for one in self.kinds.values())
        idle = sum(one["idle"] for one in self.kinds.values())
        spoken = sum(one["spoken"] for one in self.tags.values())
        starts = sum(self.tags.get(tag, Counter())["spoken"] for tag in ("end", "side", "late"))
        waits = sum(self.tags.get(tag, Counter())["silent"] for tag in ("mid", "pause", "barge"))
        count = {split: sum(one.kinds.values()) for split, one in splits.items()}
        held = [splits[split] for split in HELD_OUT]
        train = splits["train"]
        return {
            "dialogues": sum(count.values()),
            **{f"{split}_dialogues": number for split, number in count.items()},
            "slices": slices,
            "idle_ratio": _share(idle, idle + spoken),
            "decision_balance": _share(starts, starts + waits),
            "unpunctuated_share": _share(
                sum(one.unpunctuated for one in splits.values()), sum(count.values())
            ),
            "duplicate_rate": round(self.rows.repeated, 4),
            "leaked_chats": round(max(one.chats.shared(train.chats) for one in held), 4),
            "leaked_turns": round(max(one.queries.shared(train.queries) for one in held), 4),
            "leaked_transitions": self._leaked_transitions(),
            "rows_read": self.read,
            "rows_skipped": self.skipped,
        }

    def _leaked_transitions(self) -> int:
        train, dev, test = (self.splits[split].transitions for split in SPLITS)
        return len((train & dev) | (train & test) | (dev & test))

    def table(self) -> list[dict[str, float | int | str]]:
        """Return a line for each interaction."""
        return [
            {
                "step": kind,
                **{split: self.splits[split].kinds[kind] for split in SPLITS},
                "slices": counted["slices"],
                "idle": _share(counted["idle"], counted["slices"]),
            }
            for kind, counted in sorted(self.kinds.items())
        ]

    def values(self) -> dict[str, Any]:
        """Return all of it, for `audit.json`."""
        return {
            "metrics": self.metrics(),
            "kinds": self.table(),
            "tags": {tag: dict(sorted(c.items())) for tag, c in sorted(self.tags.items())},
            "user_words_of_a_slice": dict(sorted(self.words.items())),
            "agent_tokens_of_a_slice": dict(sorted(self.tokens.items())),
            "transitions": {
                split: dict(Counter(item.partition(":")[0] for item in sorted(one.transitions)))
                for split, one in self.splits.items()
            },
        }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0
