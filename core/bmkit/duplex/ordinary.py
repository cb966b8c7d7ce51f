"""What a model has kept of what it could do: ordinary chats, and questions with given answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bmkit.data import rows
from bmkit.data.chat import IGNORED, Encoded
from bmkit.errors import InputError
from bmkit.nn import products
from bmkit.verbalizers import likelihood


@dataclass(frozen=True)
class Question:
    """A text, and what may come behind it."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    """The place of the right one."""


def read_questions(path: Path) -> list[Question]:
    """Read rows of `prompt`, `choices` and `answer`, which is one of them.

    Raises InputError naming the first bad line.
    """
    found = []
    for row in rows.read_all(path):
        prompt, choices = row.values.get("prompt"), row.values.get("choices")
        answer = row.values.get("answer")
        texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
        if not isinstance(prompt, str) or not prompt or not texts or len(choices or ()) < 2:
            raise InputError(
                f"{path}:{row.line}: it has no `prompt` and `choices`, two texts or more"
            )
        assert isinstance(choices, list)  # as `texts` says
        if answer not in choices:
            raise InputError(f"{path}:{row.line}: `answer` is none of the `choices`")
        found.append(Question(prompt, tuple(choices), choices.index(answer)))
    return found


@torch.inference_mode()
def chat_loss(
    model: Any, encoded: Encoded, advance: Callable[[float], None] = lambda _: None
) -> float:
    """Return the mean cross-entropy, in nats, of the tokens that the model is to say.

    Peak memory beside the model: the logits of one row.
    """
    total, count = 0.0, 0
    for example in encoded.examples:
        ids = torch.tensor([example["input_ids"]], device=model.device)
        labels = torch.tensor(example["labels"][1:], device=model.device)
        with products.quick():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(
            functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        )
        count += int((labels != IGNORED).sum())
        advance(1)
    return total / max(count, 1)


@torch.inference_mode()
def choice_accuracy(model: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """Return the share of questions whose right answer is the likeliest, by token on average.

    Nothing is trained, and no example is shown.
    """
    right = 0
    for one in questions:
        prompt = tokenizer(one.prompt)["input_ids"]
        choices = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in one.choices]
        scores = likelihood.causal(model, [prompt], choices).means
        right += int(scores[0].argmax()) == one.answer
    return right / len(questions)
