"""`bmkit duplex serve`: clients that talk, interrupt, come back, misbehave and vanish."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

Server = Callable[..., AbstractContextManager[tuple[dict[str, str], Any]]]
PATIENCE = 60.0


def play(scene: Awaitable[None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(scene, PATIENCE)

    asyncio.run(limited())


async def until(client: ClientConnection, *kinds: str) -> dict[str, Any]:
    """Return the next event of one of these types."""
    while True:
        found: dict[str, Any] = json.loads(await client.recv())
        if found["type"] in kinds:
            return found


async def say(client: ClientConnection, kind: str, **values: Any) -> None:
    await client.send(json.dumps({"type": kind, **values}))


def test_a_client_is_listened_to_and_answered(
    server: Server, listener: Path, tmp_path: Path
) -> None:
    async def scene(url: str) -> None:
        async with connect(url) as client:
            created = await until(client, "session.created")
            assert created["capabilities"]["slice_ms"] == 100
            first = await until(client, "response.listen", "response.decided")
            assert 0 <= first["p_idle"] <= 1
            await say(client, "input_text.append", text="tell me about <idle> tea 🙂", t=5)
            await until(client, "response.speak")
            text = ""
            while True:
                event = await until(client, "response.output_text.delta", "slice.stats")
                if event["type"] == "slice.stats":
                    break
                assert event["offset"] == len(text)
                text += event["delta"]
            await say(client, "session.close")
            assert (await until(client, "session.closed"))["reason"] == "client"
            with pytest.raises(ConnectionClosed):
                await client.recv()

    with server(listener, tmp_path) as (where, _):
        play(scene(where["websocket"]))


def test_events_are_numbered_without_a_gap(server: Server, listener: Path, tmp_path: Path) -> None:
    async def scene(url: str) -> None:
        async with connect(url) as client:
            numbers = [json.loads(await client.recv())["seq"] for _ in range(20)]
            assert numbers == list(range(1, 21))

    with server(listener, tmp_path) as (where, _):
        play(scene(where["websocket"]))


def test_speech_is_stopped_when_it_is_told_to(
    server: Server, listener: Path, tmp_path: Path
) -> None:
    async def scene(url: str) -> None:
        async with connect(url) as client:
            await until(client, "session.created")
            await say(client, "response.cancel")
            assert (await until(client, "error"))["code"] == "nothing_to_cancel"
            await say(client, "input_text.append", text="hello there")
            spoken = await until(client, "response.speak")
            await say(client, "response.cancel")
            done = await until(client, "response.done")
            assert done["response_id"] == spoken["response_id"]
            assert done["status"] == "cancelled"
            listens = await until(client, "response.listen")
            assert listens["epoch"] > spoken["epoch"]
            for _ in range(6):  # it has said to be silent: until it says something else
                event = await until(client, "response.speak", "slice.stats")
                assert event["type"] == "slice.stats"
            await say(client, "input_text.append", text="go on please")
            await until(client, "response.speak")

    # A slice of many tokens, so that it is still being made when the word to stop comes.
    with server(listener, tmp_path, "-s", "slice.agent_tokens=400", "-s", "kv.high=3000") as (
        where,
        _,
    ):
        play(scene(where["websocket"]))


def test_two_sessions_share_nothing_and_a_third_waits(
    server: Server, listener: Path, tmp_path: Path
) -> None:
    async def scene(url: str) -> None:
        async with connect(url) as one, connect(url) as two, connect(url) as three:
            a = await until(one, "session.created")
            b = await until(two, "session.created")
            assert a["session_id"] != b["session_id"]
            assert (await until(three, "session.queued"))["position"] == 1
            await say(three, "input_text.append", text="me?")
            assert (await until(three, "error"))["code"] == "not_started"
            async with connect(url) as four:
                assert (await until(four, "error"))["code"] == "busy"
                with pytest.raises(ConnectionClosed):
                    await four.recv()
            heard = "an unmistakable word"
            await say(one, "input_text.append", text=heard)
            kv = [(await until(two, "slice.stats"))["kv"] for _ in range(4)]
            assert len(set(kv[1:])) <= 2  # silence takes no room, whatever the other one hears
            await say(one, "session.close")
            await until(three, "session.created")

    options = ("-s", "serve.max_sessions=2", "-s", "serve.queue=1")
    with server(listener, tmp_path, *options) as (where, _):
        play(scene(where["websocket"]))


def test_a_client_comes_back_and_is_told_what_it_missed(
    server: Server, listener: Path, tmp_path: Path
) -> None:
    async def scene(url: str) -> None:
        async with connect(url) as client:
            mine = await until(client, "session.created")
            await say(client, "input_text.append", text="hello")
            last = await until(client, "slice.stats")
        async with connect(url) as client:
            await say(
                client,
                "session.resume",
                session_id=mine["session_id"],
                resume_token=mine["resume_token"],
                after=last["seq"],
            )
            seen = []
            while True:
                event = json.loads(await client.recv())
                seen.append(event)
                if event["type"] == "session.resumed":
                    break
            assert event["complete"] and event["session_id"] == mine["session_id"]
            mine_again = [e for e in seen if e["seq"] > last["seq"] or e is event]
            numbers = [e["seq"] for e in mine_again]
            assert numbers == list(range(last["seq"] + 1, event["seq"] + 1))
            await until(client, "slice.stats")
            async with connect(url) as thief:
                await say(
                    thief, "session.resume", session_id=mine["session_id"], resume_token="guess"
                )
                assert (await until(thief, "error"))["code"] == "unknown_session"
            async with connect(url) as other:
                await say(
                    other,
                    "session.resume",
                    session_id=mine["session_id"],
                    resume_token=mine["resume_token"],
                )
                await until(other, "session.resumed")
                with pytest.raises(ConnectionClosed) as caught:
                    while True:
                        await client.recv()
                assert caught.value.rcvd is not None and caught.value.rcvd.code == 4001

    with server(listener, tmp_path) as (where, _):
        play(scene(where["websocket"]))


def test_a_session_goes_on_after_its_server_was_killed(
    server: Server, listener: Path, tmp_path: Path
) -> None:
    mine: dict[str, Any] = {}
    kept = tmp_path / "sessions"

    async def begin(url: str) -> None:
        async with connect(url) as client:
            mine.update(await until(client, "session.created"))
            await say(client, "input_text.append", text="remember the word marmalade")
            for _ in range(4):
                mine["slice"] = (await until(client, "slice.stats"))["slice"]

    async def go_on(url: str) -> None:
        async with connect(url) as client:
            await say(
                client,
                "session.resume",
                session_id=mine["session_id"],
                resume_token=mine["resume_token"],
            )
            resumed = await until(client, "session.resumed")
            assert resumed["slices"] > mine["slice"] and not resumed["complete"]
            assert (await until(client, "slice.stats"))["slice"] == resumed["slices"]

    with server(listener, tmp_path, "--sessions", str(kept)) as (where, process):
        play(begin(where["websocket"]))
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)
    words = (kept / mine["session_id"] / "tokens.jsonl").read_text()
    assert "marmalade" in words
    with server(listener, tmp_path, "--sessions", str(kept)) as (where, _):
        play(go_on(where["websocket"]))


async def begun(url: str, *words: str) -> dict[str, Any]:
    """Begin a session, say something, and go; return what it is resumed by."""
    async with connect(url) as client:
        created = await until(client, "session.created")
        for text in words:
            await say(client, "input_text.append", text=text)
        await until(client, "slice.stats")
        return {name: created[name] for name in ("session_id", "resume_token")}


def test_who_can_not_come_back_begins_anew(server: Server, listener: Path, tmp_path: Path) -> None:
    async def scene(url: str) -> None:
        for _ in range(3):
            async with connect(url) as client:
                lost = {"session_id": "0123456789abcdef", "resume_token": "x"}
                await say(client, "session.resume", **lost)
                assert (await until(client, "error"))["code"] == "unknown_session"
                await say(client, "session.resume", **lost)
                assert (await until(client, "error"))["code"] == "unknown_session"
                await say(client, "session.heartbeat")
                await until(client, "slice.stats")
                await say(client, "input_text.append", text="hello there")
                await until(client, "response.speak")
                await say(client, "session.close")

    with server(listener, tmp_path, "--sessions", str(tmp_path / "kept")) as (where, _):
        play(scene(where["websocket"]))


def test_a_kept_session_without_its_client_makes_room_for_others(
    server: Server, listener: Path, tmp_path: Path
) -> None:
    async def scene(url: str) -> None:
        mine = await begun(url, "remember me")
        other = await begun(url, "and me")  # the place is taken by one whose client has gone
        async with connect(url) as client:
            await say(client, "session.resume", **mine)
            assert (await until(client, "session.resumed"))["session_id"] == mine["session_id"]
            await until(client, "slice.stats")
            async with connect(url) as second:
                await until(second, "session.queued")  # who is there stays
                await say(second, "session.resume", **other)
                assert (await until(second, "error"))["code"] == "busy"
                await until(second, "session.queued")
                client.transport.abort()
                await until(second, "session.created")

    options = ("--sessions", str(tmp_path / "kept"), "-s", "serve.max_sessions=1")
    with server(listener, tmp_path, *options) as (where, _):
        play(scene(where["websocket"]))


def test_who_comes_back_at_once_finds_a_place(
    server: Server, listener: Path, tmp_path: Path
) -> None:
    async def scene(url: str) -> None:
        for wait in (0, 0.02, 0.1, 0.3) * 3:
            client = await connect(url)
            created = await until(client, "session.created")
            client.transport.abort()
            await asyncio.sleep(wait)
            async with connect(url) as again:
                named = {name: created[name] for name in ("session_id", "resume_token")}
                await say(again, "session.resume", **named)
                event = await until(again, "session.resumed", "error")
                assert event["type"] == "session.resumed", event
                await say(again, "session.close")
                await until(again, "session.closed")

    options = ("--sessions", str(tmp_path / "kept"), "-s", "serve.max_sessions=1")
    with server(listener, tmp_path, *options) as (where, _):
        play(scene(where["websocket"]))


def test_bad_frames_are_answered_and_change_nothing(
    server: Server, listener: Path, tmp_path: Path
) -> None:
    async def scene(url: str) -> None:
        async with connect(url) as client:
            await until(client, "session.created")
            await client.send("{")
            assert (await until(client, "error"))["code"] == "invalid_json"
            await client.send(b"\xff\xfe")
            assert (await until(client, "error"))["code"] == "invalid_json"
            await say(client, "input_text.apend", text="x", event_id="e7")
            assert "did you mean" in (await until(client, "error"))["message"]
            await say(client, "playback.ack", response_id="resp_9", chars=3, event_id="e8")
            answer = await until(client, "error")
            assert answer["code"] == "unknown_response" and answer["event_id"] == "e8"
            await say(client, "input_text.append", text="a", t=500)
            await say(client, "input_text.append", text="b", t=400)
            assert (await until(client, "error"))["code"] == "clock"
            await until(client, "slice.stats")
        async with connect(url) as client:
            await until(client, "session.created")
            await client.send("x" * 1_000_000)
            with pytest.raises(ConnectionClosed) as caught:
                while True:
                    await client.recv()
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
        async with connect(url) as client:  # a thousand frames at once
            await until(client, "session.created")
            with pytest.raises(ConnectionClosed) as caught:
                for _ in range(1000):
                    await say(client, "session.heartbeat")
                while True:
                    await client.recv()
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1008
        async with connect(url) as client:
            await until(client, "slice.stats")

    with server(listener, tmp_path) as (where, _):
        play(scene(where["websocket"]))


def test_strangers_stay_outside(server: Server, listener: Path, tmp_path: Path) -> None:
    async def scene(url: str) -> None:
        for bad in (url.partition("?")[0], url + "x"):
            with pytest.raises(InvalidStatus):
                await connect(bad)
        with pytest.raises(InvalidStatus):
            await connect(url, origin="http://evil.example")  # type: ignore[arg-type]
        with pytest.raises(InvalidStatus):
            await connect(url, additional_headers={"Host": "evil.example"})
        async with connect(url) as client:
            await until(client, "session.created")

    with server(listener, tmp_path, "-s", "serve.auth=token") as (where, _):
        play(scene(where["websocket"]))
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(where["url"].partition("?")[0] + "health")


def test_a_page_whose_name_was_made_to_lead_here_reads_nothing(
    server: Server, listener: Path, tmp_path: Path
) -> None:
    with server(listener, tmp_path) as (where, _):
        for route in ("", "health"):
            with urllib.request.urlopen(where["url"] + route) as answer:
                assert answer.status == 200
            other = urllib.request.Request(where["url"] + route, headers={"Host": "evil.example"})
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(other)
            assert caught.value.code == 403


def test_a_slow_slice_is_late_and_gets_all_words(
    server: Server, listener: Path, tmp_path: Path
) -> None:
    async def scene(url: str) -> None:
        async with connect(url) as client:
            await until(client, "session.created")
            await say(client, "input_text.append", text="one")
            await until(client, "response.speak")
            for word in ("two", "three", "four"):
                await say(client, "input_text.append", text=word)
            heard = (await until(client, "overlap.decision"))["heard"]
            assert heard == "two three four"

    options = ("-s", "slice.agent_tokens=300", "-s", "policy.interrupt=slice")
    with server(listener, tmp_path, *options) as (where, _):
        play(scene(where["websocket"]))


def test_a_client_that_vanishes_leaves_a_session_that_stands_still(
    server: Server, listener: Path, tmp_path: Path
) -> None:
    async def scene(url: str) -> None:
        client = await connect(url)
        mine = await until(client, "session.created")
        await say(client, "input_text.append", text="hello")
        await until(client, "response.speak")
        client.transport.abort()
        await asyncio.sleep(0.5)
        async with connect(url) as again:
            await say(
                again,
                "session.resume",
                session_id=mine["session_id"],
                resume_token=mine["resume_token"],
                after=10**6,
            )
            first = (await until(again, "session.resumed"))["slices"]
            assert first < 5  # half a second without a client has made no slices
            while (event := json.loads(await again.recv()))["type"] != "slice.stats":
                assert event.get("status") != "interrupted"  # nobody has said anything

    with server(listener, tmp_path, "-s", "slice.agent_tokens=200") as (where, _):
        play(scene(where["websocket"]))


def test_a_port_that_is_taken_is_told_of_before_the_model_is_opened(
    server: Server, bmkit: Callable[..., Any], listener: Path, tmp_path: Path
) -> None:
    with server(listener, tmp_path) as (where, _):
        port = where["url"].rstrip("/").rpartition(":")[2]
        start = time.monotonic()
        refused = bmkit("duplex", "serve", "-m", listener, "--port", port)
        assert refused.returncode == 4 and "is taken" in refused.stderr
        assert time.monotonic() - start < 30


def test_a_folder_that_can_not_be_written_is_told_of_before_the_model_is_opened(
    bmkit: Callable[..., Any], listener: Path, tmp_path: Path
) -> None:
    words = ("duplex", "serve", "-m", listener, "--port", 0, "--sessions")
    refused = bmkit(*words, "/proc/sessions")
    assert refused.returncode == 4 and "cannot write /proc/sessions" in refused.stderr
    (tmp_path / "file").touch()
    refused = bmkit(*words, tmp_path / "file")
    assert refused.returncode == 3 and "is not a folder" in refused.stderr


def test_others_are_let_in_with_a_token_only(bmkit: Callable[..., Any], listener: Path) -> None:
    refused = bmkit("duplex", "serve", "-m", listener, "--host", "0.0.0.0", "--port", 0)
    assert refused.returncode == 2 and "serve.auth=token" in refused.stderr


def test_a_model_that_has_not_learned_to_listen_is_refused(
    bmkit: Callable[..., Any], tiny: Path
) -> None:
    for command in ("serve", "chat"):
        refused = bmkit("duplex", command, "-m", tiny)
        assert refused.returncode == 3 and "bmkit tune duplex" in refused.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_clients_are_told_that_the_server_stops(
    server: Server, listener: Path, tmp_path: Path, number: int
) -> None:
    async def scene(url: str, process: Any) -> None:
        async with connect(url) as silent, connect(url) as speaking:
            await until(silent, "slice.stats")
            await until(speaking, "session.created")
            await say(speaking, "input_text.append", text="hello there")
            await until(speaking, "response.speak")
            process.send_signal(number)
            for client in (silent, speaking):
                assert (await until(client, "session.closed"))["reason"] == "shutdown"
                with pytest.raises(ConnectionClosed) as caught:
                    await client.recv()
                assert caught.value.rcvd is not None and caught.value.rcvd.code == 1000

    with server(listener, tmp_path, "-s", "slice.agent_tokens=400") as (where, process):
        play(scene(where["websocket"], process))
        assert process.wait(20) == 128 + number
    assert "Traceback" not in (tmp_path / "err").read_text()


def test_a_client_that_reads_nothing_does_not_keep_the_server_from_stopping(
    server: Server, listener: Path, tmp_path: Path
) -> None:
    async def scene(url: str, process: Any) -> None:
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        narrow.connect((urlsplit(url).hostname, urlsplit(url).port))
        async with connect(url, sock=narrow, max_queue=1, compression=None) as client:
            await until(client, "session.created")
            client.transport.pause_reading()
            for _ in range(40):  # each is answered, and no answer is read
                await say(client, "x" * 60_000)
            process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            while process.poll() is None:
                await asyncio.sleep(0.1)
            assert time.monotonic() - start < 16
            client.transport.abort()

    with server(listener, tmp_path) as (where, process):
        play(scene(where["websocket"], process))
        assert process.returncode == 128 + signal.SIGTERM


def test_ctrl_c_ends_the_server(server: Server, listener: Path, tmp_path: Path) -> None:
    with server(listener, tmp_path) as (_, process):
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert "Traceback" not in (tmp_path / "err").read_text()
