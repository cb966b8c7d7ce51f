"""The prompt engine: a template and label words on a model, calibrated and measured."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bmkit import model as models
from bmkit import report
from bmkit.data.classes import Classes
from bmkit.errors import About, RecipeError
from bmkit.plan import Job, Outcome
from bmkit.prompt import rows, stored, templates
from bmkit.prompt.ask import Question
from bmkit.prompt.kinds import kind_of
from bmkit.prompt.labels import Verbalizer
from bmkit.prompt.measure import measure
from bmkit.prompt.opening import Opened, context, open_model
from bmkit.prompt.prompts import Prompts, make
from bmkit.prompt.recipe import PromptRecipe
from bmkit.prompt.refined import knowledgeable
from bmkit.prompt.rows import Split
from bmkit.prompt.stored import KeptPrompt
from bmkit.prompting import labelwords
from bmkit.prompting.encode import Encoded, Kind
from bmkit.prompting.labelwords import LabelWords
from bmkit.prompting.wordfiles import read_words
from bmkit.verbalizers import calibration, manual

METHODS = {
    "manual": manual.label_logprobs,
    "one_to_one": manual.label_logprobs,
    "knowledgeable": knowledgeable,
    "content_free": calibration.prior,
    "contextual": calibration.prior,
}


def run(job: Job) -> Outcome:
    """Calibrate the recipe's prompt, measure it, and write it into `job.out`.

    Peak memory: the dense model in the compute dtype, and the activations of one batch.
    """
    recipe = job.recipe
    assert isinstance(recipe, PromptRecipe)  # the registry pairs recipe and engine
    if job.threads:
        torch.set_num_threads(job.threads)
    ready = Ready(job)
    told = Verbalizer(
        ready.words,
        recipe.verbalizer.multi_token_handler,
        recipe.verbalizer.combine,
        recipe.verbalizer.aggregate,
        several=recipe.task == "multilabel",
    )
    encoded = {name: ready.prompts.encode(s.records) for name, s in ready.splits.items()}
    right = ready.right()
    prior = ready.prior_prompts(encoded)
    measured = {name: encoded[name] for name in right}
    if not measured:
        job.reporter.warn("nothing is measured: there is no data.test and no data.dev")
    if told.handler != "likelihood" and any(p.behind for own in encoded.values() for p in own):
        job.reporter.warn(
            "the model doesn't read what is behind the mask: multi_token_handler: likelihood does"
        )
    size, most = recipe.train.per_device_eval_batch_size, recipe.template.max_seq_length
    opened = open_model(job, ready.kind, ready.tokenizer, size, most)
    if recipe.verbalizer.type == "knowledgeable":
        told = knowledgeable(told, opened.asker, prior, recipe.verbalizer)
    asked = [("calibrate", prior), *measured.items()]
    said = _ask(job, opened, told.question, [(n, p) for n, p in asked if p])
    opened.close()
    if prior:
        told = told.calibrated(said["calibrate"])
    metrics, table = _measured(told, said, right)
    metrics["rows_truncated"] = sum(p.cut > 0 for own in measured.values() for p in own)
    metrics["label_words"] = len(told.words.flat)
    metrics["tokens"] = sum(len(p.ids) for own in measured.values() for p in own)
    stored.write(job.out, ready.kept(told))
    return Outcome("prompt", metrics, ("bmkit",), table=table)


class Ready:
    """All of a recipe that can be made ready without the model's weights."""

    def __init__(self, job: Job) -> None:
        """Read rows, template and words. Raises BmkitError for what is wrong with them."""
        recipe = job.recipe
        assert isinstance(recipe, PromptRecipe)  # as above
        self.job, self.recipe = job, recipe
        self.tokenizer = models.load_tokenizer(job.checkpoint)
        self.config = models.load_config(job.checkpoint)
        self.kind: Kind = kind_of(self.config.to_dict(), recipe.model_kind)
        self.splits = rows.read(recipe, job.files)
        self.classes: Classes = rows.labels_of(recipe, self.splits)
        self.spec = templates.written(
            recipe.template.model_dump(), job.files.get("template.file_path")
        )
        key = "file_path" if recipe.verbalizer.file_path else "label_words"
        with About(f"verbalizer.{key}"):
            self.words: LabelWords = self._words()
        whole = recipe.verbalizer.multi_token_handler == "likelihood"
        with About(f"template.{next(iter(self.spec))}"):
            self.prompts: Prompts = make(
                self.spec,
                self.tokenizer,
                self.kind,
                words=self.words if whole else None,
                context=context(self.config, job),
                max_seq_length=recipe.template.max_seq_length,
                truncate_method=recipe.template.truncate_method,
                decoder_start=getattr(self.config, "decoder_start_token_id", None),
            )

    def _words(self) -> LabelWords:
        spec = self.recipe.verbalizer
        names = self.classes.names
        if (file := self.job.files.get("verbalizer.file_path")) is not None:
            words = read_words(file, names, spec.choice)
        else:
            assert spec.label_words is not None  # the recipe has one of both
            words = labelwords.parse(spec.label_words, names)
        found = labelwords.resolve(
            words,
            self.tokenizer,
            prefix=spec.prefix,
            whole=spec.type == "one_to_one",
            max_token_split=spec.max_token_split,
        )
        if spec.type == "knowledgeable":
            found = labelwords.delete_common(found)
        labelwords.require_distinct(found, first_only=spec.multi_token_handler == "first")
        return found

    def right(self) -> dict[str, list[tuple[int, ...]]]:
        """Return the labels of the splits to measure: test and dev; train, if there is no other.

        Raises InputError naming a row whose label is unknown or missing.
        """
        held = [name for name in self.splits if name != "train"]
        train = self.splits.get("train")
        if not held and train is not None and all("label" in r.values for r in train.records):
            held = ["train"]  # nothing is learned from it
        return {name: self.splits[name].labels(self.classes, self.recipe) for name in held}

    def prior_prompts(self, encoded: dict[str, list[Encoded]]) -> list[Encoded]:
        """Return the prompts to calibrate on; none if nothing is calibrated.

        Raises RecipeError if there are no rows for it.
        """
        spec = self.recipe.calibrate
        if spec.type == "content_free":
            return self.prompts.saying(spec.texts)
        if spec.type == "none":
            return []
        split: Split | None = rows.all_of(self.splits, ("train", "test", "dev"))
        if split is None:
            raise RecipeError("calibrate: contextual needs rows", hint="give data.train or test")
        there = encoded[split.name]
        if len(there) <= spec.num_examples:
            return there
        chosen = random.Random(self.recipe.seed).sample(range(len(there)), spec.num_examples)
        return [there[at] for at in sorted(chosen)]

    def kept(self, told: Verbalizer) -> KeptPrompt:
        """Return what the artifact keeps."""
        recipe = self.recipe
        return KeptPrompt.model_validate(
            {
                "task": recipe.task,
                "model_kind": self.kind,
                "template": self.spec,
                "truncate_method": recipe.template.truncate_method,
                "max_seq_length": recipe.template.max_seq_length,
                "columns": recipe.data.columns,
                "labels": list(self.classes.names),
                "verbalizer": recipe.verbalizer.type,
                "label_words": told.words.values(),
                "multi_token_handler": recipe.verbalizer.multi_token_handler,
                "combine": recipe.verbalizer.combine,
                "aggregate": recipe.verbalizer.aggregate,
                "calibration": recipe.calibrate.type,
                "prior": told.kept_prior(),
                "vocabulary": stored.vocabulary_digest(self.tokenizer),
            }
        )


