"""Tokenising pieces of a text apart, so that the tokens are those of the text as a whole.

Tokenizers see a blank in three ways. Byte-level BPE has it in the token behind it; SentencePiece as
well, and puts one before any text by itself; WordPiece has no blanks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_BLANKS = ("▁", "Ġ")
_ANCHORS = ("\ue000", "⸻", "☃", "~")


@dataclass(frozen=True)
class Words:
    """A piece of text. `space`: a blank is before it; `opens`: nothing at all is.

    `verbatim`: what looks like a special token is text, as it is in what a row holds.
    """

    text: str
    space: bool = False
    opens: bool = False
    verbatim: bool = False


class Spacing:
    """How a tokenizer treats blanks, found out by trying."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        firsts = [self.tokenizer.convert_ids_to_tokens(self._ids([w])[0])[:1] for w in ("x", "a")]
        self.opens_itself = any(first and first[0].startswith(_BLANKS) for first in firsts)
        """Whether it puts a blank before any text."""
        self.ignores = not self.opens_itself and self._ids([" x"]) == self._ids(["x"])
        """Whether blanks leave no trace."""

    def tokenise(self, words: Iterable[Words]) -> dict[Words, list[int]]:
        """Return the token ids of each piece, without what is added at the ends of a text.

        Different texts are tokenised in one go. Memory: the ids, twice.
        """
        found: dict[Words, list[int]] = {}
        groups: dict[tuple[bool, bool], dict[Words, str]] = {}
        for one in dict.fromkeys(words):
            glued = self._glued(one)
            text = one.text if glued else self._written(one)
            groups.setdefault((glued, one.verbatim), {})[one] = text
        for (glued, verbatim), texts in groups.items():
            once = list(dict.fromkeys(texts.values()))
            tokenised = self._behind if glued else self._ids
            ids = dict(zip(once, tokenised(once, verbatim=verbatim), strict=True))
            if verbatim:  # of Unigram, special tokens are pieces as others
                ids = {
                    text: [i for i in own if i not in self._special] for text, own in ids.items()
                }
            found |= {w: ids[text] for w, text in texts.items()}
        return found

    @cached_property
    def _special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}

    def behind(self, text: str) -> list[int]:
        """Return the tokens of a text that goes on where another has ended, without a blank."""
        return self.tokenise([Words(text)])[Words(text)]

    def _glued(self, words: Words) -> bool:
        """Tell whether a piece needs an anchor, for no blank to come before it."""
        return self.opens_itself and not (words.space or words.opens) and bool(words.text)

    def _written(self, words: Words) -> str:
        if not words.space or not words.text or self.opens_itself or self.ignores:
            return words.text
        return f" {words.text}"

    def _behind(self, texts: list[str], *, verbatim: bool = False) -> list[list[int]]:
        """Tokenise texts behind a character that no token has, whose tokens are then left out."""
        if self._anchor is None:
            return self._ids(texts, verbatim=verbatim)
        anchored = [self._anchor + text for text in texts]
        done = self._call(anchored, verbatim=verbatim, return_offsets_mapping=True)
        found = []
        for text, ids, places in zip(texts, done["input_ids"], done["offset_mapping"], strict=True):
            over = [i for i, (start, end) in zip(ids, places, strict=True) if start < 1 < end]
            if any(i != self.tokenizer.unk_token_id for i in over):
                # The anchor became part of a known token.
                found += self._ids([text], verbatim=verbatim)
            else:
                found.append([i for i, (_, end) in zip(ids, places, strict=True) if end > 1])
        return found

    @cached_property
    def _anchor(self) -> str | None:
        """A character that stays apart from what is behind it, if the tokenizer gives offsets."""
        if not self.tokenizer.is_fast:
            return None
        for anchor in _ANCHORS:
            done = self._call([f"{anchor}a", f"{anchor}."], return_offsets_mapping=True)
            if all(
                any(end == 1 for _, end in places) and all(s >= 1 or e <= 1 for s, e in places)
                for places in done["offset_mapping"]
            ):
                return anchor
        return None

    def _ids(self, texts: list[str], *, verbatim: bool = False) -> list[list[int]]:
        found: list[list[int]] = self._call(texts, verbatim=verbatim)["input_ids"]
        return found

    def _call(self, texts: list[str], *, verbatim: bool = False, **more: Any) -> Any:
        if verbatim:
            more["split_special_tokens"] = True
        return self.tokenizer(
            texts, add_special_tokens=False, truncation=False, verbose=False, **more
        )


def added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and behind any text."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at], full[at + len(bare) :]
    return [], []
