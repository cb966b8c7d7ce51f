"""Distillation: a student learns what its teacher said behind each token of some texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bmkit import model as models
from bmkit.compress.corpus import Text
from bmkit.compress.layerwise import ZEROS
from bmkit.compress.options.learning import Distill
from bmkit.errors import InputError, RecipeError
from bmkit.report import Reporter, task
from bmkit.runtime import experts
from bmkit.runtime.experts import Experts
from bmkit.runtime.voice import Voice
from bmkit.train.distil import has_plain_head, likeliest, teaching_loss
from bmkit.train.trainer import train

TEXTS = 128
"""Texts whose lessons are in one file."""
HELD_OUT = 24
"""Texts that are not trained on, at most: how often student and teacher agree is told of those."""


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
            found.append(Lesson(text.ids, text.first, _among(tokens, said), logprobs, tokens[:, 0]))
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
                scratch = file.with_suffix(".partial")
                save_file({name: torch.cat(rows) for name, rows in whole.items()}, scratch)
                scratch.replace(file)
            else:
                bar.advance(len(part))
            kept = load_file(file)
            at = 0
            for text in part:
                places = len(text.ids) - text.first
                tokens, logprobs = (kept[name][at : at + places] for name in ("tokens", "logprobs"))
                at += places
                found.append(
                    Lesson(text.ids, text.first, _among(tokens, said), logprobs, tokens[:, 0])
                )
    return found


def _among(tokens: Tensor, said: Sequence[int] | None) -> Tensor:
    """Return the numbers of `tokens` among the ascending `said`, -1 for others."""
    if said is None:
        return tokens
    known = torch.tensor(said, dtype=torch.int32)
    at = torch.searchsorted(known, tokens).clamp_max(len(known) - 1)
    return torch.where(known[at] == tokens, at.int(), torch.full_like(tokens, -1))


def collate(lessons: Sequence[Any]) -> dict[str, Tensor]:
    """Put examples of `input_ids` and a `lesson` together, padded on the right."""
    longest = max(len(e["input_ids"]) for e in lessons)
    ids = torch.zeros(len(lessons), longest, dtype=torch.long)
    mask = torch.zeros(len(lessons), longest, dtype=torch.long)
    labels = torch.full((len(lessons), longest + 1), -100)  # for the trainer, which counts them
    places, tokens, logprobs = [], [], []
    for row, example in enumerate(lessons):
        lesson: Lesson = example["lesson"]
        size = len(example["input_ids"])
        ids[row, :size] = torch.tensor(example["input_ids"])
        mask[row, :size] = 1
        labels[row, lesson.first : len(lesson.ids)] = 0
        where = torch.arange(lesson.first - 1, len(lesson.ids) - 1)
        places.append(torch.stack((torch.full_like(where, row), where), 1))
        tokens.append(lesson.tokens)
        logprobs.append(lesson.logprobs)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "places": torch.cat(places),
        "tokens": torch.cat(tokens),
        "logprobs": torch.cat(logprobs),
    }


def train_student(
    path: Path,
    taught: Sequence[Lesson],
    step: Distill,
    *,
    rows: Sequence[int] | None,
    seed: int,
    work: Path,
    device: torch.device,
    reporter: Reporter,
) -> Student:
    """Train the checkpoint at `path` in float32; return it with what was measured.

    One that is divided into experts computes by them while it learns: neurons that aren't computed
    for a token learn nothing from it.

    Raises RecipeError for modules that aren't there, DivergedError as `train` does.
    """
    student = models.load_model(path, device=device, dtype="float32")
    student.requires_grad_(True)
    for pattern in step.freeze:
        modules = [
            m for n, m in student.named_modules() if n == pattern or n.endswith(f".{pattern}")
        ]
        if not modules:
            raise RecipeError(f"freeze: no module's name ends in `{pattern}`")
        for module in modules:
            module.requires_grad_(False)
    if pruned := keep_zeros(student):
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
    held = min(HELD_OUT, len(taught) // 8)
    dev, rest = list(taught[:held]), list(taught[held:])
    if not rest or not dev:
        raise InputError(f"{len(taught)} texts are too few to learn from", hint="raise data.tokens")
    among = None if rows is None else torch.tensor(list(rows), device=device)
    before = agreement(student, dev, among)
    examples = [{"input_ids": lesson.ids[:-1], "lesson": lesson} for lesson in rest]

    plain = has_plain_head(student)

    def loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return teaching_loss(model, batch, temperature=step.temperature, rows=among, plain=plain)

    trained = train(
        student,
        examples,  # type: ignore[arg-type]
        collate,
        step.train,
        seed=seed,
        work=work,
        device=device,
        reporter=reporter,
        loss=loss,
    )
    after = agreement(student, dev, among)
    reporter.info(f"agrees with its teacher on {before:.1%} of tokens before, {after:.1%} after")
    metrics: dict[str, float | int | str] = {
        "train_loss": round(trained.losses[-1] if trained.losses else 0.0, 6),
        "steps": trained.steps,
        "texts": len(rest),
        "agreement_before": round(before, 6),
        "agreement": round(after, 6),
    }
    return Student(student, metrics, None if attached is None else attached.detach())


def keep_zeros(student: nn.Module) -> int:
    """Let no weight that is zero in a pruned matrix learn; return how many matrices are pruned.

    A matrix counts as pruned from a tenth of zeros on. What has no gradient stays zero under AdamW,
    weight decay included.
    """
    count = 0
    for parameter in student.parameters():
        kept = parameter.detach() != 0
        if parameter.ndim < 2 or not parameter.requires_grad or kept.float().mean() > 1 - ZEROS:
            continue

        def mask(grad: Tensor, kept: Tensor = kept) -> Tensor:
            return grad * kept

        parameter.register_hook(mask)  # type: ignore[no-untyped-call]
        count += 1
    return count


@torch.no_grad()
def agreement(student: Any, taught: Sequence[Lesson], rows: Tensor | None) -> float:
    """Return how often the student's likeliest token is the teacher's."""
    student.eval()
    right = whole = 0
    for lesson in taught:
        ids = torch.tensor([lesson.ids[:-1]], device=student.device)
        logits = student(input_ids=ids, use_cache=False).logits[0, lesson.first - 1 :]
        said = logits.argmax(-1) if rows is None else rows[logits[:, rows].argmax(-1)]
        right += int((said.cpu() == lesson.chosen).sum())
        whole += len(lesson.chosen)
    student.train()
    return right / max(whole, 1)
