"""What is trained on: a user's texts and prompts, else what the model says by itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from bmkit.data import chat, rows
from bmkit.errors import InputError
from bmkit.model import save_tensors
from bmkit.report import Reporter, task
from bmkit.runtime.generate import Answer, Generation
from bmkit.runtime.voice import Voice
from bmkit.train.distil import Taught

BATCH = 64
IDLE = 8
"""Batches without a text after which it is no use to go on."""
LONGEST_PROMPT = 48
"""Tokens of a prompt that the model makes up itself; one that hasn't ended then is cut."""
SHORTEST_PROMPT = 3


@dataclass(frozen=True)
class Text:
    """Token ids, of which those from `first` on are what is to be said."""

    ids: list[int]
    first: int
    taught: Taught | None = None
    """What the model found likeliest at each place from `first` on, where it has said them."""


class Wanted(Protocol):
    """How much is to be said, as recipes have it."""

    @property
    def tokens(self) -> int:
        """Return how many tokens to learn from."""

    @property
    def sequence_length(self) -> int:
        """Return how many tokens a text has at most."""

    @property
    def max_new_tokens(self) -> int:
        """Return how many tokens of an answer the model is let make."""

    @property
    def temperature(self) -> float:
        """Return the sharpness of the draw in an answer; 0 is greedy."""


@dataclass(frozen=True)
class _Asked:
    number: int
    ids: list[int]
    adapter: str | None = "*"


