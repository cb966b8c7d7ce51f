"""Train."""

from __future__ import annotations

from bmkit import model
from bmkit.compress import distill as teaching
from bmkit.compress.options.learning import Distill
from bmkit.compress.work import Metrics, Work
from bmkit.runtime import experts
from bmkit.runtime.frequent import read as read_frequent


def distill(work: Work, step: Distill) -> Metrics:
    """Train the model as it is by now to say what the one at the beginning says."""
    shared, config = work.shared, model.load_config(work.source)
    tokens = read_frequent(work.source, config.get_text_config().vocab_size)
    taught = teaching.lessons(
        shared.voice,
        shared.texts,
        step.likeliest,
        tokens,
        work.folder / "lessons",
        reporter=work.job.reporter,
    )
    shared.forget()
    student = teaching.train_student(
        work.source,
        taught,
        step,
        rows=tokens,
        seed=shared.recipe.seed,
        work=work.folder / "training",
        device=shared.device,
        reporter=work.job.reporter,
    )
    model.save(student.model, work.source, work.out)
    if student.experts is not None:
        experts.write(work.out, student.experts)
    return student.metrics
