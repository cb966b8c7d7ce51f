"""A duplex session on a terminal: two lanes, a time line, and a line to type in."""

from __future__ import annotations

from typing import Any, ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import Input, Sparkline, Static

from bmkit.errors import BmkitError

SHOWN = 300
"""Slices on the screen."""
TIMELINE = 120
"""Slices of the time line."""


class Row(Horizontal):
    """What both sides say in one slice."""

    DEFAULT_CSS = """
    Row { height: auto; }
    Row > Static { width: 1fr; padding: 0 1; }
    Row > .you { text-align: right; color: $accent; }
    Row > .it { color: $success; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.said = ["", ""]
        self.sides = [Static(classes="you", markup=False), Static(classes="it", markup=False)]

    def compose(self) -> ComposeResult:
        """Return both sides."""
        yield from self.sides

    def put(self, side: int, text: str) -> None:
        """Add text to a side."""
        self.said[side] += text
        self.sides[side].update(self.said[side])


class Lanes(App[None]):
    """Shows what a live session says, and says to it what is typed, word by word."""

    TITLE = "bmkit duplex"
    CSS = """
    #lanes { height: 1fr; border-bottom: solid $panel; }
    #silence { height: 3; margin: 0 1; }
    #figures { height: 1; color: $text-muted; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop it", priority=True),
        Binding("ctrl+d", "quit", "Leave", priority=True),
        Binding("ctrl+c", "quit", "Leave", priority=True),
    ]

    def __init__(self, live: Any) -> None:
        super().__init__()
        self.live = live
        self.row: Row | None = None
        self.failed: BmkitError | None = None
        """What has ended the session, if it wasn't the user."""
        self.silence: list[float] = []
        self.told = {
            "response.output_text.delta": self._delta,
            "response.done": self._done,
            "response.listen": self._decided,
            "response.decided": self._decided,
            "slice.stats": self._stats,
            "session.closed": self._over,
            "session.evicted": self._evicted,
        }

    def compose(self) -> ComposeResult:
        """Return the lanes, the time line and the line to type in."""
        yield VerticalScroll(id="lanes")
        yield Sparkline([], summary_function=max, id="silence")
        yield Static(
            "type; a word is heard once it is finished, also while the model speaks. "
            "Esc stops it, Ctrl-D leaves",
            id="figures",
            markup=False,
        )
        yield Input(placeholder="say something", id="words")

    def on_mount(self) -> None:
        """Begin to listen."""
        self.query_one("#words", Input).focus()
        self.live.attached.set()
        self.run_worker(self._live(), exit_on_error=True)
        self.run_worker(self._read(), exit_on_error=True)

    async def _live(self) -> None:
        try:
            await self.live.run()
        except BmkitError as exc:
            self.failed = exc
            self.exit()

    async def _read(self) -> None:
        reader = self.live.out.attach()
        while (event := await self.live.out.next(reader)) is not None:
            if (show := self.told.get(event["type"])) is not None:
                show(event)

    def _now(self) -> Row:
        """Return the row of the present slice."""
        if self.row is None:
            self.row = Row()
            lanes = self.query_one("#lanes", VerticalScroll)
            lanes.mount(self.row)
            if len(lanes.children) > SHOWN:
                lanes.children[0].remove()
            lanes.scroll_end(animate=False)
        return self.row

    def _delta(self, event: dict[str, Any]) -> None:
        self._now().put(1, event["delta"])

    def _done(self, event: dict[str, Any]) -> None:
        if event["status"] != "completed":
            self._now().put(1, " ⏹")

    def _decided(self, event: dict[str, Any]) -> None:
        self.silence = [*self.silence[-TIMELINE + 1 :], 1 - event["p_idle"]]
        self.query_one("#silence", Sparkline).data = self.silence

    def _stats(self, event: dict[str, Any]) -> None:
        late = f" · late by {event['late_by_ms']} ms" if event["late_by_ms"] else ""
        self._figures(
            f"slice {event['slice']} · p(silence) {event['p_idle']:.2f} · {event['slice_ms']} of "
            f"{self.live.period_ms} ms{late} · {event['kv']} tokens"
        )
        if self.row is not None and any(self.row.said):
            self.row = None

    def _evicted(self, event: dict[str, Any]) -> None:
        self._figures(f"{event['tokens']} tokens of the beginning are forgotten")

    def _over(self, event: dict[str, Any]) -> None:
        self.exit(message=None if event["reason"] == "client" else event["reason"])

    def _figures(self, text: str) -> None:
        self.query_one("#figures", Static).update(text)

    async def _say(self, text: str) -> None:
        from bmkit.duplex.server.protocol import MAX_TEXT, Append, Refused

        for at in range(0, len(text), MAX_TEXT):
            part = text[at : at + MAX_TEXT]
            if not part.strip():
                continue
            try:
                await self.live.hear(Append(type="input_text.append", text=part))
            except Refused as exc:
                self._figures(exc.message)
                return
            row = self._now()
            row.put(0, f" {part}" if row.said[0] else part)

    async def on_input_changed(self, event: Input.Changed) -> None:
        """Say all words that are finished."""
        words, space, rest = event.input.value.rpartition(" ")  # the event's own may be old
        if space and words.strip():
            event.input.value = rest
            await self._say(words)

    async def on_input_submitted(self, event: Input.Submitted) -> None:
        """Say what is left."""
        text, event.input.value = event.input.value, ""
        await self._say(text)

    async def action_stop(self) -> None:
        """Stop what is being said."""
        from bmkit.duplex.server.protocol import Cancel, Refused

        try:
            await self.live.hear(Cancel(type="response.cancel"))
        except Refused as exc:
            self._figures(exc.message)

    async def action_quit(self) -> None:
        """End the session and leave."""
        self.live.close("client")
        self.exit()
