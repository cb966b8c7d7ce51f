"""Interactions of silence: in mid-query, and where an answer should have been."""

from __future__ import annotations

from bmkit.duplex.english import OPEN
from bmkit.duplex.scene import Scene, UnfitError


def pause(scene: Scene) -> None:
    """Let the user think in mid-query: behind words that leave it open, or that ask for time."""
    turns = scene.chat.turns
    long = [number for number, turn in enumerate(turns) if len(turn.user.split()) >= 4]
    if not long:
        raise UnfitError
    chosen = set(scene.draw.sample(long, min(len(long), scene.draw.choice((1, 1, 2)))))
    for number, turn in enumerate(turns):
        if number in chosen:
            last = _hesitating(scene, scene.query(turn))
            scene.answer(last, scene.said(turn.agent))
        else:
            scene.plain(turn)
        scene.quiet()


def _hesitating(scene: Scene, text: str) -> str:
    words = text.split()
    open_ = [at for at in range(2, len(words)) if words[at - 1].lower().strip(",'") in OPEN]
    before, after = words, words[:0]
    if open_ and scene.draw.random() < 0.6:
        at = scene.draw.choice(open_)
        before, after = words[:at], words[at:]
    else:
        at = scene.draw.randrange(1, len(words))
        said = scene.words("hesitation")
        before, after = [*words[:at], *said.split()], words[at:]
    scene.listen(scene.heard(" ".join(before)))
    for _ in range(scene.draw.choice((1, 1, 2, 3))):
        scene.lay(None, None, "pause")
    parts = scene.heard(" ".join(after))
    scene.listen(parts[:-1])
    return parts[-1]


def late_answer(scene: Scene) -> None:
    """Let the agent miss the end of a query, and answer in the silence behind it.

    What it missed isn't learned. Without such data, a model that has missed an end stays silent.
    """
    turns = scene.chat.turns
    chosen = scene.draw.randrange(len(turns))
    for number, turn in enumerate(turns):
        if number == chosen:
            scene.lay(scene.ask(scene.query(turn)), None, "mid", 0.0)
            if scene.draw.random() < 0.3:
                scene.lay(None, None, "pause", 0.0)
            scene.answer(None, scene.said(turn.agent), "late")
        else:
            scene.plain(turn)
        scene.quiet()
