"""Rows of chat, prompts with completions, or plain text -> token ids and labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmkit.data import rows
from bmkit.data.rows import Row
from bmkit.errors import InputError

IGNORED = -100  # the label of a token that bears no loss

Example = dict[str, list[Any]]
"""A row by what it has: a number for each token, or one in all."""


@dataclass(frozen=True)
class Encoded:
    """A tokenised file: what to train on, and what was lost on the way."""

    examples: list[Example]
    truncated: int
    dropped: int

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return sum(len(e["input_ids"]) for e in self.examples)

    @property
    def labelled(self) -> int:
        """Return the number of tokens that bear loss."""
        return sum(label != IGNORED for e in self.examples for label in e.get("labels", [0]))


def encode_file(path: Path, tokenizer: Any, *, max_length: int, raw: bool) -> Encoded:
    """Tokenise a JSONL file of `messages`, `prompt`/`completion` or `text` rows.

    Loss falls on what the model is to say: assistant turns with their end token, completions, or
    all of a text. A row longer than `max_length` tokens is cut off (a text is cut into several);
    a row with nothing left to learn is dropped. Raises InputError naming the file and line.
    """
    if not raw and tokenizer.chat_template is None:
        raw = True
    examples: list[Example] = []
    truncated = dropped = 0
    for row in rows.read_all(path):
        try:
            segments = list(_segments(row, tokenizer, raw=raw))
        except ValueError as exc:
            raise InputError(f"{path}:{row.line}: {exc}") from None
        ids = [i for part, _ in segments for i in part]
        labels = [i if learn else IGNORED for part, learn in segments for i in part]
        pieces = [(0, max_length)]
        if not ("messages" in row.values or {"prompt", "completion"} <= row.values.keys()):
            pieces = [(at, at + max_length) for at in range(0, len(ids), max_length)]
        elif len(ids) > max_length:
            truncated += 1
        taken = len(examples)
        for start, end in pieces:
            # The first token is predicted from nothing, so it bears no loss.
            learn = [IGNORED, *labels[start + 1 : end]]
            if any(label != IGNORED for label in learn):
                examples.append({"input_ids": ids[start:end], "labels": learn})
        dropped += len(examples) == taken
    if not examples:
        raise InputError(
            f"{path}: no row has anything to learn within {max_length} tokens",
            hint="raise data.max_length, or look at the rows",
        )
    return Encoded(examples, truncated, dropped)


def labelled(tokenizer: Any, values: dict[str, Any], *, raw: bool) -> tuple[list[int], list[int]]:
    """Return the token ids of a row, and its labels: IGNORED where it isn't the model that speaks.

    Raises ValueError for a row that can't be used.
    """
    parts = list(_segments(Row(0, values), tokenizer, raw=raw or tokenizer.chat_template is None))
    ids = [i for part, _ in parts for i in part]
    said = [i if learn else IGNORED for part, learn in parts for i in part]
    return ids, [IGNORED, *said[1:]]


def whole(tokenizer: Any, values: dict[str, Any]) -> list[int]:
    """Return all token ids of a row of `messages`, `prompt`/`completion` or `text`.

    Raises ValueError for a row that can't be used.
    """
    return [i for part, _ in segments(tokenizer, values) for i in part]


def segments(tokenizer: Any, values: dict[str, Any]) -> Iterator[tuple[list[int], bool]]:
    """Yield the token ids of such a row in pieces, each with whether the model is to say it."""
    return _segments(Row(0, values), tokenizer, raw=tokenizer.chat_template is None)


def user_turn(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what stands before a user's first words in a chat, and what from there to the answer.

    Both are empty without a chat template, or if it doesn't leave the words as they are.
    """
    if tokenizer.chat_template is None:
        return [], []
    mark = "a user's own words"
    text = render(tokenizer, [{"role": "user", "content": mark}], answer=True)
    before, found, after = text.partition(mark)
    if not found:
        return [], []
    return _ids(tokenizer, before), _ids(tokenizer, after)


def _segments(row: Row, tokenizer: Any, *, raw: bool) -> Iterator[tuple[list[int], bool]]:
    """Yield the row's token ids in pieces, each with whether it is to be learned."""
    values = row.values
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if problem := rows.lacking("causal_lm", values):
        raise ValueError(problem)
    if "messages" in values:
        if raw:
            raise ValueError("it holds `messages`, but the model has no chat template")
        yield from chat_segments(values["messages"], tokenizer)
    elif "prompt" in values and "completion" in values:
        prompt, completion = values["prompt"], values["completion"]
        if raw:
            yield _ids(tokenizer, prompt, start=True), False
            yield _ids(tokenizer, completion) + end, True
        else:
            turns = [("user", prompt), ("assistant", completion.strip())]
            yield from chat_segments([{"role": r, "content": c} for r, c in turns], tokenizer)
    else:
        yield _ids(tokenizer, values["text"], start=True) + end, True


def chat_segments(
    messages: list[dict[str, str]], tokenizer: Any
) -> Iterator[tuple[list[int], bool]]:
    """Yield a chat's token ids: what the model reads (not learned), what it answers (learned).

    Each answer is tokenised apart from what comes before it, as it is when the model generates.
    Raises ValueError if the chat has no answer, or the template doesn't only append.
    """
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], answer=True)
        after = render(tokenizer, messages[: i + 1], answer=False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError("the model's chat template rewrites earlier turns; train on `text`")
        answer = after[len(before) :]
        stop = tokenizer.eos_token or ""
        said, found, rest = answer.rpartition(stop) if stop else (answer, "", "")
        if not found:
            said, rest = answer, ""
        yield _ids(tokenizer, before[len(done) :]), False
        yield _ids(tokenizer, said + found), True
        if rest.strip() or i < len(messages) - 1:
            yield _ids(tokenizer, rest), False
        done = after
    if not done:
        raise ValueError("no message has the role assistant: there is nothing to learn")


def render(tokenizer: Any, messages: list[dict[str, str]], *, answer: bool) -> str:
    """Return the chat as the model reads it; with `answer`, up to where it is to speak.

    Raises ValueError if the template refuses the messages.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except (TemplateError, TypeError) as exc:
        raise ValueError(f"the model's chat template refuses it: {exc}") from None
    return str(text)


def _ids(tokenizer: Any, text: str, *, start: bool = False) -> list[int]:
    """Tokenise; with `start`, the tokenizer may put its begin token in front."""
    rows.require_text(text)
    found: list[int] = tokenizer(text, add_special_tokens=start)["input_ids"]
    if start and found and found[-1] == tokenizer.eos_token_id:
        found = found[:-1]  # some tokenizers close what they open; the caller does that
    return found
