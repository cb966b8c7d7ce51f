"""What a model knows: the likeliest words at a mask, and the place of the right one among them.

As LAMA does (arXiv 1909.01066) over the vocabulary, for objects of one token; or over candidates
of any number of tokens, by their likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bmkit import report
from bmkit.data.tabular import Record
from bmkit.errors import InputError, did_you_mean
from bmkit.plan import Job, Outcome
from bmkit.prompt import masks, stored, training
from bmkit.prompt.ask import Asker, Question
from bmkit.prompt.opening import Opened, open_model
from bmkit.prompt.ready import Ready
from bmkit.prompting import labelwords
from bmkit.prompting.encode import Encoded
from bmkit.prompting.labelwords import Word
from bmkit.verbalizers import ranks as places

OBJECT, RELATION = "object", "relation"


@dataclass(frozen=True)
class Probe:
    """What may be the answer."""

    candidates: tuple[Word, ...] = ()
    """Without any, each token of the vocabulary."""
    combine: Literal["sum", "mean"] = "mean"

    @property
    def question(self) -> Question:
        """Return what is asked about candidates."""
        return Question([word.ids for word in self.candidates], self.combine, behind=True)

    def ask(
        self,
        asker: Asker,
        prompts: Sequence[Encoded],
        done: Callable[[int], None] | None = None,
        *,
        take: Callable[[Tensor, list[int]], Tensor] = lambda said, _: said,
    ) -> Tensor:
        """Return what `take` makes of log-probabilities of answers [part, answers] and their rows.

        Parts are batches, so that those of all rows are never in memory together.
        """
        numbers = {id(prompt): at for at, prompt in enumerate(prompts)}

        def ask(part: list[Encoded]) -> Tensor:
            said = self._logprobs(asker, part)
            return take(said, [numbers[id(prompt)] for prompt in part])

        return asker.each(prompts, ask, done)

    def _logprobs(self, asker: Asker, part: Sequence[Encoded]) -> Tensor:
        if self.candidates:
            return asker.score(part, self.question).float().log_softmax(-1)
        return masks.logits(asker.model, part, asker.kind).float().log_softmax(-1)


def candidates(ready: Ready) -> tuple[Word, ...]:
    """Return a recipe's candidates, each once. Raises InputError for one without tokens."""
    spec = ready.recipe.probing
    texts = spec.candidates or []
    if (file := ready.job.files.get("probing.candidates_file")) is not None:
        texts = _lines(file)
    found: dict[tuple[int, ...], Word] = {}
    for text in texts:
        word = labelwords.word(text, ready.tokenizer, spec.prefix)
        found.setdefault(word.ids, word)
    if texts and len(found) < 2:
        raise InputError("probing: there is one candidate only: nothing to choose from")
    return tuple(found.values())


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"{path} can't be read as UTF-8 text: {exc}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def object_of(record: Record) -> str:
    """Return a row's object. Raises InputError naming the row."""
    held = record.values.get(OBJECT)
    if isinstance(held, str) and held.strip():
        return held.strip()
    there = ", ".join(f"`{name}`" for name in record.values)
    what = "it has no" if held is None else "there is no text in its"
    raise InputError(
        f"{record.where}: {what} `{OBJECT}`",
        hint=f"data.columns says which column it is, of {there}",
    )


def run(job: Job) -> Outcome:
    """Ask the recipe's rows for their objects, measure, and write the prompt into `job.out`.

    Peak memory: the dense model in the compute dtype, and a batch's logits at masks.
    """
    ready = Ready(job)
    probe = Probe(candidates(ready), ready.recipe.probing.combine)
    held = {n: _Held.of(ready, probe, split.records) for n, split in ready.splits.items()}
    encoded = {name: ready.prompts.encode(own.records) for name, own in held.items()}
    if not probe.candidates and any(p.behind for own in encoded.values() for p in own):
        job.reporter.warn("the model doesn't read what is behind the mask: candidates do")
    size = ready.recipe.train.per_device_eval_batch_size
    opened = open_model(
        job, ready.kind, ready.tokenizer, size, ready.recipe.template.max_seq_length
    )
    training.attach(job, ready, opened.asker, ready.recipe.seed)
    metrics, table = _measured(job, opened, probe, held, encoded)
    kept = [{"text": word.text, "ids": list(word.ids)} for word in probe.candidates]
    trained = training.write(ready, opened.asker, None, job.out)
    opened.close()
    stored.write(job.out, ready.kept(None, candidates=kept, **trained))
    return Outcome("prompt", metrics, ("bmkit",), table=table)


