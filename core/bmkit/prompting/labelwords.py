"""Label words: which words stand for a label, and the tokens that a model has for them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from bmkit.errors import InputError, RecipeError, did_you_mean
from bmkit.prompting.spacing import Spacing

Words = dict[str, list[str]]
"""Label -> words, in the order of labels, as the user wrote them."""

AS_IT_IS = "<!>"
"""In front of a word: it takes no prefix."""
_ANCHOR = "a"


@dataclass(frozen=True)
class Word:
    """A label word as it stands in a text, its prefix included, and its tokens."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class LabelWords:
    """The words of each label, with their tokens."""

    labels: tuple[str, ...]
    words: tuple[tuple[Word, ...], ...]
    """By label; where a template has several masks, each word stands at one of them."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return all tokens of all words, sorted: the columns of a head that are needed."""
        return tuple(sorted({i for word in self.flat for i in word.ids}))

    @property
    def flat(self) -> tuple[Word, ...]:
        """Return the words of all labels, one label after the other."""
        return tuple(word for own in self.words for word in own)

    def values(self) -> dict[str, list[dict[str, Any]]]:
        """Return what an artifact keeps: by label, each word's text and tokens."""
        return {
            label: [{"text": word.text, "ids": list(word.ids)} for word in own]
            for label, own in zip(self.labels, self.words, strict=True)
        }

    @classmethod
    def of_values(cls, values: Mapping[str, Sequence[Mapping[str, Any]]]) -> LabelWords:
        """Return the words of which `values` were kept."""
        words = (tuple(Word(w["text"], tuple(w["ids"])) for w in own) for own in values.values())
        return cls(tuple(values), tuple(words))

    def keep(self, kept: Callable[[int, int], bool]) -> LabelWords:
        """Return the words for which `kept(label, word)`, by their places, is true."""
        words = tuple(
            tuple(word for j, word in enumerate(own) if kept(i, j))
            for i, own in enumerate(self.words)
        )
        return replace(self, words=words)


def parse(spec: Mapping[str, str | Sequence[str]] | Sequence[Any], labels: Sequence[str]) -> Words:
    """Return words by label of what a recipe says: a mapping by label, or a list in their order.

    A label's words are a list, or one word. Raises RecipeError for a label that there isn't, that
    has no words, or for a list of another length.
    """
    if isinstance(spec, Mapping):
        for label in spec:
            if label not in labels:
                known = f"the labels are {', '.join(labels)}"
                close = did_you_mean(label, labels, otherwise=known)
                raise RecipeError(f"label words: `{label}` is none of the labels", hint=close)
        if missing := [label for label in labels if label not in spec]:
            raise RecipeError(f"label words: `{missing[0]}` has none", hint="each label takes some")
        listed = [spec[label] for label in labels]
    else:
        listed = list(spec)
        if len(listed) != len(labels):
            raise RecipeError(
                f"label words: {len(listed)} lists of words for {len(labels)} labels",
                hint=f"the labels are, in this order, {', '.join(labels)}",
            )
    words = {
        label: [own] if isinstance(own, str) else list(own)
        for label, own in zip(labels, listed, strict=True)
    }
    for label, own in words.items():
        if not own or not all(isinstance(word, str) and word.strip() for word in own):
            raise RecipeError(f"label words: `{label}` has none, or an empty one")
    return words


def resolve(
    words: Words,
    tokenizer: Any,
    *,
    prefix: str = " ",
    whole: bool = False,
    in_order: bool = False,
    max_token_split: int | None = None,
) -> LabelWords:
    """Return the words with their tokens, as they are behind `prefix` in a text.

    `<!>` in front of a word keeps the prefix away. A word that comes twice counts once, unless
    they stand `in_order`, one at each mask (PTR). Words of more than `max_token_split` tokens are
    left out. Raises InputError for a word of which the tokenizer makes unknown tokens or none or,
    with `whole`, more than one; for a label of which no word is left; and for two labels with the
    same words.
    """
    found: list[tuple[Word, ...]] = []
    for label, own in words.items():
        made = [_word(text, tokenizer, prefix, label, whole) for text in own]
        if max_token_split is not None:
            short = [word for word in made if len(word.ids) <= max_token_split]
            if not short:
                raise InputError(
                    f"label words: all of `{label}` have more than {max_token_split} tokens",
                    hint="raise max_token_split, or add shorter words",
                )
            made = short
        found.append(tuple(made) if in_order else _once(made))
    resolved = LabelWords(tuple(words), tuple(found))
    require_distinct(resolved, in_order=in_order)
    if in_order:
        _require_as_many(resolved)
    return resolved


