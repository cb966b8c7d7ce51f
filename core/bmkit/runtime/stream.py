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
        text, stopped = visible(self.ids, self.tokenizer, self.stop_strings)
        if text.endswith("\ufffd") and stopped is None:
            return  # a character whose bytes are not all there yet
        self._write(text[: len(text) - held_back(text, self.stop_strings)])

    def end(self) -> None:
        """Hand over what was held back."""
        self._write(visible(self.ids, self.tokenizer, self.stop_strings)[0])

    def _write(self, text: str) -> None:
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)


def visible(
    ids: Sequence[int], tokenizer: Any, stop_strings: Sequence[str]
) -> tuple[str, int | None]:
    """Return the text that an answer of `ids` shows, and how many of them complete a stop string.

    The count is None if no stop string is there. Special tokens are not shown, but a stop string
    may name them (`<|im_end|>`).
    """
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    if not stop_strings:
        return text, None
    cut = cut_at(text, stop_strings)
    hidden = cut == text  # is there a stop string that only shows with the special tokens?
    whole = str(tokenizer.decode(ids, skip_special_tokens=False)) if hidden else text
    if hidden and (whole == text or cut_at(whole, stop_strings) == whole):
        return text, None

    def shown(count: int) -> str:
        return str(tokenizer.decode(ids[:count], skip_special_tokens=not hidden))

    counts = range(1, len(ids) + 1)
    stopped = next((n for n in counts if cut_at(shown(n), stop_strings) != shown(n)), len(ids))
    if not hidden:
        return cut, stopped
    end = len(cut_at(whole, stop_strings))
    before = max((n for n in range(stopped) if len(shown(n)) <= end), default=0)
    rest = whole[len(shown(before)) : end]  # of the token in which the stop string begins
    return str(tokenizer.decode(ids[:before], skip_special_tokens=True)) + rest, stopped


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
