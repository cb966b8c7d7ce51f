"""Interactions in which there are words that the agent isn't to answer."""

from __future__ import annotations

from bmkit.duplex.scene import Scene


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
    """Let others be heard: while nobody speaks, or while the agent does, which then goes on."""
    turns = scene.chat.turns
    at = scene.draw.randrange(len(turns))
    for number, turn in enumerate(turns):
        parts = scene.heard(scene.words("noise")) if number == at else []
        pieces = scene.said(turn.agent)
        meanwhile = len(pieces) > len(parts) and scene.draw.random() < 0.4
        if parts and not meanwhile:
            scene.listen(parts, "noise")
            scene.quiet()
        if not parts or not meanwhile:
            scene.plain(turn)
        else:
            scene.lay(scene.ask(scene.query(turn)), pieces[0], "end")
            start = scene.draw.randint(1, len(pieces) - len(parts))
            scene.go_on(pieces[1:start])
            for part, piece in zip(parts, pieces[start:], strict=False):
                scene.lay(part, piece, "backchannel")
            scene.go_on(pieces[start + len(parts) :])
        scene.quiet()
