"""What clients may say, how much, who may come in, and what is kept for those who come back."""

from __future__ import annotations

import asyncio
import json

import pytest

from bmkit.duplex.server import protocol
from bmkit.duplex.server.limits import Rate, host_is_expected, is_local, origin_is_known
from bmkit.duplex.server.outbox import KEPT, Outbox
from bmkit.duplex.server.playback import Answer, Playback
from bmkit.duplex.server.protocol import Append, Refused, understand
from bmkit.duplex.server.seats import Seats


def test_words_are_understood() -> None:
    found = understand(json.dumps({"type": "input_text.append", "text": "hi 👋", "t": 5}))
    assert found == Append(type="input_text.append", text="hi 👋", t=5)


@pytest.mark.parametrize(
    ("frame", "code", "message"),
    [
        ("{", "invalid_json", "one JSON object"),
        ("[1]", "invalid_json", "one JSON object"),
        ("[" * 100_000, "invalid_json", "one JSON object"),
        ('{"type": "input_text.apend"}', "unknown_event", "did you mean `input_text.append`"),
        ('{"type": 3}', "unknown_event", "is not an event"),
        (json.dumps({"type": "x" * 60_000}), "unknown_event", f"`{'x' * 200}` is not"),
        (
            json.dumps({"type": "playback.ack", "response_id": "r" * 201, "chars": 0}),
            "invalid_event",
            "at most 200 characters",
        ),
        ('{"type": "input_text.append"}', "invalid_event", "`text`"),
        ('{"type": "input_text.append", "text": 5}', "invalid_event", "`text`"),
        ('{"type": "input_text.append", "text": "a", "t": -1}', "invalid_event", "`t`"),
        ('{"type": "input_text.append", "text": "a", "tt": 1}', "invalid_event", "`tt`"),
        ('{"type": "input_text.append", "text": "\\ud800"}', "invalid_event", "unicode"),
        (json.dumps({"type": "input_text.append", "text": "a" * 5000}), "invalid_event", "`text`"),
        ('{"type": "session.update", "session": {"threshold": 2}}', "invalid_event", "threshold"),
    ],
)
def test_what_is_not_understood_is_refused(frame: str, code: str, message: str) -> None:
    with pytest.raises(Refused) as caught:
        understand(frame)
    assert caught.value.code == code and message in caught.value.message


def test_a_bucket_lets_so_many_through_and_fills_again() -> None:
    rate = Rate(a_second=10, burst=5, patience=5)
    assert [rate.admits(0.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert rate.admits(0.1) and not rate.admits(0.1)
    assert not rate.admits(-5.0) and not rate.exhausted
    assert not rate.admits(-5.0) and rate.exhausted
    assert rate.admits(0.3) and rate.dropped == 0


def test_only_pages_from_here_may_connect() -> None:
    assert origin_is_known(None, "127.0.0.1:8765")
    assert origin_is_known("http://127.0.0.1:8765", "127.0.0.1:8765")
    assert not origin_is_known("http://evil.example", "127.0.0.1:8765")
    assert not origin_is_known("null", "127.0.0.1:8765")
    assert origin_is_known("https://app.example", "127.0.0.1:8765", ["https://app.example"])


def test_a_name_that_was_made_to_lead_here_is_kept_out() -> None:
    assert host_is_expected("localhost:8765", "127.0.0.1")
    assert host_is_expected("[::1]:8765", "::1")
    assert not host_is_expected("evil.example:8765", "127.0.0.1")
    assert not host_is_expected(None, "127.0.0.1")
    assert host_is_expected("box.example:8765", "0.0.0.0")
    assert is_local("127.0.0.2") and not is_local("192.168.0.1")


def test_events_come_in_order_and_again_after_one() -> None:
    async def scene() -> None:
        out = Outbox()
        for name in "abc":
            out.say({"type": name})
        reader = out.attach()
        assert [(await out.next(reader) or {})["seq"] for _ in range(3)] == [1, 2, 3]
        assert out.rewind(1)
        assert (await out.next(reader)) == {"type": "b", "seq": 2}
        assert (await out.next(reader)) == {"type": "c", "seq": 3}
        waiting = asyncio.ensure_future(out.next(reader))
        await asyncio.sleep(0)
        other = out.attach()
        out.say({"type": "d"})
        assert (await out.next(other)) == {"type": "d", "seq": 4}
        assert await waiting is None

    asyncio.run(scene())


def test_only_so_many_events_are_kept() -> None:
    async def scene() -> None:
        out = Outbox()
        for _ in range(KEPT + 10):
            out.say({"type": "x"})
        assert not out.rewind(0)
        reader = out.attach()
        assert (await out.next(reader) or {})["seq"] == 11
        assert out.rewind(10) and not out.rewind(9)
        assert not out.rewind(10**9)  # numbers of another server: all that is kept comes again
        assert (await out.next(reader) or {})["seq"] == 11

    asyncio.run(scene())


def test_who_waits_longest_comes_in_first() -> None:
    async def scene() -> None:
        seats, told = Seats(1, 2), []
        first = await seats.take(told.append)
        waiting = [asyncio.ensure_future(seats.take(told.append)) for _ in range(2)]
        await asyncio.sleep(0)
        assert told == [1, 2] and seats.full()
        with pytest.raises(RuntimeError):
            await seats.take(told.append)
        seats.leave(first)
        assert await waiting[0] == first and told == [1, 2, 1]
        waiting[1].cancel()
        await asyncio.gather(waiting[1], return_exceptions=True)
        seats.leave(first)
        assert seats.free == [first]

    asyncio.run(scene())


def test_a_seat_given_to_one_who_has_just_gone_is_free_again() -> None:
    async def scene() -> None:
        seats = Seats(1, 1)
        place = await seats.take(lambda _: None)
        waiting = asyncio.ensure_future(seats.take(lambda _: None))
        await asyncio.sleep(0)
        seats.leave(place)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert seats.free == [place]

    asyncio.run(scene())


def cut(playback: Playback) -> list[tuple[int, int]]:
    return [(answer.number, answer.heard) for answer in playback.cut()]


def test_who_never_says_what_was_heard_has_heard_all() -> None:
    playback = Playback()
    playback.begin(Answer(1, 9))
    assert cut(playback) == []


def test_answers_are_heard_one_behind_the_other() -> None:
    playback = Playback()
    for number in (1, 2, 3):
        playback.begin(Answer(number, 9))
    playback.hear(2, 4)
    playback.hear(2, 3)  # it never gets less
    assert cut(playback) == [(2, 4), (3, 0)]  # the first was over when the second was heard
    assert cut(playback) == []


def test_an_answer_that_was_heard_so_far_may_go_on_and_be_cut_later() -> None:
    playback, answer = Playback(), Answer(1, 5)
    playback.begin(answer)
    playback.hear(1, 5)
    assert cut(playback) == []
    answer.chars = 8
    assert cut(playback) == [(1, 5)]
    playback.begin(answer)
    playback.forget(1)
    assert cut(playback) == []


def test_every_event_has_a_name_of_its_own() -> None:
    assert len(set(protocol.NAMES)) == len(protocol.NAMES) == 9
