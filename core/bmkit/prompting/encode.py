"""The parts of a prompt -> token ids of the length that fits, each with its role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bmkit.errors import InputError, RecipeError
from bmkit.prompting import spacing, truncate
from bmkit.prompting.spacing import Spacing, Words
from bmkit.prompting.template import Span, Template
from bmkit.prompting.wrap import Part, Role

Kind = Literal["masked", "causal", "seq2seq"]

# A special token's role -> what the tokenizer calls it, or what stands in the same place.
_SPECIAL = {
    "<mask>": ("mask",),
    "<eos>": ("eos", "sep"),
    "<sep>": ("sep", "eos"),
    "<bos>": ("bos", "cls"),
    "<cls>": ("cls", "bos"),
    "<pad>": ("pad",),
    "<unk>": ("unk",),
}


@dataclass(frozen=True)
class Encoded:
    """One prompt in tokens. `roles`, `piece` and `soft` go over `ids`, and then over `behind`."""

    ids: list[int]
    roles: list[Role]
    """`added` is what the tokenizer or its chat template puts around."""
    piece: list[int]
    """The template's piece that a token comes from, else -1."""
    masks: list[int]
    """Where the masks are in `ids`; in a causal prompt, before which token their words go."""
    reads: list[int]
    """Where the model's output says what the masks are: in `ids`, or in `decoder_ids` if any."""
    soft: list[int]
    """The trainable row of each token, in the order of `soft_rows`, else -1."""
    behind: list[int] = field(default_factory=list)
    """Causal: the tokens after the first mask."""
    decoder_ids: list[int] = field(default_factory=list)
    """Seq2seq: what the decoder begins with."""
    cut: int = 0
    """The number of tokens that were too many."""


@dataclass(frozen=True)
class SoftRow:
    """A trainable row: its span, and the token that it begins as (None: drawn at random)."""

    span: int
    token: int | None
    word: str | None
    shared: bool


@dataclass(frozen=True)
class _Run:
    """A part's tokens."""

    part: Part
    ids: list[int]
    soft: list[int]


