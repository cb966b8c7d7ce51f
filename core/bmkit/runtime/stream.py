"""Text as it is made: decoded token by token, whole characters only, stop strings held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class TextStream(BaseStreamer):  # type: ignore[misc]
    """A transformers streamer for one prompt that hands over new text as it becomes certain."""

    def __init__(
        self, tokenizer: Any, stop_strings: Sequence[str], write: Callable[[str], None]
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.write = write
        self.ids: list[int] = []
        self.written = 0
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take new tokens; the first call brings the prompt."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids.extend(value.reshape(-1).tolist())
        text = cut_at(self._text(), self.stop_strings)
        if text.endswith("\ufffd"):
            return  # a character whose bytes are not all there yet
        self._write(text[: len(text) - held_back(text, self.stop_strings)])

    def end(self) -> None:
        """Hand over what was held back."""
        self._write(cut_at(self._text(), self.stop_strings))

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _write(self, text: str) -> None:
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)


def cut_at(text: str, stop_strings: Sequence[str]) -> str:
    """Return `text` up to the first stop string."""
    places = [at for stop in stop_strings if (at := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def held_back(text: str, stop_strings: Sequence[str]) -> int:
    """Return how many characters at the end may turn out to begin a stop string."""
    return max(
        (
            size
            for stop in stop_strings
            for size in range(1, len(stop))
            if text.endswith(stop[:size])
        ),
        default=0,
    )