def _ask(
    job: Job,
    opened: Opened,
    question: Question,
    asked: Sequence[tuple[str, list[Encoded]]],
) -> dict[str, Tensor]:
    """Return the log-probabilities at masks of each group of prompts."""
    total = sum(len(prompts) for _, prompts in asked)
    with report.task(job.reporter, "prompt", total, "rows") as bar:
        return {
            name: opened.asker.logprobs(prompts, question, bar.advance) for name, prompts in asked
        }


def _measured(
    told: Verbalizer, said: dict[str, Tensor], right: dict[str, list[tuple[int, ...]]]
) -> tuple[dict[str, Any], list[dict[str, float | int | str]]]:
    """Return the figures of test, of dev by `dev_…`, and a line for each split and label."""
    metrics: dict[str, Any] = {}
    table: list[dict[str, float | int | str]] = []
    for name, own in right.items():
        chosen = told.chosen(told.label_logprobs(said[name]))
        figures, lines = measure(chosen, own, told.words.labels)
        prefix = "" if name == "test" else f"{name}_"
        metrics |= {f"{prefix}{figure}": value for figure, value in figures.items()}
        metrics[f"{prefix}rows"] = len(own)
        table += [{**line, "step": f"{name}: {line['step']}"} for line in lines]
    return metrics, table
