"""Ordinary tasks of a job's model and of the one that it was, before it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bmkit import builtin, report
from bmkit import model as models
from bmkit.data.chat import Encoded, encode_file
from bmkit.deltas import plugged
from bmkit.duplex.opening import with_tokenizer
from bmkit.duplex.ordinary import Question, chat_loss, choice_accuracy, read_questions
from bmkit.duplex.trained import known_of
from bmkit.plan import Job
from bmkit.runtime.adapters import adapters_of

CHATS, QUESTIONS = "data/instructions-dev.jsonl", "data/duplex-questions.jsonl"
MAX_TOKENS = 1024


def measure(job: Job) -> dict[str, float]:
    """Return the loss on chats and the accuracy on questions, before, after, and their change.

    A delta's base is what was before; a model's is named by `eval.before`. One model is in memory
    at a time.
    """
    folder = builtin.directory()
    _, trained = known_of(job)
    tokenizer = models.load_tokenizer(with_tokenizer(trained, job.checkpoint))
    chats = job.files.get("eval.chats") or folder / CHATS
    encoded = encode_file(chats, tokenizer, max_length=MAX_TOKENS, raw=False)
    questions = read_questions(job.files.get("eval.questions") or folder / QUESTIONS)
    before = job.models["eval.before"].path if "eval.before" in job.models else job.checkpoint
    found: dict[str, float] = {}
    total = 2 * (len(encoded.examples) + len(questions))
    with report.task(job.reporter, "ordinary tasks", total, "rows") as bar:
        for when in ("before", "after"):
            model = _load(job, before if when == "before" else job.checkpoint, when)
            found |= _figures(model, tokenizer, encoded, questions, when, bar)
            del model
    loss = found["retain_loss_after"] / found["retain_loss_before"] - 1
    gained = found["retain_accuracy_after"] - found["retain_accuracy_before"]
    return found | {"retain_loss_change": loss, "retain_accuracy_change": gained}


def _load(job: Job, path: Path, when: str) -> Any:
    device = models.pick_device(job.recipe.device)
    model = models.load_model(path, device=device, dtype=job.recipe.dtype)
    if when == "after":
        asked_for = adapters_of(job)
        model = plugged.load(model, asked_for.folders, asked_for.wholes)
    return model.eval()


def _figures(
    model: Any,
    tokenizer: Any,
    encoded: Encoded,
    questions: list[Question],
    when: str,
    bar: report.Task,
) -> dict[str, float]:
    loss = chat_loss(model, encoded, bar.advance)
    accuracy = choice_accuracy(model, tokenizer, questions)
    bar.advance(len(questions))
    return {f"retain_loss_{when}": loss, f"retain_accuracy_{when}": accuracy}
