"""Ways to ask a model for labels, and how quick each of them is; see `prompt.py`."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prompt_tasks import ready, test_rows, verbalizer, written
from torch import Tensor

from bmkit.nn import products
from bmkit.prompt.ask import ON_CPU, Asker

REVIEW = '{"placeholder": "text_a"} It was {"mask"}'
INSTRUCTION = (
    "Below is a sentence of a film review. Say how the one who wrote it liked the film: say bad if "
    "they did not like it, and good if they did. Don't go by single words alone, and mind irony.\n"
    'Review: {"placeholder": "text_a"}\nThe film was {"mask"}'
)
SEVERAL = {"negative": "a waste of time", "positive": "worth every minute"}
SPEEDS: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...]]] = {
    "words of one token": (
        REVIEW,
        {"negative": "bad", "positive": "good"},
        "first",
        ("bmkit", "padded", "choices", "grouped", "grouped_onednn"),
    ),
    "words of several tokens": (REVIEW, SEVERAL, "likelihood", ("bmkit", "choices", "grouped")),
    "several tokens behind an instruction": (
        INSTRUCTION,
        SEVERAL,
        "likelihood",
        ("bmkit", "choices", "grouped"),
    ),
}
MLM_SPEEDS: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...]]] = {
    "a small masked model": (
        REVIEW,
        {"negative": "bad", "positive": "good"},
        "first",
        ("bmkit", "padded"),
    ),
}
PADDED_TO, PADDED_BATCH = 256, 8
AGREEMENT_ROWS = 16


@torch.inference_mode()
def padded(
    model: Any,
    prompts: Sequence[list[int]],
    reads: Sequence[int],
    words: Sequence[Sequence[int]],
    **more: Any,
) -> Tensor:
    """Return log-probabilities [rows, labels] in OpenPrompt's way: a token is a label's word.

    What a model says at `reads` is each prompt's mask.
    """
    tokens = [own[0] for own in words]
    found = []
    for low in range(0, len(prompts), PADDED_BATCH):
        part = prompts[low : low + PADDED_BATCH]
        ids = torch.zeros(len(part), PADDED_TO, dtype=torch.long)
        mask, asked = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, own in enumerate(part):
            ids[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = 1
            asked[row, reads[low + row]] = 1
        out = model(ids, attention_mask=mask, output_hidden_states=True, **more)
        logits = out.logits[asked > 0]  # [rows, vocabulary]
        found.append(logits[:, tokens].softmax(-1).log())
    return torch.cat(found)


@torch.inference_mode()
def choices(
    model: Any, prompts: Sequence[list[int]], words: Sequence[Sequence[int]], *, grouped: bool
) -> Tensor:
    """Return log-probabilities [rows, labels] in lm-evaluation-harness's way."""
    shared: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row, prompt in enumerate(prompts):
        for at, word in enumerate(words):
            shown = (*prompt, *word[:-1])
            key = shown if grouped else (*shown, row, at)  # the numbers part what must not be one
            shared.setdefault(key, []).append((row, at))
    passes = [(key if grouped else key[:-2], asked) for key, asked in shared.items()]
    passes.sort(key=lambda one: (-len(one[0]), one[0]))
    scores = torch.empty(len(prompts), len(words))
    for part in _parts(passes):
        ids = torch.zeros(len(part), len(part[0][0]), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, (shown, _) in enumerate(part):
            ids[line, : len(shown)] = torch.tensor(shown)
            mask[line, : len(shown)] = 1
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        for line, (shown, asked) in enumerate(part):
            for row, at in asked:
                tokens = torch.tensor(words[at])
                own = logits[line, len(shown) - len(tokens) : len(shown)].log_softmax(-1)
                scores[row, at] = own.gather(1, tokens[:, None]).sum()
    return scores.log_softmax(-1)


def _parts(passes: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield passes that go together, the longest first: as many tokens as a batch of bmkit's."""
    part: list[Any] = []
    for one in passes:
        if part and len(part[0][0]) * (len(part) + 1) > ON_CPU:
            yield part
            part = []
        part.append(one)
    if part:
        yield part


@dataclass(frozen=True)
class Asked:
    """Prompts and words of a part of speed, and the ways to ask."""

    prompts: list[list[int]]
    texts: list[list[int]]
    """The tokens of each label's word."""
    ways: dict[str, Callable[[], Tensor]]
    """Each returns log-probabilities, [rows, labels]."""


def asked(arguments: argparse.Namespace, name: str, model: Any, count: int) -> Asked:
    """Make the prompts of the first `count` rows of SST-2, for a causal model or a masked one."""
    template, words, handler, ways = {**SPEEDS, **MLM_SPEEDS}[name]
    spec = {"label_words": words, "multi_token_handler": handler}
    values = {"template": {"text": template}, "verbalizer": spec}
    rows = test_rows(arguments.data, "sst2")[:count]
    with tempfile.TemporaryDirectory() as folder:
        made = ready(written(Path(folder), values, test=rows), arguments.model)
    encoded = made.prompts.encode(made.splits["test"].records)
    prompts = [one.ids for one in encoded]
    told = verbalizer(made)
    texts = [list(word.ids) for word in told.words.flat]
    reads = [one.reads[0] for one in encoded]
    asker = Asker(model, made.kind, made.tokenizer.mask_token_id, 32 * 512)
    more = {"use_cache": False} if made.kind == "causal" else {}

    def with_onednn() -> Tensor:
        with products.quick():
            return choices(model, prompts, texts, grouped=True)

    calls: dict[str, Callable[[], Tensor]] = {
        "bmkit": lambda: told.label_logprobs(asker.logprobs(encoded, told.question)),
        "padded": lambda: padded(model, prompts, reads, texts, **more),
        "choices": lambda: choices(model, prompts, texts, grouped=False),
        "grouped": lambda: choices(model, prompts, texts, grouped=True),
        "grouped_onednn": with_onednn,
    }
    return Asked(prompts, texts, {way: calls[way] for way in ways})


def agreement(arguments: argparse.Namespace, name: str, model: Any) -> dict[str, Any]:
    """Return by how much log-probabilities of labels differ from bmkit's at most, by way."""
    made = asked(arguments, name, model, AGREEMENT_ROWS)
    ours = made.ways["bmkit"]()
    found = {w: float((ask() - ours).abs().max()) for w, ask in made.ways.items() if w != "bmkit"}
    assert max(found.values()) < 1e-3, f"{name}: {found}"
    return {"rows": AGREEMENT_ROWS, "largest_difference": found}


def speed(arguments: argparse.Namespace, name: str, model: Any) -> dict[str, Any]:
    """Return rows per second of all ways to ask, in turns."""
    made = asked(arguments, name, model, arguments.rows)
    ways, count = list(made.ways), len(made.prompts)
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    labels: dict[str, list[int]] = {}
    for turn in range(arguments.rounds):
        for at in range(len(ways)):
            way = ways[(turn + at) % len(ways)]  # whoever begins changes
            wall, own = time.perf_counter(), time.process_time()
            labels[way] = made.ways[way]().argmax(-1).tolist()
            spent = (time.process_time() - own, time.perf_counter() - wall)
            seconds[way].append(spent)
            print(name, turn, way, *(round(s, 2) for s in spent), flush=True)
    for way, labelled in labels.items():
        assert labelled == labels["bmkit"], f"{name}: {way} tells other labels"
    found: dict[str, Any] = {
        "rows": count,
        "tokens": sum(map(len, made.prompts)),
        "words": [len(text) for text in made.texts],
        "negative": labels["bmkit"].count(0),
        "ways": {},
    }
    for way in ways:
        cpu, wall = (statistics.median(s[i] for s in seconds[way]) for i in (0, 1))
        found["ways"][way] = {
            "rows_per_cpu_second": round(count / cpu, 2),
            "rows_per_second": round(count / wall, 2),
            "all_cpu_seconds": [round(s[0], 2) for s in seconds[way]],
            "all_seconds": [round(s[1], 2) for s in seconds[way]],
        }
    ours = found["ways"]["bmkit"]
    for way in ways[1:]:
        theirs = found["ways"][way]
        for of in ("rows_per_cpu_second", "rows_per_second"):
            theirs[f"bmkit_{of}_ratio"] = round(ours[of] / theirs[of], 2)
    return found
