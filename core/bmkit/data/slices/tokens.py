"""A scheme's marks as tokens of a model, and a dialogue's text as tokens. No torch.

A mark is a token of its own. If the tokenizer has none of that name, it is a spare one (a special
token that neither the chat template nor the model's own code uses: nothing grows, and plain PEFT
loads what was trained), else one that is added, with a new row in the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from bmkit.data.slices.dialogue import Dialogue
from bmkit.data.slices.layout import STATES, Layout, Pair
from bmkit.errors import InputError, RecipeError

Scheme = Literal["idle", "state", "minicpm"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
How = Literal["auto", "spare", "added"]
IDLE, USER, AGENT = "<idle>", "<|u|>", "<|a|>"
MINICPM = ("<用户>", "<AI>")
"""The delimiters of MiniCPM-duplex: plain text of several tokens."""
RESERVED = ("reserved", "unused", "spare", "extra")
"""In the names of tokens that are there to be given a meaning: they are taken first."""


def marks(scheme: Scheme) -> tuple[str, ...]:
    """Return the marks of a scheme that are a token each, but for the end."""
    if scheme == "minicpm":
        return (IDLE,)
    return (IDLE, USER, AGENT, *(f"<{s}>" for s in STATES if scheme == "state"))


@dataclass(frozen=True)
class Marked:
    """A layout for a tokenizer, and the tokens that the tokenizer got for it."""

    layout: Layout
    names: Mapping[str, str] = field(default_factory=dict)
    """What the tokenizer calls each mark, where that was looked for."""
    added: tuple[str, ...] = ()
    spared: tuple[int, ...] = ()
    """Spare tokens that get a meaning, in which their rows have to begin anew."""

    @property
    def trained(self) -> tuple[int, ...]:
        """Return the tokens whose rows are to be learned: the marks, without the end."""
        single = (m[0] for m in (self.layout.user, self.layout.agent) if len(m) == 1)
        states = (token for _, token in self.layout.states)
        return tuple(sorted({self.layout.idle, *single, *states} - {self.layout.end}))


def mark(tokenizer: Any, scheme: Scheme, how: How | Mapping[str, str] = "auto") -> Marked:
    """Return the layout of `scheme` for a tokenizer, which gets the tokens that are missing.

    `auto` takes spare tokens if there are enough. A mapping says which tokens of the tokenizer are
    which marks. Raises InputError for a tokenizer without an end token, RecipeError for a mark that
    is no token of it, or if there are too few spare ones.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError("the model's tokenizer has no end token (eos), with which a slice ends")
    wanted = marks(scheme)
    names: dict[str, str] = {}
    known = tokenizer.get_vocab()
    if not isinstance(how, str):
        names = _named(how, wanted, known, scheme)
    else:
        names = {name: name for name in wanted if how != "spare" and name in known}
    missing = [name for name in wanted if name not in names]
    free = [t for t in spare(tokenizer) if t not in names.values()]
    added: list[str] = []
    taken: list[str] = []
    if missing and (how == "spare" or (how == "auto" and len(free) >= len(missing))):
        if len(free) < len(missing):
            raise RecipeError(
                f"scheme.tokens: the tokenizer has {len(free)} spare tokens, `{scheme}` needs "
                f"{len(missing)}",
                hint="`added` gives it new ones",
            )
        names |= zip(missing, free, strict=False)
        taken = free[: len(missing)]
    elif missing:
        added = missing
        tokenizer.add_special_tokens(
            {"additional_special_tokens": added}, replace_extra_special_tokens=False
        )
        names |= {name: name for name in added}
    ids = {name: int(tokenizer.convert_tokens_to_ids(own)) for name, own in names.items()}
    if len({*ids.values(), end}) <= len(ids):
        raise RecipeError("scheme.tokens: two marks are the same token, or one is the end token")
    user, agent = ((ids[USER],), (ids[AGENT],)) if scheme != "minicpm" else _plain(tokenizer)
    states = tuple((s, ids[f"<{s}>"]) for s in STATES if scheme == "state")
    first = [int(i) for i in tokenizer("")["input_ids"]]
    opening = tuple(i for i in first if i != end)
    layout = Layout(user, agent, ids[IDLE], int(end), states, opening)
    spared = tuple(int(tokenizer.convert_tokens_to_ids(token)) for token in taken)
    return Marked(layout, names, tuple(added), spared)


def _named(
    given: Mapping[str, str], wanted: Sequence[str], known: Mapping[str, int], scheme: Scheme
) -> dict[str, str]:
    """Return the tokens that a recipe names for marks, which go by their names without brackets."""
    by_word = {name.strip("<|>"): name for name in wanted}
    by_word |= {long: by_word[short] for long, short in WORDS.items() if short in by_word}
    names = {}
    for word, token in given.items():
        if word not in by_word:
            there = ", ".join(WORDS_OF.get(w, w) for w in (n.strip("<|>") for n in wanted))
            raise RecipeError(f"scheme.tokens: `{scheme}` has no `{word}`; it has {there}")
        if token not in known:
            raise RecipeError(
                f"scheme.tokens: `{token}` is no token of this model", hint="leave it to `added`"
            )
        names[by_word[word]] = token
    return names


WORDS = {"user": "u", "agent": "a"}
"""What recipes call the marks whose names are short."""
WORDS_OF = {short: long for long, short in WORDS.items()}


def spare(tokenizer: Any) -> list[str]:
    """Return the special tokens that nothing uses, those first that are there to be taken.

    Neither a named one (begin, end, padding, unknown, mask), nor one of the chat template's.
    """
    named = {
        str(getattr(tokenizer, f"{name}_token", None))
        for name in ("bos", "eos", "pad", "unk", "mask", "sep", "cls")
    }
    templates = str(tokenizer.chat_template or "")
    found = [
        added.content
        for _, added in sorted(tokenizer.added_tokens_decoder.items())
        if added.special and added.content not in named and added.content not in templates
    ]
    return sorted(found, key=lambda token: not any(word in token for word in RESERVED))


def _plain(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return MiniCPM's delimiters as they are tokenised in the middle of a text."""
    found = []
    before = _ids(tokenizer, "\n")
    for text in MINICPM:
        behind = _ids(tokenizer, f"\n{text}")
        fits = behind[: len(before)] == before
        found.append(tuple(behind[len(before) :] if fits else _ids(tokenizer, text)))
    return found[0], found[1]


def encode(tokenizer: Any, text: str, layout: Layout) -> tuple[int, ...]:
    """Tokenise what somebody says. No control token, nor a mark of several, comes out of it."""
    control = layout.control
    ids = [token for token in _ids(tokenizer, text) if token not in control]
    for several in (layout.user, layout.agent):
        ids = _without(ids, several)
    return tuple(ids)


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    return found


def _without(ids: list[int], mark: tuple[int, ...]) -> list[int]:
    """Return `ids` in which `mark` doesn't occur, also not by what was around one."""
    kept: list[int] = []
    for token in ids:
        kept.append(token)
        if tuple(kept[-len(mark) :]) == mark:
            del kept[-len(mark) :]
    return kept


def pairs_of(tokenizer: Any, dialogue: Dialogue, layout: Layout) -> list[Pair]:
    """Return a dialogue's slices in tokens. Text that holds nothing but control tokens is silence.

    What a speaker goes on with is tokenised by itself, as it is when a session runs.
    """
    return [
        Pair(
            None if one.user is None else encode(tokenizer, one.user, layout) or None,
            None if one.agent is None else encode(tokenizer, one.agent, layout) or None,
            one.tag,
            one.weight,
        )
        for one in dialogue.slices
    ]