class Encoder:
    """Turns prompts into tokens, for one tokenizer and kind of model.

    A prompt has `max_length` tokens at most, with what the tokenizer adds; words that go to a
    causal mask are not counted. Only shortenable parts lose tokens (see `truncate.keep`).
    """

    def __init__(
        self,
        tokenizer: Any,
        kind: Kind,
        max_length: int,
        truncate_method: truncate.Method = "tail",
        *,
        soft_start: int | None = None,
        decoder_start: int | None = None,
        limit: str = "max_seq_length",
    ) -> None:
        """Look at the tokenizer. Raises RecipeError if it can't mask as `kind` needs it.

        Trainable tokens get ids from `soft_start` on, in the order of `soft_rows`; without it they
        have the pad token's. `decoder_start` is the model's `decoder_start_token_id`; if it isn't
        given, it is pad for T5 and eos for BART. `limit` is what errors call `max_length`.
        """
        self.limit = limit
        self.tokenizer, self.kind, self.max_length = tokenizer, kind, max_length
        self.truncate_method, self.soft_start = truncate_method, soft_start
        self.spacing = Spacing(tokenizer)
        self.before, self.after = spacing.added(tokenizer)
        if kind == "causal":
            self.after = []  # the text goes on
        self.sentinels = kind == "seq2seq" and self._token("<extra_id_0>") is not None
        if kind != "causal" and not self.sentinels and tokenizer.mask_token_id is None:
            hint = "a model that goes on with a text is `causal`"
            raise RecipeError(
                f"the tokenizer has no mask token, as a {kind} model needs", hint=hint
            )
        start = tokenizer.pad_token_id if self.sentinels else tokenizer.eos_token_id
        self.decoder_start = start if decoder_start is None else decoder_start

    def soft_rows(self, template: Template) -> list[SoftRow]:
        """Return the trainable rows of a template: one a span, or one for each token of its word.

        Raises RecipeError if a word has no tokens.
        """
        rows = []
        found = self.spacing.tokenise(_words(span) for span in template.soft if span.word)
        for span in template.soft:
            tokens: Sequence[int | None] = found[_words(span)] if span.word else [None]
            if not tokens:
                raise RecipeError(f"the soft word `{span.word}` has no tokens in this vocabulary")
            rows += [SoftRow(span.number, token, span.word, span.shared) for token in tokens]
        return rows

    def encode(self, parts: Sequence[Part], number: int = 1) -> Encoded:
        """Turn one prompt into tokens; see `encode_all`."""
        return self.encode_all([parts], [number])[0]

    def encode_all(
        self, rows: Sequence[Sequence[Part]], numbers: Sequence[int] | None = None
    ) -> list[Encoded]:
        """Turn prompts into tokens; a text that comes repeatedly is tokenised once.

        `numbers` name the rows in errors; they count from 1 if not given. Raises RecipeError if
        what can't be shortened is longer than `max_length`, or a special token is not there;
        InputError if a causal prompt has nothing before its mask, and the tokenizer no token for
        the beginning or end of a text.
        """
        spans = {span.number: span for parts in rows for part in parts for span in part.soft}
        words = [_of(parts, place) for parts in rows for place in range(len(parts))]
        words += [_words(span) for span in spans.values() if span.word]
        found = self.spacing.tokenise(w for w in words if w is not None)
        soft: dict[int, list[int]] = {}
        count = 0
        for number, span in sorted(spans.items()):
            size = len(found[_words(span)]) if span.word else 1
            soft[number] = list(range(count, count + size))
            count += size
        named = range(1, len(rows) + 1) if numbers is None else numbers
        return [
            self._row([self._run(parts, place, found, soft) for place in range(len(parts))], n)
            for parts, n in zip(rows, named, strict=True)
        ]

    def _run(
        self,
        parts: Sequence[Part],
        place: int,
        found: dict[Words, list[int]],
        soft: dict[int, list[int]],
    ) -> _Run:
        part = parts[place]
        rows: list[int] = []
        words = _of(parts, place)
        if words is not None:
            ids = found[words]
        elif part.role == "soft":
            rows = [row for span in part.soft for row in soft[span.number]]
            ids = [self._soft_id(row) for row in rows]
        elif part.role == "special":
            ids = [self._special(part.text)]
        else:
            ids = self._mask(part.mask)
        return _Run(part, ids, rows or [-1] * len(ids))

    def _row(self, runs: list[_Run], number: int) -> Encoded:
        chat = any(run.part.role == "added" for run in runs)  # it has all special tokens itself
        before, after = ([], []) if chat else (self.before, self.after)
        kept, cut = self._fit(runs, len(before) + len(after), number)
        if self.kind == "causal" and not before and not _leading(kept):
            before = [self._start(number)]
            kept, cut = self._fit(runs, len(before), number)
        kept = [_Run(Part("added"), before, [-1] * len(before)), *kept]
        kept.append(_Run(Part("added"), after, [-1] * len(after)))
        ids = [i for run in kept for i in run.ids]
        roles = [run.part.role for run in kept for _ in run.ids]
        piece = [run.part.piece for run in kept for _ in run.ids]
        rows = [row for run in kept for row in run.soft]
        masks, at = [], 0
        for run in kept:
            masks += [at] * (run.part.role == "mask")
            at += len(run.ids)
        done = Encoded(ids, roles, piece, masks, masks, rows, cut=cut)
        if self.kind == "causal" and masks:
            first = masks[0]
            return replace(done, ids=ids[:first], behind=ids[first:], reads=[first - 1])
        if self.kind == "seq2seq" and masks:
            return self._decoding(done)
        return done

    def _decoding(self, done: Encoded) -> Encoded:
        """Add what the decoder begins with.

        A T5 says what each sentinel stands for (arXiv 1910.10683); a BART says the whole text
        (arXiv 1910.13461), so that its output at a place is about the encoder's token there.
        """
        if self.decoder_start is None:
            hint = "give the model's decoder_start_token_id"
            raise RecipeError("the tokenizer has no token for a decoder to begin with", hint=hint)
        if self.sentinels:
            said = [done.ids[at] for at in done.masks]
            reads = list(range(1, len(said) + 1))
            return replace(done, decoder_ids=[self.decoder_start, *said], reads=reads)
        said = done.ids[: done.masks[-1]]
        return replace(done, decoder_ids=[self.decoder_start, *said])

    def _fit(self, runs: Sequence[_Run], fixed: int, number: int) -> tuple[list[_Run], int]:
        """Shorten what may be, and return how many tokens that took."""
        may = [place for place, run in enumerate(runs) if run.part.shortenable]
        lengths = [len(runs[place].ids) for place in may]
        total = fixed + sum(len(run.ids) for run in runs)
        excess = max(0, total - self.max_length)
        if excess > sum(lengths):
            raise RecipeError(
                f"row {number}: what can't be shortened has {total - sum(lengths)} tokens, and "
                f"{self.limit} is {self.max_length}",
                hint="let more of the template be shortened"
                if self.limit != "max_seq_length"
                else "raise template.max_seq_length, or let more of the template be shortened",
            )
        kept = list(runs)
        if excess:
            slices = truncate.keep(lengths, excess, self.truncate_method)
            for place, part in zip(may, slices, strict=True):
                run = runs[place]
                kept[place] = _Run(run.part, run.ids[part], run.soft[part])
        return kept, excess

    def _start(self, number: int) -> int:
        """Return a token for a causal prompt to begin with."""
        for name in ("bos_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name)) is not None:
                return int(token)
        hint = "put some text before the mask"
        raise InputError(f"row {number}: nothing is before the mask", hint=hint)

    def _soft_id(self, row: int) -> int:
        if self.soft_start is not None:
            return self.soft_start + row
        return self.tokenizer.pad_token_id or 0

    def _mask(self, number: int) -> list[int]:
        if self.kind == "causal":
            return []
        if not self.sentinels:
            return [self.tokenizer.mask_token_id]
        token = self._token(f"<extra_id_{number}>")
        if token is None:
            raise RecipeError(f"the template has more masks than the vocabulary's {number}")
        return [token]

    def _special(self, text: str) -> int:
        for name in _SPECIAL.get(text, ()):
            if (token := getattr(self.tokenizer, f"{name}_token_id")) is not None:
                return int(token)
        token = None if text in _SPECIAL else self._token(text)
        if token is None:
            known = ", ".join(self.tokenizer.all_special_tokens)
            hint = f"it has {known}; by role: {', '.join(_SPECIAL)}"
            raise RecipeError(f"the tokenizer has no special token `{text}`", hint=hint)
        return token

    def _token(self, text: str) -> int | None:
        """Return the id of a token that is called `text`, or None."""
        found = self.tokenizer.convert_tokens_to_ids(text)
        if found is None or self.tokenizer.convert_ids_to_tokens(found) != text:
            return None
        return int(found)


def _words(span: Span) -> Words:
    return Words(span.word or "", span.space, span.opens)


def _of(parts: Sequence[Part], place: int) -> Words | None:
    """Return the text to tokenise of a part, or None if it isn't words."""
    part = parts[place]
    if part.role in ("mask", "soft", "special"):
        return None
    verbatim = part.role in ("placeholder", "meta")
    return Words(part.text, part.space, opens=place == 0, verbatim=verbatim)


def _leading(runs: Sequence[_Run]) -> bool:
    """Tell whether any token is before the first mask."""
    for run in runs:
        if run.part.role == "mask":
            return False
        if run.ids:
            return True
    return True
