"""`infer` on a prompt artifact: rows in, labels with their probabilities out, in order."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from bmkit import artifact
from bmkit import model as models
from bmkit.data.columns import map_columns
from bmkit.data.rows import BadRow, Row
from bmkit.data.tabular import Record
from bmkit.deltas import soft_files
from bmkit.errors import BmkitError, InputError, RecipeError
from bmkit.plan import Job
from bmkit.prompt import states, stored
from bmkit.prompt.kinds import kind_of
from bmkit.prompt.labels import FILE, Verbalizer
from bmkit.prompt.opening import context, open_model
from bmkit.prompt.prompts import make
from bmkit.prompt.ready import SEVERAL
from bmkit.prompt.rows import ANSWERS
from bmkit.prompt.rules import Rules
from bmkit.prompt.states import States
from bmkit.prompt.stored import SOFT, KeptPrompt
from bmkit.prompt.tasks import longest
from bmkit.prompting.encode import Encoded
from bmkit.prompting.generation import parse_rules
from bmkit.registry import load
from bmkit.runtime.opening import peak_gpu_bytes
from bmkit.runtime.recipe import GenerateRecipe
from bmkit.verbalizers import wordweights

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
    """One, or of `task: tagging` one for each run of words."""
    record: Record


def run(job: Job) -> Session:
    """Open the job's prompt and what it was made on."""
    assert job.prompt is not None  # the pipeline sends prompts here
    if (way := SESSIONS.get(stored.read(job.prompt.path).task)) is None:
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
        folder = job.prompt.path
        self.kept = kept = stored.read(folder)
        self.tokenizer = models.load_tokenizer(job.checkpoint)
        stored.require_vocabulary(kept, self.tokenizer, job.prompt.path, job.checkpoint)
        config = models.load_config(job.checkpoint)
        kind = kind_of(config.to_dict(), kept.model_kind)
        adapters = [folder / artifact.DELTAS / name for name in kept.adapters]
        soft_start = soft_files.read(folder / SOFT)[1] if kept.soft else None
        self.prompts = make(
            kept.template,
            self.tokenizer,
            kind,
            words=kept.words if kept.multi_token_handler == "likelihood" else None,
            masks=kept.masks,
            texts=parse_rules(kept.rules, kept.labels) if kept.rules else (),
            prefix=kept.prefix,
            context=_context(context(config, job, adapters), kept),
            max_seq_length=kept.max_seq_length,
            truncate_method=kept.truncate_method,
            decoder_start=getattr(config, "decoder_start_token_id", None),
            soft_start=soft_start,
        )
        self.verbalizer = _verbalizer(kept, folder)
        most = longest(kept.task, kept.max_seq_length, kept.generate)
        self.opened = open_model(job, kind, self.tokenizer, recipe.batch_size, most, adapters)
        if kept.soft:
            soft_files.load(self.opened.asker.model, folder / SOFT)
        self.rss_before_bytes = self.opened.rss_before_bytes
        self.batch_size = recipe.batch_size
        self.tokens = 0
        self.seconds = 0.0

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
            self.tokens += sum(len(p.ids) for found in good for p in found.encoded)
            for found in taken:
                yield found if isinstance(found, BadRow) else next(answers)

    def _tell(self, asked: list[Asked]) -> Sequence[Any]:
        prompts = [prompt for found in asked for prompt in found.encoded]
        said = self.verbalizer.ask(self.opened.asker, prompts)
        labels = self.verbalizer.label_logprobs(said)
        names = self.kept.labels
        chosen = self.verbalizer.chosen(labels)
        return [
            Told(
                found.id,
                dict(zip(names, row, strict=True)),
                tuple(names[at] for at in own) if self.verbalizer.several else None,
            )
            for found, row, own in zip(asked, labels.exp().tolist(), chosen, strict=True)
        ]

    def _rest(self, given: Iterable[Row | BadRow], done: int) -> Iterator[Asked | BadRow]:
        for number, row in enumerate(given):
            found = row if isinstance(row, BadRow) else self._read(number, row)
            if done and isinstance(found, Asked):
                done -= 1
            else:
                yield found

    def _read(self, number: int, row: Row) -> Asked | BadRow:
        """Turn a row into a prompt in tokens, or say what is wrong with it."""
        fields = self.prompts.fields
        values = row.values
        if set(values) - {"id"} == {"prompt"} and len(fields) == 1 and "prompt" not in fields:
            values = {**values, fields[0]: values["prompt"]}
        record = Record(f"line {row.line}", row.line, values)
        columns = {k: v for k, v in self.kept.columns.items() if k not in ANSWERS}
        try:
            found = list(map_columns(record, columns, ours_too=True))
            if len(found) != 1:
                return BadRow(row.line, f"it becomes {len(found)} rows by the prompt's columns")
            encoded = self._encoded(found[0])
        except (InputError, RecipeError) as exc:
            return BadRow(row.line, _plain(exc, record.where))
        return Asked(values.get("id", number), encoded, found[0])

    def _encoded(self, record: Record) -> list[Encoded]:
        """Return the prompts of a row."""
        return self.prompts.encode([record])

    def figures(self) -> dict[str, Any]:
        """Return what a report says besides time and memory."""
        return {}

    def peak_gpu_bytes(self) -> int:
        """Return the most GPU memory that was held, CUDA's own included; 0 on the CPU."""
        return peak_gpu_bytes(self.opened.device)

    def close(self) -> None:
        """End: nothing is kept."""
        self.opened.close()


def _context(most: int | None, kept: KeptPrompt) -> int | None:
    """Return how many tokens a prompt can have, with room for what is said behind it."""
    if most is None or kept.task != "generation" or kept.model_kind != "causal":
        return most
    return most - kept.generate.max_new_tokens


def _verbalizer(kept: KeptPrompt, folder: Path) -> Verbalizer | States:
    if kept.reads_states:
        return states.load(folder, tuple(kept.labels))
    told: Verbalizer
    if kept.verbalizer in SEVERAL:
        told = Rules(
            kept.words, kept.multi_token_handler, kept.combine, own_labels=tuple(kept.labels)
        )
        return told if kept.prior is None else told.with_prior(kept.prior)
    told = Verbalizer(
        kept.words,
        kept.multi_token_handler,
        kept.combine,
        kept.aggregate,
        several=kept.task == "multilabel",
        module=wordweights.load(folder / FILE) if kept.word_weights else None,
    )
    return told if kept.prior is None else told.with_prior(kept.prior)


def _plain(exc: BmkitError, where: str) -> str:
    """Return what is wrong with a row, without the line, which is told anyway."""
    text = str(exc).removeprefix(f"{where}: ")
    return f"{text}; {exc.hint}" if exc.hint else text
