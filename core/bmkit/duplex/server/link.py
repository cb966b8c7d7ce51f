"""One client's connection: frames in, events out."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from bmkit.duplex.server import protocol
from bmkit.duplex.server.house import House
from bmkit.duplex.server.limits import FRAME_BYTES, Rate
from bmkit.duplex.server.live import Live
from bmkit.duplex.server.protocol import Refused

GRACE_S = 1.0
"""Seconds that a client for whom there is no place has to say that it comes back."""
PATIENCE_S = 15.0
"""Seconds within which a client has to take an event."""
TOO_MUCH, TOO_SLOW, TAKEN_OVER, BUSY = 1008, 1013, 4001, 1013


class Link:
    """A WebSocket and the session that it is about."""

    def __init__(self, socket: WebSocket, house: House) -> None:
        self.socket, self.house = socket, house
        self.live: Live | None = None
        self.reader = 0
        self.fresh = False
        """Whether the session was begun for this client, and nothing was said in it."""
        self.rate = Rate()
        self._sender: asyncio.Task[None] | None = None
        self._told: asyncio.Task[bool] | None = None
        self._lock = asyncio.Lock()
        self._entering: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve the client until it goes."""
        self._begin()
        try:
            while (frame := await self._frame()) is not None:
                await self._take(frame)
        finally:
            if self._entering is not None:
                self._entering.cancel()
            self._leave()
            if self._sender is not None:
                self._sender.cancel()

    def _begin(self) -> None:
        self._entering = asyncio.get_running_loop().create_task(self._enter())

    async def _enter(self) -> None:
        def tell(position: int) -> None:
            said = self._send({"type": "session.queued", "position": position})
            self._told = asyncio.get_running_loop().create_task(said)

        try:
            live = await self.house.enter(tell)
        except Refused as exc:
            await self._send(protocol.error(exc))
            await asyncio.sleep(GRACE_S)  # one who comes back needs no place, and says so now
            await self._close(BUSY, exc.code)
            return
        self.fresh = True
        self._attach(live)
        live.say(
            "session.created",
            session_id=live.id,
            resume_token=live.token,
            capabilities=self._capabilities(live),
        )

    def _capabilities(self, live: Live) -> dict[str, Any]:
        settings = live.session.settings
        return {
            "version": protocol.VERSION,
            "slice_ms": live.period_ms,
            "agent_tokens": settings.agent_tokens,
            "max_kv": settings.high,
            "interrupt": live.interrupt,
            "frame_bytes": FRAME_BYTES,
        }

    def _attach(self, live: Live) -> None:
        self.live = live
        self.reader = live.out.attach()
        live.attached.set()
        self._sender = asyncio.get_running_loop().create_task(self._sends(live, self.reader))
        self.house.sends(self._sender)

    def _leave(self) -> None:
        """Let the session stand still until its client comes back."""
        live = self.live
        if live is not None and live.out.reader == self.reader and live.closed is None:
            live.attached.clear()
            live.left = live.now()
            if self.fresh:
                live.close("client")
            self.house.make_room()

    async def _frame(self) -> str | bytes | None:
        """Return the next frame; None once the client has gone, or is sent away."""
        while True:
            try:
                message = await self.socket.receive()
            except (WebSocketDisconnect, RuntimeError):
                return None
            if message["type"] == "websocket.disconnect":
                return None
            frame: str | bytes = message.get("text") or message.get("bytes") or ""
            if not self.rate.admits(time.monotonic()):
                if self.rate.dropped == 1:
                    await self._send(protocol.error(Refused("rate_limited", "too many frames")))
                if self.rate.exhausted:
                    await self._close(TOO_MUCH, "rate_limited")
                    return None
                continue
            return frame

    async def _take(self, frame: str | bytes) -> None:
        """Do what a frame says."""
        event_id = None
        try:
            if len(frame) > FRAME_BYTES:
                raise Refused("frame_too_large", f"a frame has at most {FRAME_BYTES} bytes")
            event = protocol.understand(frame)
            event_id = event.event_id
            if isinstance(event, protocol.Resume) and (self.live is None or self.fresh):
                await self._resume(event)
                return
            if isinstance(event, protocol.Heartbeat) and self.live is not None:
                self.live.last_word = self.live.now()
                return
            if self.live is None:
                raise Refused("not_started", "the session hasn't begun: session.created says so")
            self.fresh = False
            await self.live.hear(event)
        except Refused as exc:
            await self._send(protocol.error(exc, event_id))
            if self.live is None and self._entering is None:
                self._begin()  # it gets a new session in the place of that it came back to

    async def _resume(self, event: protocol.Resume) -> None:
        entering, self._entering = self._entering, None
        if entering is not None:
            entering.cancel()
            await asyncio.wait([entering])  # a place that it was given is free then
        fresh, self.live = self.live, None
        if self._sender is not None:
            self._sender.cancel()
        try:
            live, complete = await self.house.resume(
                event.session_id, event.resume_token, event.after, instead=fresh
            )
        except Refused:
            if fresh is not None:
                self._attach(fresh)
            raise
        self.fresh = False
        self._attach(live)
        live.say(
            "session.resumed",
            session_id=live.id,
            complete=complete,
            slices=live.session.slices,
            **({} if live.answer is None else {"response_id": live.answer.id}),
            **({} if live.answer is None else {"chars": live.answer.chars}),
            capabilities=self._capabilities(live),
        )

    async def _sends(self, live: Live, reader: int) -> None:
        """Send what the session says, until it ends or another client takes it over."""
        while (message := await live.out.next(reader)) is not None:
            if self.live is not live:
                return  # the client has gone back to another one
            if not await self._send(message):
                self._leave()
                await self._close(TOO_SLOW, "too_slow")
                return
            if message["type"] == "session.closed":
                await self._close(1000, str(message["reason"]))
                return
        await self._close(TAKEN_OVER, "taken_over")

    async def _send(self, message: dict[str, Any]) -> bool:
        """Send an event; tell whether the client took it in time, or has gone."""
        text = json.dumps(message)  # in ASCII: what can't be encoded may have been asked for
        try:
            async with self._lock, asyncio.timeout(PATIENCE_S):
                await self.socket.send_text(text)
        except TimeoutError:
            return False
        except (WebSocketDisconnect, RuntimeError):
            return True  # it has gone, which the reading side finds
        return True

    async def _close(self, code: int, reason: str) -> None:
        if self.socket.application_state is WebSocketState.CONNECTED:
            with suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
                async with asyncio.timeout(5):
                    await self.socket.close(code, reason)
