"""Train."""

from __future__ import annotations

from pathlib import Path

from bmkit import env, model
from bmkit.compress import distill as teaching
from bmkit.compress import hints
from bmkit.compress.options.learning import Distill
from bmkit.compress.options.rounding import Quantize
from bmkit.compress.qat import Rounding
from bmkit.compress.work import Metrics, Work
from bmkit.errors import InputError, ResourceError
from bmkit.runtime import experts
from bmkit.runtime.frequent import read as read_frequent
from bmkit.runtime.voice import Voice
from bmkit.train import corpus


def distill(work: Work, step: Distill) -> Metrics:
    """Train the model as it is by now to say what its teacher says."""
    shared, config = work.shared, model.load_config(work.source)
    if not shared.judges:
        kind = (getattr(config, "architectures", None) or [config.model_type])[0]
        raise InputError(
            f"{kind} says no next token, which is what `distill` teaches",
            hint="take a model that does, or methods that round weights or set them to zero",
        )
    tokens = read_frequent(work.source, config.get_text_config().vocab_size)
    memory = env.parse_bytes(step.teacher_memory) if step.teacher_memory else None
    taught = _taught(work, step, tokens, memory)
    beside = hints.of_step(
        step, _teacher(work), device=shared.device, memory=memory, seed=shared.recipe.seed
    )
    student = teaching.train_student(
        work.source,
        teaching.Curriculum(taught, tokens, _rounding(work, step), beside),
        step,
        seed=shared.recipe.seed,
        work=work.folder / "training",
        device=shared.device,
        reporter=work.job.reporter,
    )
    model.save(student.model, work.source, work.out)
    if student.experts is not None:
        experts.write(work.out, student.experts)
    return student.metrics


def _teacher(work: Work) -> Path:
    other = work.job.models.get(f"steps.{work.number}.teacher")
    return other.path if other else work.job.checkpoint


def _taught(
    work: Work, step: Distill, tokens: list[int] | None, memory: int | None
) -> list[teaching.Lesson]:
    """Let the teacher read the texts, and forget it."""
    shared, teacher, reporter = work.shared, _teacher(work), work.job.reporter
    _same_vocabulary(teacher, shared.job.checkpoint)
    texts, folder = shared.texts, work.folder / "lessons"
    if teacher == shared.job.checkpoint and not step.teacher_quant and memory is None:
        found = teaching.lessons(
            shared.voice, texts, step.likeliest, tokens, folder, reporter=reporter
        )
        shared.forget()
        return found
    shared.forget()
    unsaid = [corpus.Text(t.ids, t.first) for t in texts]  # another one has said them
    try:
        voice = Voice(
            teacher,
            device=shared.device,
            dtype=shared.recipe.dtype,
            rows=8,
            reporter=reporter,
            quant=step.teacher_quant,
            memory=memory,
        )
    except ResourceError as exc:
        where = "teacher" if memory is None else "teacher_memory"
        raise ResourceError(f"{where}: {exc}", hint=exc.hint) from None
    return teaching.lessons(voice, unsaid, step.likeliest, tokens, folder, reporter=reporter)


def _rounding(work: Work, step: Distill) -> Rounding | None:
    """Return how the step behind this one rounds, if weights are trained for that."""
    if not step.qat:
        return None
    export = work.shared.recipe.steps[work.number + 1]
    assert isinstance(export, Quantize)  # the recipe was checked
    return Rounding(work.source, export, step.activations)


def _same_vocabulary(teacher: Path, student: Path) -> None:
    """Raise InputError if two models don't mean the same by a token's number."""
    if teacher == student:
        return
    sizes = [model.load_config(p).get_text_config().vocab_size for p in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the teacher {teacher} has a vocabulary of {sizes[0]} tokens, {student} one of "
            f"{sizes[1]}",
            hint="name a teacher of the same family",
        )
    words = [model.load_tokenizer(p).get_vocab() for p in (teacher, student)]
    if words[0] != words[1]:
        number = sum(words[0].get(word) != i for word, i in words[1].items())
        raise InputError(
            f"the teacher {teacher} has another vocabulary than {student}: {number} of "
            f"{len(words[1])} tokens have no number or another one there",
            hint="name a teacher of the same family",
        )