def require_distinct(
    words: LabelWords, *, first_only: bool = False, in_order: bool = False
) -> None:
    """Raise InputError if two labels have the same words, or with `first_only`, first tokens."""
    seen: dict[Any, str] = {}
    for label, own in zip(words.labels, words.words, strict=True):
        tokens = [word.ids[:1] if first_only else word.ids for word in own]
        key = tuple(tokens) if in_order else frozenset(tokens)
        if key in seen:
            what = "the same first tokens" if first_only else "the same words"
            shown = ", ".join(f"`{word.text.strip()}`" for word in own)
            raise InputError(
                f"label words: `{seen[key]}` and `{label}` have {what}, {shown}",
                hint="they can't be told apart: change the words of one"
                + (", or take multi_token_handler: mean" if first_only else ""),
            )
        seen[key] = label


def delete_common(words: LabelWords) -> LabelWords:
    """Return the words without those that several labels have (KPT, arXiv 2108.02035).

    Raises InputError if a label has no others.
    """
    owners: dict[tuple[int, ...], int] = {}
    for own in words.words:
        for ids in {word.ids for word in own}:
            owners[ids] = owners.get(ids, 0) + 1
    left = words.keep(lambda label, word: owners[words.words[label][word].ids] == 1)
    for label, own in zip(left.labels, left.words, strict=True):
        if not own:
            raise InputError(
                f"label words: other labels have all words of `{label}` as well",
                hint="give it one of its own",
            )
    return left


def token_ids(
    tokenizer: Any, text: str, prefix: str = "", *, opens: bool = False
) -> tuple[int, ...]:
    """Return the tokens of `text` as it goes on behind `prefix`; with `opens` nothing is before it.

    Behind a space they are read off a text that has a word before: some tokenizers put a space in
    front of any text, and would find two. Without one they are those behind a text that ends there.
    """
    if not prefix and not opens:
        return tuple(_spacing(tokenizer).behind(text))
    if prefix and not prefix.strip():
        before = _plain(tokenizer, _ANCHOR)
        both = _plain(tokenizer, _ANCHOR + prefix + text)
        if before and len(both) > len(before) and both[: len(before)] == before:
            return tuple(both[len(before) :])
    return tuple(_plain(tokenizer, prefix + text))


def word(text: str, tokenizer: Any, prefix: str = " ") -> Word:
    """Return `text` as it goes on behind `prefix`, with its tokens.

    Raises InputError for a text of which the tokenizer makes unknown tokens, or none.
    """
    own = "" if text.startswith(AS_IT_IS) else prefix
    text = text.removeprefix(AS_IT_IS)
    ids = token_ids(tokenizer, text, own)
    if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
        raise InputError(
            f"`{text}` is no word to the tokenizer", hint=_alternatives(tokenizer, text)
        )
    return Word(own + text, ids)


@lru_cache(maxsize=4)
def _spacing(tokenizer: Any) -> Spacing:
    return Spacing(tokenizer)


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _word(written: str, tokenizer: Any, prefix: str, label: str, whole: bool) -> Word:
    own = "" if written.startswith(AS_IT_IS) else prefix
    text = written.removeprefix(AS_IT_IS)
    ids = token_ids(tokenizer, text, own)
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
    if not ids or unknown or (whole and len(ids) > 1):
        why = "is none to the tokenizer" if not ids or unknown else f"is {len(ids)} tokens"
        shown = " ".join(map(str, tokens)) or "nothing"
        raise InputError(
            f"label words: `{text}`, of `{label}`, {why}: {shown}",
            hint=_alternatives(tokenizer, text),
        )
    return Word(own + text, ids)


def _once(words: Sequence[Word]) -> tuple[Word, ...]:
    first: dict[tuple[int, ...], Word] = {}
    for word in words:
        first.setdefault(word.ids, word)
    return tuple(first.values())


def _alternatives(tokenizer: Any, text: str) -> str:
    """Offer words of the vocabulary that look alike."""
    plain = {_bare(token): None for token in tokenizer.get_vocab()}
    special = set(tokenizer.all_special_tokens)
    known = [w for w in plain if len(w) > 1 and w not in special and not w.startswith("##")]
    close = difflib.get_close_matches(text.strip(), known, n=3, cutoff=0.5)
    if not close:
        return "take a word that the vocabulary has as one token"
    return f"the vocabulary has {', '.join(f'`{word}`' for word in close)}"


def _bare(token: str) -> str:
    """Return a token without the mark of a space before it."""
    return token.removeprefix("Ġ").removeprefix("▁")


def _require_as_many(words: LabelWords) -> None:
    first = len(words.words[0])
    for label, own in zip(words.labels, words.words, strict=True):
        if len(own) != first:
            raise InputError(
                f"label words: `{label}` has {len(own)}, `{words.labels[0]}` has {first}",
                hint="each label takes one word for each mask of the template",
            )
