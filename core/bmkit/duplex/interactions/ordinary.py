"""Interactions in which everybody waits: one topic, or several that take turns."""

from __future__ import annotations

from bmkit.duplex.scene import Scene


def basic(scene: Scene) -> None:
    """Lay each query, and its answer in the slice that ends it."""
    scene.plainly(scene.chat.turns)


def interweave(scene: Scene) -> None:
    """Let two or three chats take turns, each in its own order."""
    chats = [scene.chat, scene.other()]
    if len(scene.others) > 2 and scene.draw.random() < 0.4:
        chats.append(scene.other())
    left = [list(chat.turns) for chat in chats]
    at = 0
    while any(left):
        waiting = [turns for turns in left if turns]
        turns = waiting[at % len(waiting)]
        scene.plainly([turns.pop(0)])
        at += 1 if scene.draw.random() < 0.75 else 0
