"""Distillation: a student learns what its teacher said behind each token of some texts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bmkit import model as models
from bmkit.compress import calibrate
from bmkit.compress.hints import Hints
from bmkit.compress.options.learning import Distill
from bmkit.compress.qat import Rounding
from bmkit.errors import InputError, RecipeError
from bmkit.model import save_tensors
from bmkit.nn.zeros import keep_zeros
from bmkit.report import Reporter, task
from bmkit.runtime import experts
from bmkit.runtime.experts import Experts
from bmkit.runtime.voice import Voice
from bmkit.train.corpus import Text
from bmkit.train.distil import Aim, has_plain_head, likeliest, teaching_loss
from bmkit.train.trainer import train

TEXTS = 128
"""Texts whose lessons are in one file."""


@dataclass(frozen=True)
class Lesson:
    """A text, and the teacher's likeliest tokens behind each of its last places."""

    ids: list[int]
    first: int
    tokens: Tensor
    """int32 [places, k]; -1 for what the student's head can't say."""
    logprobs: Tensor
    """float16 [places, k]."""
    chosen: Tensor
    """int32 [places]: the teacher's likeliest, whatever the head can say."""
    said: Tensor
    """int32 [places]: the text's own tokens there; -1 for what the student's head can't say."""


@dataclass(frozen=True)
class Student:
    """A trained model."""

    model: Any
    metrics: dict[str, float | int | str]
    experts: Experts | None
    """How it is divided, with its routers as they are by now."""


def lessons(
    voice: Voice,
    texts: Sequence[Text],
    count: int,
    said: Sequence[int] | None,
    folder: Path,
    *,
    reporter: Reporter,
) -> list[Lesson]:
    """Let the teacher read texts, and keep its `count` likeliest tokens behind each place.

    They are numbers among `said`, if that is given. Files in `folder` hold what was done; a stopped
    run goes on from them. What the teacher has said itself it needn't read again.
    """
    found: list[Lesson] = []
    if all(t.taught is not None for t in texts):
        for text in texts:
            assert text.taught is not None  # as we have seen
            tokens, logprobs = text.taught.tokens[:, :count], text.taught.logprobs[:, :count]
            found.append(_lesson(text, tokens, logprobs, said))
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with task(reporter, "the teacher reads", len(texts), "texts") as bar:
        for low in range(0, len(texts), TEXTS):
            part = texts[low : low + TEXTS]
            file = folder / f"{low // TEXTS:05}.safetensors"
            if not file.is_file():
                whole: dict[str, list[Tensor]] = {"tokens": [], "logprobs": []}
                for text in part:
                    for logits in voice.logits(text.ids[:-1], text.first - 1):
                        taught = likeliest(logits, count)
                        whole["tokens"].append(taught.tokens.cpu())
                        whole["logprobs"].append(taught.logprobs.cpu())
                    bar.advance()
                save_tensors(file, {name: torch.cat(rows) for name, rows in whole.items()})
            else:
                bar.advance(len(part))
            kept = load_file(file)
            at = 0
            for text in part:
                places = len(text.ids) - text.first
                tokens, logprobs = (kept[name][at : at + places] for name in ("tokens", "logprobs"))
                at += places
                found.append(_lesson(text, tokens, logprobs, said))
    return found


def _lesson(text: Text, tokens: Tensor, logprobs: Tensor, said: Sequence[int] | None) -> Lesson:
    """Return a lesson of the teacher's likeliest tokens, by their numbers in the vocabulary."""
    own = torch.tensor(text.ids[text.first :], dtype=torch.int32)
    known = _among(tokens, said)
    return Lesson(text.ids, text.first, known, logprobs, tokens[:, 0], _among(own, said))


def _among(tokens: Tensor, said: Sequence[int] | None) -> Tensor:
    """Return the numbers of `tokens` among the ascending `said`, -1 for others."""
    if said is None:
        return tokens
    known = torch.tensor(said, dtype=torch.int32)
    at = torch.searchsorted(known, tokens).clamp_max(len(known) - 1)
    return torch.where(known[at] == tokens, at.int(), torch.full_like(tokens, -1))


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return rows of token ids padded on the right, and where they aren't."""
    ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask


def collate(lessons: Sequence[Any], config: Any = None) -> dict[str, Tensor]:
    """Put examples of `input_ids` and a `lesson` together, padded on the right.

    With the `config` of an encoder-decoder, its encoder gets what comes first in the lessons' ids,
    its decoder what is to be said, one token late.
    """
    halves = config is not None and config.is_encoder_decoder
    given: list[Lesson] = [e["lesson"] for e in lessons]
    if halves:
        ids, mask = _padded([x.ids[: x.first] for x in given])
        late = models.behind_start(config, _padded([x.ids[x.first : -1] for x in given])[0])
        batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": late}
    else:
        ids, mask = _padded([e["input_ids"] for e in lessons])
        batch = {"input_ids": ids, "attention_mask": mask}
    longest = max(len(x.ids) for x in given)
    labels = torch.full((len(given), longest), -100)  # for the trainer, which counts them
    places, tokens, logprobs, said = [], [], [], []
    for row, lesson in enumerate(given):
        labels[row, lesson.first : len(lesson.ids)] = 0
        where = torch.arange(len(lesson.ids) - lesson.first)
        if not halves:
            where += lesson.first - 1
        places.append(torch.stack((torch.full_like(where, row), where), 1))
        tokens.append(lesson.tokens)
        logprobs.append(lesson.logprobs)
        said.append(lesson.said)
    return batch | {
        "labels": labels,
        "places": torch.cat(places),
        "tokens": torch.cat(tokens),
        "logprobs": torch.cat(logprobs),
        "said": torch.cat(said),
    }


