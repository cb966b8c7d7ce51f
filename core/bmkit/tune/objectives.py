"""What a model is to learn from rows: how they are read, what the loss is, what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmkit import model as models
from bmkit.data import halves, labelled
from bmkit.data.batch import Gaps, Halves, Labelled, Padding
from bmkit.data.chat import Encoded, Example, encode_file
from bmkit.data.pairs import Pairs, encode_pairs
from bmkit.data.slices.examples import encode_dialogues, weighed
from bmkit.data.slices.tokens import Marked
from bmkit.errors import InputError, RecipeError
from bmkit.runtime.heads import Head, pad_of
from bmkit.train.heads import label_figures, label_loss
from bmkit.train.loss import mean_loss, next_token_loss
from bmkit.train.preference import preference_figures, preference_loss
from bmkit.tune import duplex
from bmkit.tune.recipe import Task, TuneRecipe
from bmkit.tune.task import task_of

Batch = dict[str, Tensor]
PEFT_TASKS: dict[str, str | None] = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "masked_lm": None,
    "preference": "CAUSAL_LM",
    "duplex": "CAUSAL_LM",
}
DEV_SEED = 1
"""Of the gaps in rows that aren't trained on: the same ones each time."""


@dataclass(frozen=True)
class Objective:
    """A task: `head` is what the model needs for it beyond its own, if it does."""

    task: Task
    head: Head | None
    encode: Callable[[Path], Encoded]
    collate: Callable[[Sequence[Example]], Batch]
    collate_dev: Callable[[Sequence[Example]], Batch]
    loss: Callable[[Any, Batch], tuple[Tensor, int]]
    figures: Callable[[Any, Sequence[Batch], torch.device], dict[str, float]]
    """What is measured on batches: `dev_loss`, and what the task has besides."""

    pad_token_id: int = 0
    max_length: int = 0
    """Tokens of a row: what is longer was cut."""
    marks: Marked | None = None
    """Of dialogues in slices."""
    encode_mix: Callable[[Path], Encoded] | None = None
    """Reads rows that can be mixed in, where some can."""

    @property
    def task_type(self) -> str | None:
        """Return the task by PEFT's name; None if it has none."""
        return PEFT_TASKS[self.task]