def gather(
    voice: Callable[[], Voice],
    tokenizer: Any,
    data: Wanted,
    calibration: Path | None,
    kept: Path,
    *,
    likeliest: int | None,
    seed: int,
    reporter: Reporter,
    halves: bool = False,
) -> list[Text]:
    """Return texts to learn from: with `data.tokens` tokens, what is to be said counted alone.

    Rows of `calibration` that hold prompts only are answered by the model; without a file it makes
    up the prompts as well, as it would a user's turn (Magpie, arXiv 2406.08464). Its `likeliest`
    tokens at each place of an answer are kept, as they are known then. What was made lies in the
    folder `kept`, a batch a file, and a stopped run goes on from there to the same end. `voice` is
    asked for only if there is something to say. With `halves`, for an encoder-decoder, texts are
    said from their middle on, and there must be some. Raises InputError for unusable rows.
    """
    given = [] if calibration is None else _given(tokenizer, data, calibration)
    if halves:
        given = [replace(t, first=len(t.ids) // 2) if t.first <= 1 else t for t in given]
        if not any(t.first < len(t.ids) for t in given):
            raise InputError(
                "an encoder-decoder makes up nothing to learn from",
                hint="name a file of texts, or of prompts and completions: "
                "-s data.calibration=texts.txt",
            )
    if calibration is not None and not given:
        raise InputError(f"{calibration} holds nothing to learn from")
    whole = [t for t in given if t.first < len(t.ids)]
    given = [t for t in given if t.first == len(t.ids)]
    if whole and (not given or sum(len(t.ids) - t.first for t in whole) >= data.tokens):
        return _enough(whole, data.tokens)
    kept.mkdir(parents=True, exist_ok=True)
    batches = [_read(file) for file in sorted(kept.glob("*.safetensors"))]
    done = sum(len(t.ids) - t.first for batch in [whole, *batches] for t in batch)
    source = _said(voice, data, [t.ids for t in given], len(batches), likeliest, seed)
    nothing = 0
    with task(reporter, "let the model speak", data.tokens, "tokens") as bar:
        bar.advance(min(done, data.tokens))
        while done < data.tokens and (batch := next(source, None)) is not None:
            _write(kept / f"{len(batches):05}.safetensors", batch)
            batches.append(batch)
            more = sum(len(t.ids) - t.first for t in batch)
            bar.advance(min(more, data.tokens - done))
            done += more
            nothing = 0 if more else nothing + 1
            if nothing == IDLE:
                raise InputError(
                    "the model has nothing to say to prompts of its own",
                    hint="name a file of prompts: -s data.calibration=prompts.jsonl",
                )
    return _enough([t for batch in [whole, *batches] for t in batch], data.tokens)


def _enough(texts: list[Text], tokens: int) -> list[Text]:
    """Return the first texts that make up so many tokens."""
    found, done = [], 0
    for text in texts:
        if done >= tokens:
            break
        found.append(text)
        done += len(text.ids) - text.first
    return found


def _write(file: Path, batch: Sequence[Text]) -> None:
    """Keep a batch of texts that the model said."""
    found = {
        "ids": torch.tensor([i for t in batch for i in t.ids], dtype=torch.int32),
        "lengths": torch.tensor([[len(t.ids), t.first] for t in batch], dtype=torch.int32),
    }
    taught = [t.taught for t in batch if t.taught is not None]
    if taught:
        found["tokens"] = torch.cat([t.tokens for t in taught])
        found["logprobs"] = torch.cat([t.logprobs for t in taught])
    save_tensors(file, found)


def _read(file: Path) -> list[Text]:
    kept = load_file(file)
    lengths = kept.get("lengths", torch.zeros(0, 2)).tolist()
    ids, found, at, place = kept["ids"].tolist(), [], 0, 0
    for size, first in lengths:
        taught = None
        if "tokens" in kept:
            places = slice(place, place + size - first)
            taught = Taught(kept["tokens"][places], kept["logprobs"][places])
        found.append(Text(ids[at : at + size], first, taught))
        at += size
        place += size - first
    return found


def holds_texts(tokenizer: Any, data: Wanted, file: Path) -> bool:
    """Tell whether a user's file has something that is said, not prompts alone."""
    return any(t.first < len(t.ids) for t in _given(tokenizer, data, file))


def _given(tokenizer: Any, data: Wanted, calibration: Path) -> list[Text]:
    """Read a user's file: whole texts, or prompts, which have nothing that is said yet."""
    if calibration.suffix in rows.PLAIN:
        ids = tokenizer(_text_of(calibration))["input_ids"]
        size = data.sequence_length
        found = [Text(ids[at : at + size], 1) for at in range(0, len(ids), size)]
        return [t for t in found if len(t.ids) > 1]
    found = []
    for row in rows.read_all(calibration):
        try:
            if set(row.values) & {"completion", "text"} or _answered(row.values):
                segments = list(chat.segments(tokenizer, row.values))
                ids = [i for part, _ in segments for i in part][: data.sequence_length]
                first = 0
                for part, said in segments:
                    if said:
                        break
                    first += len(part)
                found.append(Text(ids, max(min(first, len(ids) - 1), 1)))
            else:
                ids = _prompt(tokenizer, row.values)[: data.sequence_length // 2]
                found.append(Text(ids, len(ids)))
        except ValueError as exc:
            raise InputError(f"{calibration}:{row.line}: {exc}") from None
    return [t for t in found if len(t.ids) > 1]


def plain(tokenizer: Any, file: Path) -> list[list[int]]:
    """Return the texts of a text file, or of rows of `text`, as token ids.

    Raises InputError for other rows.
    """
    if file.suffix in rows.PLAIN:
        texts = [_text_of(file)]
    else:
        texts = []
        for row in rows.read_all(file):
            if not isinstance(row.values.get("text"), str):
                problem = rows.unknown_shape(row.values, "`text`")
                raise InputError(f"{file}:{row.line}: {problem}")
            texts.append(row.values["text"])
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def _text_of(file: Path) -> str:
    """Read a text file. Raises InputError if it isn't UTF-8, or blank."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise InputError(f"{file} is not UTF-8 text: {exc.reason} at {exc.start}") from None
    if not text.strip():
        raise InputError(f"{file} holds nothing to learn from")
    return text


def _answered(values: dict[str, Any]) -> bool:
    messages = values.get("messages")
    return isinstance(messages, list) and any(
        isinstance(m, dict) and m.get("role") == "assistant" for m in messages
    )


def _prompt(tokenizer: Any, values: dict[str, Any]) -> list[int]:
    messages = values.get("messages")
    if messages is None:
        if not isinstance(values.get("prompt"), str):
            raise ValueError(rows.unknown_shape(values, "`prompt`, `messages` or `text`"))
        messages = [{"role": "user", "content": values["prompt"]}]
    if problem := rows.messages_problem(messages):
        raise ValueError(problem)
    if tokenizer.chat_template is None:
        text = "\n".join(m["content"] for m in messages)
    else:
        text = chat.render(tokenizer, messages, answer=True)
    found: list[int] = tokenizer(rows.require_text(text), add_special_tokens=False)["input_ids"]
    if not found:
        raise ValueError("the prompt is empty")
    return found


def _said(
    ask: Callable[[], Voice],
    data: Wanted,
    prompts: list[list[int]],
    skipped: int,
    likeliest: int | None,
    seed: int,
) -> Iterator[list[Text]]:
    """Yield prompts with the model's answers in batches; prompts of its own if there are none."""
    voice = ask()
    how = Generation(
        data.max_new_tokens,
        sampled=data.temperature > 0,
        temperature=data.temperature or 1.0,
        seed=seed,
        logprobs=likeliest,
    )
    most = data.sequence_length
    opening, closing = chat.user_turn(voice.tokenizer)
    start = voice.tokenizer.bos_token_id
    start = start if start is not None else voice.eos[0] if voice.eos else 0
    for number in itertools.count(skipped * BATCH, BATCH):
        if prompts and number >= len(prompts):
            return
        if prompts:
            asked = prompts[number : number + BATCH]
        elif opening:
            asking = Generation(LONGEST_PROMPT, sampled=True, min_p=0.02, seed=seed)
            made = _answers(voice, [opening] * BATCH, number, asking)
            turns = [a.token_ids[:-1] if a.finish == "eos" else a.token_ids for a in made]
            asked = [[*opening, *ids, *closing] for ids in turns if len(ids) >= SHORTEST_PROMPT]
        else:  # no chats: what the model says from its beginning on
            asked = [[start]] * BATCH
            how = Generation(most - 1, sampled=True, seed=seed, logprobs=likeliest)
        answers = _answers(voice, asked, number, how)
        texts = [_text(ids, a, most) for ids, a in zip(asked, answers, strict=True)]
        yield [t for t in texts if t.first < len(t.ids)]


def _text(ids: list[int], answer: Answer, most: int) -> Text:
    """Put a prompt and its answer together, cut to `most` tokens."""
    whole = [*ids, *answer.token_ids][:most]
    told = (answer.logprobs or [])[: max(len(whole) - len(ids), 0)]
    if not told:
        return Text(whole, len(ids))
    tokens = torch.tensor([[token for token, _ in c.top] for c in told], dtype=torch.int32)
    logprobs = torch.tensor([[p for _, p in c.top] for c in told], dtype=torch.float16)
    return Text(whole, len(ids), Taught(tokens, logprobs))


def _answers(voice: Voice, prompts: list[list[int]], first: int, how: Generation) -> list[Answer]:
    """Answer prompts, numbered from `first` on, in their order."""
    asked = [_Asked(i, ids) for i, ids in enumerate(prompts, first)]
    found = {prompt.number: answer for prompt, answer in voice.answer(asked, how)}
    return [found[p.number] for p in asked]
