"""`bmkit infer` on a terminal with nothing to answer: a chat that remembers."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from bmkit.report import Reporter
from bmkit_cli import stopping

HELP = """\
/reset         forget what was said
/system TEXT   set a system prompt, and forget
/help          this text
/exit          leave; Ctrl-D does too. Ctrl-C ends an answer."""


def is_possible() -> bool:
    """Tell whether somebody sits at both ends: stdin and stdout are a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


class Chat:
    """The messages so far, and the session that answers them."""

    def __init__(self, session: Any, reporter: Reporter, out: Any) -> None:
        self.session, self.reporter, self.out = session, reporter, out
        self.messages: list[dict[str, str]] = []
        self.system: str | None = None
        if session.reader.raw:
            reporter.warn("this model has no chat template: each prompt is answered by itself")
        if session.server is not None:
            session.server.reuse = True

    def run(self) -> None:
        """Read lines and answer them until the end of the input."""
        try:
            self._run()
        finally:
            self.session.close()

    def _run(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines and keeps a history with it
        self.reporter.info("/help lists what else can be typed; Ctrl-D leaves")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                self.out.text("")
                return
            except KeyboardInterrupt:
                stopping.handled()
                self.out.text("")
                continue
            if line == "/exit":
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """Do what one line says."""
        word, _, rest = line.partition(" ")
        if word == "/reset":
            self.messages.clear()
        elif word == "/system":
            self.messages.clear()
            self.system = rest.strip() or None
        elif word == "/help":
            self.reporter.info(HELP)
        elif word.startswith("/") and word[1:].isalpha():
            self.reporter.warn(f"`{word}` is nothing that is known here; /help lists what is")
        else:
            self.ask(line)

    def ask(self, text: str) -> None:
        """Answer one message, writing while it is made; an interrupted answer is kept as it is."""
        from bmkit.data.rows import BadRow

        if self.session.reader.raw:
            self._answer({"prompt": text})
            return
        self.messages.append({"role": "user", "content": text})
        while True:
            first = [{"role": "system", "content": self.system}] if self.system else []
            said, found = self._answer({"messages": [*first, *self.messages]})
            if not isinstance(found, BadRow):
                self.messages.append({"role": "assistant", "content": said})
                return
            if len(self.messages) < 3:
                self.messages.pop()
                self.reporter.warn(found.problem)
                return
            del self.messages[:2]
            self.reporter.warn("the context is full: the oldest question and answer are forgotten")

    def _answer(self, values: dict[str, Any]) -> tuple[str, Any]:
        from bmkit.data.rows import BadRow, Row

        pieces: list[str] = []

        def write(piece: str) -> None:
            pieces.append(piece)
            self.out.text(piece, end="")

        answers = self.session.answer([Row(1, values)], write=write)
        found = None
        try:
            found = next(answers)
        except KeyboardInterrupt:
            stopping.handled()
            self.reporter.info("(interrupted)")
        finally:
            try:
                answers.close()
            except KeyboardInterrupt:  # pressed again: the answer is over all the same
                stopping.handled()
        if not isinstance(found, BadRow):
            self.out.text("")
        return "".join(pieces), found
