"""Interactions in which the user cuts the agent's words off."""

from __future__ import annotations

import re

from bmkit.data.slices.dialogue import Tag
from bmkit.duplex.chats import Turn
from bmkit.duplex.english import TELLS
from bmkit.duplex.scene import Scene, UnfitError

_SENTENCE = re.compile(r"[.!?:]\s+|\n+")
AT_ONCE = 4
"""Words of an interruption that are said in one slice: its first one tells what it is."""


def termination(scene: Scene) -> None:
    """Let the user ask for silence in mid-answer, and go on with the chat after a while.

    At times it is asked for while the agent is silent.
    """
    turns = scene.chat.turns
    if scene.draw.random() < 0.12:
        at = scene.draw.randrange(len(turns))
        scene.plainly(turns[:at])
        hush(scene, "mid")
        scene.plainly(turns[at:])
        return
    at = scene.place()
    scene.plainly(turns[:at])
    scene.begun(turns[at])
    hush(scene, "barge")
    scene.plainly(turns[at + 1 :])


def hush(scene: Scene, before: Tag) -> None:
    """Lay a request for silence, and silence behind it."""
    words = scene.words("stop").split()
    if len(words) <= AT_ONCE:
        parts = [" ".join(words)]
    else:
        first = scene.draw.randint(3, AT_ONCE)
        parts = [" ".join(words[:first]), *scene.heard(" ".join(words[first:]))]
    scene.listen(parts[:-1], before)
    scene.lay(parts[-1], None, "stop")
    scene.quiet(1)


def regeneration(scene: Scene) -> None:
    """Let the user say in mid-answer that something else was meant, and ask anew.

    What is asked then is the chat's next query, else the same one again, with its own answer.
    """
    at = scene.place()
    turns = scene.chat.turns
    scene.plainly(turns[:at])
    scene.begun(turns[at])
    again = at + 1 if at + 1 < len(turns) and scene.draw.random() < 0.6 else at
    scene.synthetic = True
    anew(scene, "rephrase", turns[again])
    scene.quiet()
    scene.plainly(turns[again + 1 :])


def reset(scene: Scene) -> None:
    """Let the user leave one or two topics in mid-answer, and begin another."""
    leaves = 1 if scene.draw.random() < 0.6 else 2
    chats = [scene.chat]
    for number in range(leaves):
        turns = chats[-1].turns
        fit = [at for at, turn in enumerate(turns) if len(scene.said(turn.agent)) > 1]
        if not fit:
            if number == 0:
                raise UnfitError
            break
        at = scene.draw.choice(fit)
        begun = 0 if number == 0 else 1  # its first query is behind the transition already
        if number and at == 0:
            break
        chats.append(scene.other())
        scene.plainly(turns[begun:at])
        scene.begun(turns[at])
        anew(scene, "reset", chats[-1].turns[0])
        scene.quiet()
    scene.plainly(chats[-1].turns[1:])


def anew(scene: Scene, kind: str, turn: Turn) -> None:
    """Lay an interrupting query with a transition in front, seldom without, and its answer."""
    said = "" if scene.draw.random() < 0.1 else scene.words(kind)
    query = scene.query(turn)
    last = scene.ask(scene.voice.joined(said, query), "barge")
    scene.answer(last, scene.said(turn.agent), "end")


def back_on_topic(scene: Scene) -> None:
    """Let the user ask something in mid-answer, which is answered; then the answer goes on.

    The sentence that was cut begins anew. What is asked is one of a list, or a short turn of
    another chat.
    """
    at = scene.place()
    turns = scene.chat.turns
    scene.plainly(turns[:at])
    pieces, rest = scene.begun(turns[at])
    question, answer = _side(scene)
    told = "".join(pieces)
    start = max((found.end() for found in _SENTENCE.finditer(told)), default=0)
    left = (told[start:] + "".join(rest)).strip()
    resume = scene.transitions.choice("resume", scene.draw)
    if not resume.endswith((".", "!")):
        left = _small(left)
    last = scene.ask(question, "barge")
    scene.answer(last, scene.said(f"{answer} {resume} {left}"), "side")
    scene.synthetic = True
    scene.quiet()
    scene.plainly(turns[at + 1 :])


def _side(scene: Scene) -> tuple[str, str]:
    if scene.draw.random() < 0.4:
        chat = scene.other()
        if len(scene.said(chat.turns[0].agent)) < 4:
            return scene.query(chat.turns[0]), chat.turns[0].agent
        scene.used.remove(chat)
    question, _, answer = scene.transitions.choice("side", scene.draw).partition("=>")
    return scene.voice.said(question.strip()), answer.strip()


def _small(text: str) -> str:
    word = text.split(maxsplit=1)[0]
    plain = word.isalpha() and word[1:].islower() and word in TELLS
    return text[0].lower() + text[1:] if plain else text