@dataclass(frozen=True)
class _Held:
    """The rows of a split that can be asked, and the number of each one's object."""

    records: list[Record]
    right: list[int]
    left_out: int

    @classmethod
    def of(cls, ready: Ready, probe: Probe, records: Sequence[Record]) -> _Held:
        """Leave out rows whose object is several tokens, where the vocabulary is asked."""
        found = list(_numbered(ready, probe, records))
        kept = [(record, number) for record, number in found if number is not None]
        if not kept:
            raise InputError(
                f"{records[0].where}: its object is several tokens, and so are all others",
                hint="give probing.candidates",
            )
        return cls([r for r, _ in kept], [n for _, n in kept], len(found) - len(kept))


def _numbered(
    ready: Ready, probe: Probe, records: Sequence[Record]
) -> Iterator[tuple[Record, int | None]]:
    known = {word.ids: number for number, word in enumerate(probe.candidates)}
    texts = [word.text.strip() for word in probe.candidates]
    for record in records:
        text = object_of(record)
        try:
            ids = labelwords.word(text, ready.tokenizer, ready.recipe.probing.prefix).ids
        except InputError as exc:
            raise InputError(f"{record.where}: {exc}", hint=exc.hint) from None
        if not known:
            yield record, ids[0] if len(ids) == 1 else None
        elif ids in known:
            yield record, known[ids]
        else:
            raise InputError(
                f"{record.where}: `{text}` is none of the candidates",
                hint=did_you_mean(text, texts, otherwise="add it to probing.candidates"),
            )


def _measured(
    job: Job,
    opened: Opened,
    probe: Probe,
    held: dict[str, _Held],
    encoded: dict[str, list[Encoded]],
) -> tuple[dict[str, Any], list[dict[str, float | int | str]]]:
    metrics: dict[str, Any] = {}
    table: list[dict[str, float | int | str]] = []
    measured = {name: own for name, own in held.items() if name != "train" or len(held) == 1}
    total = sum(len(own.right) for own in measured.values())
    with report.task(job.reporter, "prompt", total, "rows") as bar:
        for name, own in measured.items():
            found = _places(opened.asker, probe, encoded[name], own.right, bar.advance)
            prefix = "" if name == "test" else f"{name}_"
            figures = {**places.measure(found), "rows": len(found), "rows_left_out": own.left_out}
            metrics |= {f"{prefix}{figure}": value for figure, value in figures.items()}
            table += _by_relation(name, own, found)
            if own.left_out:
                job.reporter.warn(
                    f"{name}: {own.left_out} rows are left out: their objects are several tokens "
                    "(probing.candidates takes them)"
                )
    prompts = [prompt for name in measured for prompt in encoded[name]]
    metrics["rows_truncated"] = sum(prompt.cut > 0 for prompt in prompts)
    metrics["tokens"] = sum(len(prompt.ids) for prompt in prompts)
    return metrics, table


def _places(
    asker: Asker,
    probe: Probe,
    prompts: Sequence[Encoded],
    right: Sequence[int],
    done: Callable[[int], None],
) -> list[int]:
    """Return the place of each row's object, from 1."""

    def take(said: Tensor, rows: list[int]) -> Tensor:
        own = torch.tensor([right[row] for row in rows], device=said.device)
        return places.ranks(said, own)[:, None]

    return [int(one) for one in probe.ask(asker, prompts, done, take=take)[:, 0]]


def _by_relation(
    name: str, own: _Held, found: Sequence[int]
) -> Iterator[dict[str, float | int | str]]:
    """Yield a line for each relation that rows name, as LAMA tells them apart."""
    groups: dict[str, list[int]] = {}
    for record, place in zip(own.records, found, strict=True):
        if RELATION in record.values:
            groups.setdefault(str(record.values[RELATION]), []).append(place)
    for relation, held in groups.items():
        yield {"step": f"{name}: {relation}", "rows": len(held), **places.measure(held)}