@dataclass(frozen=True)
class Curriculum:
    """What a student is taught with."""

    taught: Sequence[Lesson]
    rows: Sequence[int] | None
    """The tokens that its head can say; None: all."""
    rounding: Rounding | None = None
    """How its weights are rounded in the forward pass, if they are."""
    hints: Hints | None = None
    """What its layers learn, if they do."""


def train_student(
    path: Path,
    lesson: Curriculum,
    step: Distill,
    *,
    seed: int,
    work: Path,
    device: torch.device,
    reporter: Reporter,
) -> Student:
    """Train the checkpoint at `path` in float32; return it with what was measured.

    What comes back is in float32, but as exact as the checkpoint's dtype. One that is divided into
    experts computes by them while it learns: neurons that aren't computed for a token learn nothing
    from it. Raises RecipeError for modules that aren't there, DivergedError as `train` does.
    """
    student = models.load_model(path, device=device, dtype="float32")
    student.requires_grad_(True)
    _freeze(student, step.freeze)
    if pruned := keep_zeros(student.parameters()):
        reporter.info(f"{pruned} matrices were pruned: their zeros stay")
    divided = experts.read(path)
    if step.train_routers and divided is None:
        raise RecipeError(
            "train_routers: there are no routers", hint="put `moefy` before `distill`"
        )
    attached = (
        None if divided is None else experts.attach(student, divided, learns=step.train_routers)
    )
    if not any(p.requires_grad for p in student.parameters()):
        raise RecipeError("freeze: nothing is left to train")
    apart = set(calibrate.dev_of(len(lesson.taught)))
    dev: list[Lesson] = []
    rest: list[Lesson] = []
    for i, one in enumerate(lesson.taught):
        (dev if i in apart else rest).append(one)
    if not rest or not dev:
        count = len(lesson.taught)
        raise InputError(
            f"{count} texts are too few to learn from",
            hint="raise data.tokens, or name a file of more texts",
        )
    among = None if lesson.rows is None else torch.tensor(list(lesson.rows), device=device)
    # A head that can say all tokens learns how often it is none of the likeliest.
    others = among is None
    aim = Aim(step.temperature, step.loss == "reverse_kl", step.label_weight, others)
    plain = has_plain_head(student)
    with ExitStack() as stack:
        if lesson.rounding is not None:
            stack.enter_context(lesson.rounding.of(student))
        before = agreement(student, dev, among)
        given = None if lesson.hints is None else stack.enter_context(lesson.hints.for_(student))

        def loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
            found, count = teaching_loss(model, batch, aim=aim, rows=among, plain=plain)
            return found if given is None else found + count * given(batch), count

        examples: list[Any] = [{"input_ids": one.ids[:-1], "lesson": one} for one in rest]
        trained = train(
            student,
            examples,
            partial(collate, config=student.config),
            step.train,
            seed=seed,
            work=work,
            device=device,
            reporter=reporter,
            loss=loss,
        )
        settle(student, models.stored_dtype(models.load_config(path)))
        after = agreement(student, dev, among)
        if after < before:
            reporter.warn(
                f"the student agrees less with its teacher than before, {after:.1%} of places "
                f"after {before:.1%}: lower train.learning_rate"
            )
    reporter.info(f"agrees with its teacher on {before:.1%} of tokens before, {after:.1%} after")
    metrics: dict[str, float | int | str] = {
        "train_loss": round(trained.losses[-1] if trained.losses else 0.0, 6),
        "steps": trained.steps,
        "texts": len(rest),
        "agreement_before": round(before, 6),
        "agreement": round(after, 6),
    }
    return Student(student, metrics, None if attached is None else attached.detach())


def _freeze(student: nn.Module, patterns: Sequence[str]) -> None:
    """Let modules whose names end in one of `patterns` not learn."""
    for pattern in patterns:
        modules = [
            m for n, m in student.named_modules() if n == pattern or n.endswith(f".{pattern}")
        ]
        if not modules:
            raise RecipeError(f"freeze: no module's name ends in `{pattern}`")
        for module in modules:
            module.requires_grad_(False)


@torch.no_grad()
def settle(student: nn.Module, stored: torch.dtype) -> None:
    """Round parameters to the dtype that they are written in: what is measured is what is kept."""
    for parameter in student.parameters():
        parameter.copy_(parameter.to(stored))


@torch.no_grad()
def agreement(student: Any, taught: Sequence[Lesson], rows: Tensor | None) -> float:
    """Return how often the student's likeliest token is the teacher's."""
    student.eval()
    right = whole = 0
    for lesson in taught:
        example = {"input_ids": lesson.ids[:-1], "lesson": lesson}
        batch = {n: v.to(student.device) for n, v in collate([example], student.config).items()}
        names = {"input_ids", "decoder_input_ids"} & batch.keys()
        logits = student(**{n: batch[n] for n in names}, use_cache=False).logits
        logits = logits[batch["places"][:, 0], batch["places"][:, 1]]
        said = logits.argmax(-1) if rows is None else rows[logits[:, rows].argmax(-1)]
        right += int((said.cpu() == lesson.chosen).sum())
        whole += len(lesson.chosen)
    student.train()
    return right / max(whole, 1)
