"""A running session: slices in, slices out, with a cache that is never encoded anew.

Beyond the Turn-Based Game: Enabling Real-Time Conversations with Duplex Models, arXiv 2406.15718.
The cache holds a prefix of the token log (see `memory`), and reads the rest with the next slice. So
what ends a slice costs no forward of its own, and taking something back is a shorter prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from threading import Event
from typing import Any

from torch import Tensor

from bmkit.data.slices import tokens
from bmkit.data.slices.layout import Layout
from bmkit.data.slices.slicer import Words, joined, pieces
from bmkit.duplex.agent import AgentSlice
from bmkit.duplex.delivery import delivered
from bmkit.duplex.forgetting import Forgetting, Spares
from bmkit.duplex.memory import Memory
from bmkit.duplex.places import Place
from bmkit.duplex.policy import Verdict
from bmkit.duplex.settings import Settings
from bmkit.duplex.spelling import Spelling
from bmkit.duplex.units import Unit, log_of
from bmkit.duplex.voice import Chooser

COUNTERS = (
    *("slices", "epoch", "answers", "goes_on"),
    *("waiting", "asked", "rest", "ignored", "evicted"),
)
"""What a session knows beside its units and what it forgets."""


class DuplexSession(Memory):
    """One conversation at one place of a model.

    Calls may come from several threads; they wait for each other, but for `abort`.
    """

    def __init__(
        self,
        place: Place,
        tokenizer: Any,
        layout: Layout,
        settings: Settings | None = None,
        spares: Spares | None = None,
    ) -> None:
        super().__init__(place, layout, settings or Settings(), spares)
        self.tokenizer = tokenizer
        self.chooser = Chooser(layout, self.settings.sampling, tokenizer.all_special_ids)
        self.slices = self.epoch = self.answers = 0
        self.goes_on = False
        """Whether the agent's last answer wasn't interrupted: what it says next is of it."""
        self.waiting: int | None = None
        """Silent slices since the user's last words, if those have no answer yet."""
        self.rest = 0
        """Slices of cooldown that are left; below 0 those up to the user's next words."""
        self.asked: float | None = None
        """How likely the model found silence behind those words."""
        self.ignored = 0
        """Revisions that came too late."""
        self._stop = Event()
        self._busy = False
        self._spelling = Spelling(tokenizer)

    # A slice.

    def step(
        self,
        text: str | None = None,
        *,
        parts: Sequence[Words] = (),
        write: Callable[[str], None] | None = None,
    ) -> AgentSlice:
        """Take what the user says in a slice, if anything; return what the agent does.

        With `parts`, the words may be revised later. `write` gets the agent's text as it is made:
        whole characters only.
        """
        with self._lock:
            units, counters = list(self.units), self.counters()
            self._stop.clear()
            self._busy = True
            try:
                return self._step(tuple(parts) or _one(text, self.slices), write)
            except BaseException:  # it is as if the slice hadn't begun
                self.restore(units, counters)
                raise
            finally:
                self._busy = False

    def _step(self, parts: tuple[Words, ...], write: Callable[[str], None] | None) -> AgentSlice:
        number, forwards, evicted = self.slices, self.forwards, self.evicted
        heard = joined(parts)
        user = tokens.encode(self.tokenizer, heard, self.layout) if heard else ()
        cut = max(len(user) - self._room_for_user(), 0)
        unit = Unit(number, user[cut:] or None, None, parts=parts)
        self.slices += 1
        start = self._begin(unit)
        logits = self.logits()
        p_idle, likeliest = self.chooser.silence(logits)
        verdict = self._verdict(unit, p_idle, likeliest=likeliest)
        rewound = 0
        text = ""
        if verdict.speaks:
            unit, text = self._speak(unit, logits, write)
        else:
            unit = replace(unit, state=self.chooser.state(logits, speaks=False))
        self._finish(unit, start)
        if verdict.reason != "cooldown":
            self._note_waiting(unit, p_idle)
        if self._is_due(self.waiting) and self.settings.policy.on_max_wait == "rewind":
            found = self._answer_late(number, write)
            if found is not None:
                unit, text, p_idle, rewound = found
                verdict = Verdict(True, "max_wait")
        self._forget_ahead()
        interrupted = self._stop.is_set()
        if interrupted:
            self._interrupted()
        return AgentSlice(
            number,
            self.epoch,
            "speak" if unit.agent else "listen",
            "abort" if interrupted and not unit.agent else verdict.reason,
            p_idle,
            text,
            unit.agent or (),
            unit.answer,
            len(self.place.ids),
            self.forwards - forwards,
            heard,
            rewound,
            self.evicted - evicted,
            cut,
            interrupted,
        )

    def _is_due(self, waited: int | None) -> bool:
        return waited is not None and self.settings.policy.is_due(waited)

    def _verdict(self, unit: Unit, p_idle: float, *, likeliest: bool) -> Verdict:
        """Decide whether the agent speaks."""
        policy = self.settings.policy
        if self.rest < 0:
            if unit.user is None:
                return Verdict(False, "cooldown")
            self.rest = 0
        draw = self.chooser.draw(unit.number) if self.settings.draws else None
        found = policy.decide(p_idle, likeliest=likeliest, rest=self.rest, draw=draw)
        self.rest = max(self.rest - 1, 0)
        if self._stop.is_set():
            return Verdict(False, "abort")
        due = unit.user is None and self.waiting is not None and self._is_due(self.waiting + 1)
        due = due and not found.speaks and policy.on_max_wait == "speak"
        if due and (self.asked is None or policy.forces(self.asked)):
            return Verdict(True, "max_wait")
        return found

    def _speak(
        self, unit: Unit, logits: Tensor, write: Callable[[str], None] | None
    ) -> tuple[Unit, str]:
        """Let the agent speak behind the log, up to its tokens of a slice, its end or an abort."""
        start = len(self.log)
        state = self.chooser.state(logits, speaks=True)
        anew = state is not None and state == dict(self.layout.states)["answer"]
        if state is not None:
            self.log.append(state)
            logits = self.logits()
        elif unit.user is not None and self.mid_answer:
            anew = self._begins_anew(self.chooser.token(logits, [], number=unit.number))
        if anew or not self.mid_answer:
            self.answers += 1
            self._spelling = Spelling(self.tokenizer)
            self.goes_on = True
        before = self._spelling.length
        said: list[int] = []
        text = ""
        self.guesses.drop()
        while not self._stop.is_set():
            token = self.chooser.token(logits, said, number=unit.number)
            if token == self.layout.end:
                break
            said.append(token)
            self.log.append(token)
            new = self._spelling.add(token)
            text += new
            if new and write is not None:
                write(new)
            left = self.settings.agent_tokens - len(said)
            if not left:
                break
            logits = self._next(left - 1)
        self.place.cut(len(self.log))
        if said:
            spoken = replace(unit, agent=tuple(said), state=state)
            return replace(spoken, answer=self.answers, before=before), text
        self._cut(start)
        return unit.silenced(self.layout), text

    def _begins_anew(self, token: int) -> bool:
        """Tell whether what is said over the user's words isn't the sentence of the slice before.

        A capital right behind a letter, without a space, is no word that goes on.
        """
        if token == self.layout.end:
            return False
        said = list(self.units[-1].agent or ())
        before, whole = (
            str(self.tokenizer.decode(ids, skip_special_tokens=True))
            for ids in (said, [*said, token])
        )
        return before[-1:].isalnum() and whole[len(before) :][:1].isupper()

    def _finish(self, unit: Unit, start: int) -> None:
        """Add a unit, of which the log has the beginning from `start` on."""
        self.units.append(unit)
        self.log[start:] = unit.ids(self.layout)
        self.guesses.note(unit.user)
        self.guesses.note(unit.agent)

    def _note_waiting(self, unit: Unit, p_idle: float) -> None:
        if unit.agent is not None:
            self.waiting = None
        elif unit.user is not None:
            self.waiting, self.asked = 0, p_idle
        elif self.waiting is not None:
            self.waiting += 1

    def _answer_late(
        self, number: int, write: Callable[[str], None] | None
    ) -> tuple[Unit, str, float, int] | None:
        """Go back to where the user's words ended, and speak there; None if silence was right."""
        at = next((i for i in reversed(range(len(self.units))) if self.units[i].user), None)
        if at is None:
            return None
        units, asked = list(self.units), self.units[at]
        self.units = units[:at]
        start = len(log_of(self.layout, self.units))
        self._cut(start + len(self.layout.user_side(asked.user)))
        logits = self.logits()
        p_idle, _ = self.chooser.silence(logits)
        spoken, text = asked, ""
        if self.settings.policy.forces(p_idle) and not self._stop.is_set():
            spoken, text = self._speak(replace(asked, number=number), logits, write)
        if spoken.agent is None:
            self._rewrite(units)
            return None
        self._finish(replace(spoken, number=asked.number), start)
        self.waiting = None
        self.epoch += 1
        return self.units[-1], text, p_idle, number - asked.number

    # What is taken back.

    def abort(self) -> bool:
        """Stop the slice that is being made, before its next token; tell whether there is one.

        Comes from any thread. What was said stays in the log: see `truncate`.
        """
        if self._busy:
            self._stop.set()
        return self._busy

    @property
    def mid_answer(self) -> bool:
        """Tell whether what the agent says next is of the answer before."""
        return self.goes_on and bool(self.units) and self.units[-1].answer is not None

    @property
    def spoken(self) -> int:
        """Return how many characters the latest answer has."""
        return self._spelling.length

    def hush(self) -> None:
        """Stay silent until the user's next words, whatever the model finds."""
        with self._lock:
            self._interrupted()
            self.rest = -1
            self.waiting = None

    def decide_by(self, threshold: float) -> None:
        """Speak from now on if silence is less likely than `threshold`."""
        with self._lock:
            policy = replace(self.settings.policy, threshold=threshold)
            self.settings = replace(self.settings, policy=policy)

    def _interrupted(self) -> None:
        self.epoch += 1
        if self.rest >= 0:
            self.rest = self.settings.policy.cooldown
        self.goes_on = False

    def truncate(self, answer: int, characters: int) -> int:
        """Forget what of an answer wasn't delivered: all behind its first `characters`.

        A token stays if all of its characters were. Returns how many tokens went.
        """
        with self._lock:
            units, gone = delivered(self.tokenizer, self.layout, self.units, answer, characters)
            if not gone:
                return 0
            self._rewrite(units)
            self._interrupted()
            return gone

    def revise(self, key: int, text: str) -> bool:
        """Let the words of `key` be others; False if they are too old, or unknown.

        They take the places of those they replace, slice by slice; what the agent has said stays.
        """
        with self._lock:
            places = [i for i, u in enumerate(self.units) if any(p.key == key for p in u.parts)]
            oldest = self.slices - self.settings.revisable
            if not places or self.units[places[0]].number < oldest:
                self.ignored += 1
                return False
            units, words = list(self.units), pieces(text)
            for place in places:
                unit = units[place]
                own = next(p for p in unit.parts if p.key == key)
                last = place == places[-1]
                count = len(words) if last else len(pieces(own.text))
                new = Words(key, "".join(words[:count]).strip())
                words = words[count:]
                parts = tuple(new if p is own else p for p in unit.parts)
                heard = joined(parts)
                user = tokens.encode(self.tokenizer, heard, self.layout) if heard else ()
                units[place] = replace(unit, parts=parts, user=user or None)
            self._rewrite(units)
            self.asked = None
            self.epoch += 1
            return True

    def fork(self, place: Place) -> DuplexSession:
        """Return a session that goes on from here at another place, on its own."""
        with self._lock:
            found = DuplexSession(place, self.tokenizer, self.layout, self.settings)
            found.restore(self.units, self.counters())
            return found

    def counters(self) -> dict[str, float | None]:
        """Return what is to be known beside the units, to go on from them."""
        found = {name: getattr(self, name) for name in COUNTERS}
        return found | self.forgetting.counters()

    def restore(self, units: Sequence[Unit], counters: Mapping[str, float | None]) -> None:
        """Go on from units and counters, as they were here before or in another session.

        What they say, and the cache doesn't hold, is read with the next slice.
        """
        with self._lock:
            self._rewrite(units)
            for name in COUNTERS:
                setattr(self, name, counters[name])
            for name, nothing in Forgetting().counters().items():
                setattr(self.forgetting, name, counters.get(name, nothing))
            mine = [unit for unit in self.units if unit.answer == self.answers]
            self._spelling = Spelling(self.tokenizer, mine[0].before if mine else 0)
            for token in (token for unit in mine for token in unit.agent or ()):
                self._spelling.add(token)


def _one(text: str | None, key: int) -> tuple[Words, ...]:
    return (Words(key, text.strip()),) if text and text.strip() else ()
