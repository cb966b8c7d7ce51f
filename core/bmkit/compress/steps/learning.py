"""Train."""

from __future__ import annotations

from pathlib import Path

from bmkit import env, model
from bmkit.compress import corpus, hints
from bmkit.compress import distill as teaching
from bmkit.compress.options.learning import Distill
from bmkit.compress.options.rounding import Quantize
from bmkit.compress.qat import Rounding
from bmkit.compress.work import Metrics, Work
from bmkit.errors import InputError, ResourceError
from bmkit.runtime.frequent import read as read_frequent
from bmkit.runtime.voice import Voice


def distill(work: Work, step: Distill) -> Metrics:
    """Train the model as it is by now to say what its teacher says."""
    shared, config = work.shared, model.load_config(work.source)
    tokens = read_frequent(work.source, config.get_text_config().vocab_size)
    texts = shared.texts
    memory = env.parse_bytes(step.teacher_memory) if step.teacher_memory else None
    other = work.job.models.get(f"steps.{work.number}.teacher")
    teacher = other.path if other else work.job.checkpoint
    if other or step.teacher_quant or memory is not None:
        _same_vocabulary(teacher, work.job.checkpoint)
        shared.forget()
        texts = [corpus.Text(t.ids, t.first) for t in texts]  # another one has said them
        try:
            voice = Voice(
                teacher,
                device=shared.device,
                dtype=shared.recipe.dtype,
                rows=8,
                reporter=work.job.reporter,
                quant=step.teacher_quant,
                memory=memory,
            )
        except ResourceError as exc:
            where = "teacher_memory" if memory is not None else "teacher"
            raise ResourceError(f"{where}: {exc}", hint=exc.hint) from None
    else:
        voice = shared.voice
    taught = teaching.lessons(
        voice,
        texts,
        step.likeliest,
        tokens,
        work.folder / "lessons",
        reporter=work.job.reporter,
    )
    del voice
    shared.forget()
    student, metrics = teaching.train_student(
        work.source,
        teaching.Class(
            taught,
            tokens,
            rounding=_rounding(work, step),
            hints=hints.of_step(
                step, teacher, device=shared.device, memory=memory, seed=shared.recipe.seed
            ),
        ),
        step,
        seed=shared.recipe.seed,
        work=work.folder / "training",
        device=shared.device,
        reporter=work.job.reporter,
    )
    model.save(student, work.source, work.out)
    return metrics


def _rounding(work: Work, step: Distill) -> Rounding | None:
    """Return how the step behind this one rounds, if weights are trained for that."""
    if not step.qat:
        return None
    export = work.shared.recipe.steps[work.number + 1]
    assert isinstance(export, Quantize)  # the recipe was checked
    return Rounding(work.source, export, step.activations)


def _same_vocabulary(teacher: Path, student: Path) -> None:
    """Raise InputError if two models don't mean the same by a token's number."""
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
