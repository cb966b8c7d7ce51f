"""Interactions in which a query that seemed to be over is put right, or goes on."""

from __future__ import annotations

from bmkit.duplex.english import NOT_THINGS
from bmkit.duplex.scene import Scene, UnfitError

LETTERS = 4
"""Letters of a word that may be taken for another one."""
JOINS = ("and", "but", "or", "with", "without", "for", "because")


def late_correction(scene: Scene) -> None:
    """Let the agent begin too early: the user names another word than was heard, or adds to it.

    The agent stops, and answers once the query is whole.
    """
    turns = scene.chat.turns
    order = scene.draw.sample(range(len(turns)), len(turns))
    ways = ((number, _way(scene, turns[number].user)) for number in order)
    chosen, way = next(((number, way) for number, way in ways if way), (0, None))
    if way is None:
        raise UnfitError
    for number, turn in enumerate(turns):
        if number == chosen:
            first, rest = way
            opener = scene.transitions.choice("opener", scene.draw)
            scene.answer(scene.ask(scene.voice.said(first)), scene.said(opener)[:1])
            last = scene.ask(scene.voice.said(rest), "barge")
            scene.answer(last, scene.said(turn.agent), "side")
            scene.synthetic = True
        else:
            scene.plain(turn)
        scene.quiet()


def _way(scene: Scene, text: str) -> tuple[str, str] | None:
    """Return what is said of a query at first, and what then; None if it can't be divided."""
    words = text.split()
    joins = [at for at in range(4, len(words) - 1) if words[at].lower() in JOINS]
    word = words[-1].strip(".?!,")
    wrong = _other_word(scene, word) if len(words) >= 4 else None
    if joins and (wrong is None or scene.draw.random() < 0.5):
        at = joins[0]
        end = "?" if words[-1].endswith("?") else "."
        return " ".join(words[:at]).rstrip(",") + end, " ".join(words[at:])
    if wrong is None:
        return None
    said = scene.transitions.choice("correction", scene.draw)
    right = said.replace("{}", word) if "{}" in said else f"{said} {word}."
    return " ".join((*words[:-1], words[-1].replace(word, wrong))), right


def _other_word(scene: Scene, word: str) -> str | None:
    """Return another query's last word of the same make, or another number."""
    if word.isdecimal():
        return str(int(word[:6]) + scene.draw.choice((1, 2, 5, 10)))
    if len(word) < LETTERS or not word.isalpha() or word.lower() in NOT_THINGS:
        return None
    found = []
    for chat in scene.others:
        for turn in chat.turns:
            other = turn.user.split()[-1].strip(".?!,")
            alike = other.isalpha() and len(other) >= LETTERS and other.istitle() == word.istitle()
            if alike and other.lower() != word.lower() and other.lower() not in NOT_THINGS:
                found.append(other)
    return scene.draw.choice(found) if found else None
