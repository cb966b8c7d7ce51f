"""The text of tokens as they come: a character of several tokens appears with its last one."""

from __future__ import annotations

from typing import Any

BROKEN = "\ufffd"


class Spelling:
    """The text of one answer. Each token is decoded behind a few others: spaces depend on them."""

    def __init__(self, tokenizer: Any, before: int = 0) -> None:
        """Begin behind so many characters."""
        self._tokenizer, self._before = tokenizer, before
        self._ids: list[int] = []
        self._from = 0  # tokens from here on are decoded
        self._shown = 0  # what those before here say has been returned
        self.ends: list[int] = []
        """Of each token, how many characters are there once it is."""

    @property
    def length(self) -> int:
        """Return how many characters are there, those before among them."""
        return self.ends[-1] if self.ends else self._before

    def add(self, token: int) -> str:
        """Take a token; return the text that is new."""
        self._ids.append(token)
        before = self._text(self._from, self._shown)
        text = self._text(self._from, len(self._ids))
        length = self.length
        if text.endswith(BROKEN) or len(text) <= len(before):
            self.ends.append(length)
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        self.ends.append(length + len(text) - len(before))
        return text[len(before) :]

    def _text(self, low: int, high: int) -> str:
        return str(
            self._tokenizer.decode(
                self._ids[low:high], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def spell(tokenizer: Any, ids: list[int] | tuple[int, ...]) -> tuple[str, list[int]]:
    """Return the text of an answer, and how many characters are there after each token."""
    spelling = Spelling(tokenizer)
    return "".join([spelling.add(token) for token in ids]), spelling.ends
