"""`infer` on a prompt artifact: rows in, labels with their probabilities out, in order."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bmkit import artifact
from bmkit import model as models
from bmkit.data.columns import map_columns
from bmkit.data.rows import BadRow, Row
from bmkit.data.tabular import Record
from bmkit.errors import BmkitError, InputError, RecipeError, counted
from bmkit.plan import Job
from bmkit.prompt import kept as shelf
from bmkit.prompt.ask import Asker
from bmkit.prompt.opening import Opened, open_model
from bmkit.prompt.reopened import Reopened, fields_of, reopen
from bmkit.prompt.rows import ANSWERS
from bmkit.prompting.encode import Encoded
from bmkit.registry import load
from bmkit.runtime.opening import peak_gpu_bytes
from bmkit.runtime.recipe import GenerateRecipe
from bmkit.verbalizers import together

SESSIONS = {
    "tagging": "bmkit.prompt.answertags:TagSession",
    "probing": "bmkit.prompt.answerwords:ProbeSession",
    "generation": "bmkit.prompt.answertexts:TextSession",
}
"""By task, where rows are answered by more than a label."""
WINDOW_BATCHES = 8
"""Rows of this many batches are sorted by length together: less padding, answers still flow."""


@dataclass(frozen=True)
class Told:
    """One row, and how likely each label is."""

    streamed: ClassVar = False
    """Whether its text was written while it was made."""

    id: Any
    probabilities: dict[str, float]
    labels: tuple[str, ...] | None
    """Where a row may have several labels: those that it has."""

    @property
    def label(self) -> str:
        """Return the likeliest label."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    def values(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        rounded = {k: round(v, 6) for k, v in self.probabilities.items()}
        several = {} if self.labels is None else {"labels": list(self.labels)}
        return {"id": self.id, "label": self.label, **several, "probabilities": rounded}

    def line(self) -> str:
        """Return what is printed as text."""
        if self.labels is not None:
            return json.dumps(list(self.labels), ensure_ascii=False)
        return f"{self.label}\t{self.probabilities[self.label]:.4f}"


@dataclass(frozen=True)
class Asked:
    """A row that can be asked about."""

    id: Any
    encoded: list[Encoded]
    """By the artifact's prompts; of `task: tagging` one for each run of words."""
    record: Record
    number: int
    """Its place among all rows, bad ones included."""

    @property
    def tokens(self) -> int:
        """Return how many tokens are asked."""
        return sum(len(prompt.ids) for prompt in self.encoded)

    @property
    def cut(self) -> bool:
        """Tell whether a prompt had no room for all of the row."""
        return any(prompt.cut for prompt in self.encoded)


def run(job: Job) -> Session:
    """Open the job's prompt and what it was made on."""
    assert job.prompt is not None  # the pipeline sends prompts here
    if (way := SESSIONS.get(shelf.read(job.prompt.path).first.task)) is None:
        return Session(job)
    made: Session = load(way)(job)
    return made


