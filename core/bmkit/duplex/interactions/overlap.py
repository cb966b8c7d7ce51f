"""Interactions in which there are words that the agent isn't to answer."""

from __future__ import annotations

from bmkit.duplex.chats import Turn
from bmkit.duplex.scene import Scene

AGAIN = 0.4
"""How often a further turn of a dialogue has words of others as well."""


def backchannel(scene: Scene) -> None:
    """Let the user show in mid-answer that they listen: the agent goes on.

    At times it is said when the answer is over: the agent stays silent.
    """
    turns = scene.chat.turns
    at = scene.place()
    scene.plainly(turns[:at])
    pieces = scene.said(turns[at].agent)
    scene.lay(scene.ask(scene.query(turns[at])), pieces[0], "end")
    spoken = range(1, len(pieces))
    chosen = set(scene.draw.sample(spoken, min(len(spoken), scene.draw.choice((1, 1, 2)))))
    for number in spoken:
        if number in chosen:
            scene.lay(scene.words("backchannel"), pieces[number], "backchannel")
        else:
            scene.go_on(pieces[number : number + 1])
    if scene.draw.random() < 0.2 and max(chosen) < len(pieces) - 1:
        scene.lay(scene.words("backchannel"), None, "quiet")
    scene.quiet()
    scene.plainly(turns[at + 1 :])


def noise(scene: Scene) -> None:
    """Let others be heard: between turns, within a query, or while the agent speaks, which goes on.

    In one turn at least, and at times in others.
    """
    turns = scene.chat.turns
    at = scene.draw.randrange(len(turns))
    for number, turn in enumerate(turns):
        if number == at or scene.draw.random() < AGAIN:
            _beside_noise(scene, turn)
        else:
            scene.plain(turn)
        scene.quiet()


def _beside_noise(scene: Scene, turn: Turn) -> None:
    """Lay a turn with words of others before it, within its query, or during its answer."""
    noise = scene.heard(scene.words("noise"))
    query, pieces = scene.heard(scene.query(turn)), scene.said(turn.agent)
    (where,) = scene.draw.choices(("before", "within", "during"), (4, 2, 4))
    if where == "within" and len(query) > 1:
        cut = scene.draw.randrange(1, len(query))
        scene.listen(query[:cut])
        scene.listen(noise, "noise")
        scene.listen(query[cut:-1])
        scene.answer(query[-1], pieces)
    elif where == "during" and len(pieces) > len(noise):
        scene.listen(query[:-1])
        start = scene.draw.randint(1, len(pieces) - len(noise))
        scene.answer(query[-1], pieces[:start])
        for part, piece in zip(noise, pieces[start:], strict=False):
            scene.lay(part, piece, "backchannel")
        scene.go_on(pieces[start + len(noise) :])
    else:
        scene.listen(noise, "noise")
        scene.quiet()
        scene.plain(turn)