def objective(
    recipe: TuneRecipe, config: Any, train: Path, tokenizer: Any, checkpoint: Path
) -> Objective:
    """Return what a recipe trains for; `tokenizer` gets the marks that it lacks for it.

    Raises InputError for a model that can't do it.
    """
    task = task_of(recipe, config.to_dict(), train)
    data, pad = recipe.data, pad_of(config, tokenizer)
    length = _length(recipe, config)
    in_front = [d.type for d in recipe.deltas if d.type in ("prompt", "p_tuning")]
    if task == "sequence_classification" and in_front and models.task(config) == "generate":
        raise RecipeError(
            f"deltas: a decoder with `{in_front[0]}` in front doesn't find a text's last token",
            hint="take prefix, or any delta inside the model",
        )
    if task in ("sequence_classification", "token_classification"):
        labels = data.labels or labelled.labels_of(train)
        read = labelled.encode_texts if task.startswith("seq") else labelled.encode_words
        collate: Any = Labelled(pad)
        return Objective(
            task,
            Head(task, tuple(labels)),
            lambda path: read(path, tokenizer, labels, max_length=length),
            collate,
            collate,
            partial(label_loss, temperature=recipe.temperature),
            partial(_labels, classes=len(labels)),
            pad,
            length,
        )
    generates = models.task(config) == "generate"
    wanted = "encoder-decoder" if task == "seq2seq_lm" else "decoder"
    if task == "masked_lm":
        if generates:
            raise InputError(f"a {config.model_type} fills no gaps", hint="task: causal_lm")
        if tokenizer.mask_token_id is None:
            raise InputError("the model's tokenizer has no mask token to fill in for")
        vocabulary = config.get_text_config().vocab_size
        gaps = partial(Gaps, pad, tokenizer.mask_token_id, vocabulary)
        return Objective(
            task,
            Head(task),
            lambda path: halves.encode_plain(path, tokenizer, max_length=length),
            gaps(seed=recipe.seed),
            gaps(seed=DEV_SEED),
            label_loss,
            _gaps,
            pad,
            length,
        )
    if not generates or config.is_encoder_decoder != (task == "seq2seq_lm"):
        raise InputError(f"task: {task} wants a model that is a {wanted}")
    if task == "seq2seq_lm":
        start = models.behind_start(config, torch.zeros(1, 0, dtype=torch.long))
        both: Any = Halves(pad, int(start[0, 0]))
        return Objective(
            task,
            None,
            lambda path: halves.encode_halves(path, tokenizer, max_length=length),
            both,
            both,
            label_loss,
            _gaps,
            pad,
            length,
        )
    if data.format == "chat" and tokenizer.chat_template is None:
        raise InputError("the model has no chat template", hint="set data.format to raw or auto")
    raw, plain = data.format == "raw", Padding(pad)
    if task == "duplex":
        marks = duplex.marked(recipe, checkpoint, tokenizer)
        form = duplex.form(recipe, marks)
        return Objective(
            task,
            None,
            lambda path: encode_dialogues(path, tokenizer, form, max_length=length),
            Padding(pad, ("weights",), SHAPES, length),
            Padding(pad, ("weights", "decisions")),
            next_token_loss,
            duplex.Measured(marks.layout.silent),
            pad,
            length,
            marks,
            lambda path: weighed(encode_file(path, tokenizer, max_length=length, raw=raw)),
        )
    if task == "preference":
        pairs = Pairs(pad)
        return Objective(
            task,
            None,
            lambda path: encode_pairs(path, tokenizer, max_length=length, raw=raw),
            pairs,
            pairs,
            partial(preference_loss, beta=recipe.beta),
            partial(_pairs, beta=recipe.beta),
            pad,
            length,
        )
    return Objective(
        task,
        None,
        lambda path: encode_file(path, tokenizer, max_length=length, raw=raw),
        plain,
        plain,
        next_token_loss,
        _next,
        pad,
        length,
    )


SHAPES = 16
"""Of what the length of a batch of dialogues is a multiple: they are of many lengths."""


def _length(recipe: TuneRecipe, config: Any) -> int:
    """Return how many tokens of a row the model reads, beside those that deltas put in front.

    Raises RecipeError if none are left.
    """
    front = sum(int(getattr(d, "num_virtual_tokens", 0)) for d in recipe.deltas)
    context = models.context(config.get_text_config())
    length = min(recipe.data.max_length, (context or 2**31) - front)
    if length < 2:
        raise RecipeError(f"num_virtual_tokens: the model reads {context} tokens in all")
    return length


def _next(model: Any, batches: Sequence[Batch], device: torch.device) -> dict[str, float]:
    return {"dev_loss": mean_loss(model, list(batches), device)}


def _gaps(model: Any, batches: Sequence[Batch], device: torch.device) -> dict[str, float]:
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            loss, places = label_loss(model, {k: v.to(device) for k, v in batch.items()})
            total, count = total + float(loss), count + places
    return {"dev_loss": total / max(count, 1)}


def _labels(
    model: Any, batches: Sequence[Batch], device: torch.device, *, classes: int
) -> dict[str, float]:
    return label_figures(model, batches, device, classes)


def _pairs(
    model: Any, batches: Sequence[Batch], device: torch.device, *, beta: float
) -> dict[str, float]:
    return preference_figures(model, batches, device, beta)


def batches_of(
    encoded: Encoded, collate: Callable[[Sequence[Example]], Batch], size: int
) -> list[Batch]:
    """Return all examples in batches of like lengths."""
    found = sorted(encoded.examples, key=lambda e: len(e["input_ids"]))
    return [collate(found[i : i + size]) for i in range(0, len(found), size)]