class Session:
    """A prompt on its model, that tells labels of rows."""

    def __init__(self, job: Job) -> None:
        """Load both. Raises InputError for a prompt that was made with another tokenizer."""
        recipe = job.recipe
        assert isinstance(recipe, GenerateRecipe)  # the registry pairs recipe and engine
        assert job.prompt is not None  # the pipeline sends prompts here
        if job.threads:
            torch.set_num_threads(job.threads)
        found = shelf.read(job.prompt.path)
        self.kept, self.ensemble = found.first, found.ensemble
        self.tokenizer = models.load_tokenizer(job.checkpoint)
        both = zip(found.folders, found.prompts, strict=True)
        self.parts = [reopen(folder, kept, job, self.tokenizer) for folder, kept in both]
        self.shared = len(self.parts) > 1 and shelf.own_model(job.prompt.path) is None
        self.opened = self._opened(job, recipe.batch_size, found.tokens)
        self.rss_before_bytes = self.opened[0].rss_before_bytes
        self.batch_size = recipe.batch_size
        self.reporter = job.reporter
        self.tokens = 0
        self.truncated = 0
        self.seconds = 0.0

    @property
    def only(self) -> Reopened:
        """Return the prompt of a task of which there are no ensembles."""
        return self.parts[0]

    @property
    def asker(self) -> Asker:
        """Return what asks the model of that prompt."""
        return self.opened[0].asker

    def _opened(self, job: Job, size: int, most: int) -> list[Opened]:
        """Open the model that all prompts share, or that of each, with all that it was trained."""
        if self.shared:
            return [open_model(job, self.parts[0].kind, self.tokenizer, size, most)]
        found = []
        for part in self.parts:
            if len(self.parts) > 1:
                own = artifact.open_artifact(part.folder / shelf.WHOLE)
                job = replace(job, model=own, base=None)
            one = open_model(job, part.kind, self.tokenizer, size, most, part.adapters)
            part.put_rows(one.asker.model)
            found.append(one)
        return found

    def answer(
        self,
        given: Iterable[Row | BadRow],
        *,
        write: Callable[[str], None] | None = None,
        done: int = 0,
    ) -> Iterator[Any]:
        """Tell the labels of rows, in the order they came.

        Rows have a recipe's own column names, or the template's; one of `prompt` alone fills a
        template of one field. A row that can't be used comes back as a BadRow in its place. The
        first `done` rows that can be used are passed over: an earlier run has answered them.
        """
        read = self._rest(given, done)
        size = 1 if write else self.batch_size * WINDOW_BATCHES
        while taken := list(itertools.islice(read, size)):
            good = [found for found in taken if isinstance(found, Asked)]
            start = time.perf_counter()
            answers = iter(self._tell(good) if good else ())
            self.seconds += time.perf_counter() - start
            self.tokens += sum(found.tokens for found in good)
            self.truncated += sum(found.cut for found in good)
            for found in taken:
                yield found if isinstance(found, BadRow) else next(answers)
        if self.truncated:
            most = min(part.kept.max_seq_length for part in self.parts)
            cut = counted(self.truncated, "row was", "rows were")
            self.reporter.warn(f"{cut} cut: a prompt has {most} tokens at most")

    def _tell(self, asked: list[Asked]) -> Sequence[Any]:
        each = [self._said(number, asked) for number in range(len(self.parts))]
        several = self.kept.task == "multilabel"
        labels = each[0]
        if self.ensemble is not None:
            weights = [member.weight for member in self.ensemble.members]
            over = self.ensemble.aggregate
            labels = together.mean(torch.stack(each), weights, over, several=several)
        names = self.kept.labels
        chosen = together.chosen(labels, several=several)
        return [
            Told(
                found.id,
                dict(zip(names, row, strict=True)),
                tuple(names[at] for at in own) if several else None,
            )
            for found, row, own in zip(asked, labels.exp().tolist(), chosen, strict=True)
        ]

    def _said(self, number: int, asked: list[Asked]) -> Tensor:
        """Return what one of the prompts says of rows: log-probabilities [rows, labels]."""
        part, asker = self.parts[number], self.opened[0 if self.shared else number].asker
        with part.at_work(asker) if self.shared else nullcontext():
            said = part.told.ask(asker, [found.encoded[number] for found in asked])
        return part.told.label_logprobs(said)

    def _rest(self, given: Iterable[Row | BadRow], done: int) -> Iterator[Asked | BadRow]:
        for number, row in enumerate(given):
            found = row if isinstance(row, BadRow) else self._read(number, row)
            if done and isinstance(found, Asked):
                done -= 1
            else:
                yield found

    def _read(self, number: int, row: Row) -> Asked | BadRow:
        """Turn a row into a prompt in tokens, or say what is wrong with it."""
        fields = fields_of(self.parts)
        values = row.values
        if set(values) - {"id"} == {"prompt"} and len(fields) == 1 and "prompt" not in fields:
            values = {**values, fields[0]: values["prompt"]}
        elif set(values) - {"id"} == {"prompt"} and "prompt" not in fields:
            needed = ", ".join(f"`{name}`" for name in fields)
            return BadRow(row.line, f"`prompt` alone fills no template with {needed}: name them")
        record = Record(f"line {row.line}", row.line, values)
        columns = {k: v for k, v in self.kept.columns.items() if k not in ANSWERS}
        try:
            found = list(map_columns(record, columns, ours_too=True))
            if len(found) != 1:
                return BadRow(row.line, f"it becomes {len(found)} rows by the prompt's columns")
            encoded = self._encoded(found[0])
        except (InputError, RecipeError) as exc:
            return BadRow(row.line, _plain(exc, record.where))
        return Asked(values.get("id", number), encoded, found[0], number)

    def _encoded(self, record: Record) -> list[Encoded]:
        """Return the prompts of a row, one of each part."""
        return [prompt for part in self.parts for prompt in part.prompts.encode([record])]

    def figures(self) -> dict[str, Any]:
        """Return what a report says besides time and memory."""
        return {"rows_truncated": self.truncated}

    def peak_gpu_bytes(self) -> int:
        """Return the most GPU memory that was held, CUDA's own included; 0 on the CPU."""
        return peak_gpu_bytes(self.opened[0].device)

    def close(self) -> None:
        """End: nothing is kept."""
        for one in self.opened:
            one.close()


def _plain(exc: BmkitError, where: str) -> str:
    """Return what is wrong with a row, without the line, which is told anyway."""
    text = str(exc).removeprefix(f"{where}: ")
    return f"{text}; {exc.hint}" if exc.hint else text
