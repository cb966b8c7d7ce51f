"""What a prompt recipe says, made ready: all that can be known without the model's weights."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

from bmkit import model as models
from bmkit.data.classes import Classes
from bmkit.data.spans import TAGS, words_of
from bmkit.errors import About, RecipeError
from bmkit.plan import Job
from bmkit.prompt import rows, stored, tagging, templates
from bmkit.prompt.kinds import kind_of
from bmkit.prompt.labels import Verbalizer
from bmkit.prompt.measure import Row
from bmkit.prompt.opening import context
from bmkit.prompt.prompts import Prompts, make
from bmkit.prompt.recipe import PromptRecipe
from bmkit.prompt.rows import Split
from bmkit.prompt.severalmasks import handler_of
from bmkit.prompt.states import States
from bmkit.prompt.stored import KeptPrompt
from bmkit.prompting import labelwords
from bmkit.prompting import template as language
from bmkit.prompting.encode import Encoded, Kind, SoftRow
from bmkit.prompting.generation import Rules, parse_rules
from bmkit.prompting.labelwords import LabelWords
from bmkit.prompting.wordfiles import read_words

SEVERAL = ("ptr", "generation")
"""Verbalizers of several masks."""


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
            """There are none where they are searched, or labels have none."""
            self.texts: Rules = self._texts()
        own = self.texts or self.words.words if recipe.verbalizer.type in SEVERAL else ()
        self.masks = len(own[0]) if own else 1
        self.handler = handler_of(recipe, self.kind, self.masks)
        with About(f"template.{next(iter(self.spec))}"):
            self.prompts: Prompts = self._prompts()
            self.soft: list[SoftRow] = self.prompts.soft
            self._require_trained()

    def _prompts(self) -> Prompts:
        recipe = self.recipe
        whole = self.handler == "likelihood"
        return make(
            self.spec,
            self.tokenizer,
            self.kind,
            words=self.words if whole else None,
            masks=self.masks,
            texts=self.texts,
            prefix=recipe.verbalizer.prefix,
            context=self._context(),
            max_seq_length=recipe.template.max_seq_length,
            truncate_method=recipe.template.truncate_method,
            decoder_start=getattr(self.config, "decoder_start_token_id", None),
            soft_start=self.soft_start,
        )

    def with_template(self, spec: dict[str, Any]) -> Ready:
        """Return the same with another template, as an artifact keeps it (`templates.written`).

        Raises RecipeError for one that the tokenizer or the kind of model can't have.
        """
        other = copy.copy(self)
        other.spec = spec
        other.prompts = other._prompts()
        other.soft = other.prompts.soft
        other._require_trained()
        return other

    def with_words(self, words: LabelWords) -> Ready:
        """Return the same with other label words."""
        other = copy.copy(self)
        other.words = words
        return other

    @property
    def soft_start(self) -> int:
        """Return the id of the first soft token: the size of the model's vocabulary."""
        return int(self.config.get_text_config().vocab_size)

    def _context(self) -> int | None:
        most = context(self.config, self.job)
        front = sum(int(getattr(d, "num_virtual_tokens", 0)) for d in self.recipe.tune.deltas)
        if self.recipe.task == "generation" and self.kind == "causal":
            front += self.recipe.generate.max_new_tokens
        return None if most is None else most - front

    def _require_trained(self) -> None:
        """Raise RecipeError for soft tokens that nothing trains, and if there are none to train."""
        mode = self.recipe.tune.mode
        if mode == "none" and any(row.token is None for row in self.soft):
            raise RecipeError(
                "it has soft tokens that begin at random, and nothing trains them",
                hint="set tune.mode: soft, or give them words to begin as",
            )
        for key, usual in (("learning_rate", None), ("encoder", "none")):
            alone = self.recipe.ensemble is None  # another member may have some
            if alone and not self.soft and getattr(self.recipe.tune, key) != usual:
                raise RecipeError(
                    f"it has no soft tokens, and tune.{key} is for them alone",
                    hint="put some in, or leave it out; train.learning_rate is for all else",
                )
        spec = self.recipe.verbalizer
        if mode == "soft" and not self.soft and not (spec.reads_states or spec.word_weights):
            raise RecipeError(
                "it has no soft tokens, and tune.mode: soft trains nothing else",
                hint="""put some in, as {"soft": "It was"}, or take tune.mode: delta""",
            )

    def _words(self) -> LabelWords:
        spec = self.recipe.verbalizer
        names = self.classes.names
        if spec.type in ("automatic", "prototypical", "generation", "none"):
            return _none(tuple(names))
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
            in_order=spec.type == "ptr",
            max_token_split=spec.max_token_split,
        )
        if spec.type == "knowledgeable":
            found = labelwords.delete_common(found)
        first_only = spec.multi_token_handler == "first"
        if spec.type == "ptr":
            first_only = first_only and self.kind == "masked"
        labelwords.require_distinct(found, first_only=first_only, in_order=spec.type == "ptr")
        return found

    def _texts(self) -> Rules:
        """Return what makes the texts of labels of a row, if that is how they are told."""
        spec = self.recipe.verbalizer
        if spec.type != "generation":
            return ()
        assert spec.label_words is not None  # the recipe has them
        names = self.classes.names
        return parse_rules(labelwords.parse(spec.label_words, names), names)

    @property
    def learns(self) -> bool:
        """Tell whether the rows of train are learned from."""
        return self.recipe.learning_setting.type != "zero_shot"

    def right(self) -> dict[str, list[tuple[int, ...]]]:
        """Return the labels of the splits to measure: test and dev; train, if there is no other.

        Where train is learned from, it is that of all splits. Raises InputError
        naming a row whose label is unknown or missing.
        """
        held = [name for name in self.splits if name != "train" or self.learns]
        held = [name for name in held if name != "unlabelled"]
        train = self.splits.get("train")
        key = TAGS if self.recipe.task == "tagging" else rows.LABEL
        if not held and train is not None and all(key in r.values for r in train.records):
            held = ["train"]  # nothing is learned from it
        return {name: self.splits[name].labels(self.classes, self.recipe) for name in held}

    def tagged(
        self,
        name: str,
        right: Sequence[tuple[int, ...]],
        chosen: Sequence[tuple[int, ...]],
        logprobs: Sequence[float],
    ) -> tuple[dict[str, float], list[Row]] | None:
        """Return the figures of a split's tags, by the label of each prompt; else None.

        That is so for other tasks, and for rows that were drawn from those of train.
        """
        split = self.splits.get(name)
        if split is None or not split.whole or len(split.places) != len(right):
            return None
        own = rows.tagger(self.recipe, self.classes)
        counts = [len(words_of(record)) for record in split.whole]
        told = own.told(counts, split.places, [label for (label,) in chosen], logprobs)
        return tagging.measure(told, [own.tagged(record) for record in split.whole])

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
            raise RecipeError(
                "calibrate: rows are needed to look at", hint="give data.train or test"
            )
        there = encoded[split.name]
        return [there[at] for at in self._drawn(len(there))]

    def prior_anew(self) -> list[Encoded]:
        """Return the same prompts, made of the rows to calibrate on alone."""
        split = rows.all_of(self.splits, ("train", "test", "dev"))
        if self.recipe.calibrate.type != "contextual" or split is None:
            return self.prior_prompts({})
        return self.prompts.encode([split.records[at] for at in self._drawn(len(split.records))])

    def _drawn(self, count: int) -> list[int]:
        """Return the places of the rows to calibrate on."""
        wanted = self.recipe.calibrate.num_examples
        if count <= wanted:
            return list(range(count))
        return sorted(random.Random(self.recipe.seed).sample(range(count), wanted))

    def kept(self, told: Verbalizer | States | None, **trained: Any) -> KeptPrompt:
        """Return what the artifact keeps; `trained` is what training has made besides."""
        recipe = self.recipe
        words = told.words if isinstance(told, Verbalizer) else _none(self.classes.names)
        return KeptPrompt.model_validate(
            {
                "task": recipe.task,
                "model_kind": self.kind,
                "template": self.spec,
                "truncate_method": recipe.template.truncate_method,
                "max_seq_length": recipe.template.max_seq_length,
                "columns": recipe.data.columns,
                "header": recipe.data.header,
                "quoted": recipe.data.quoted,
                "labels": list(self.classes.names),
                "verbalizer": recipe.verbalizer.type,
                "label_words": words.values(),
                "multi_token_handler": self.handler,
                "combine": recipe.verbalizer.combine,
                "aggregate": recipe.verbalizer.aggregate,
                "calibration": recipe.calibrate.type,
                "prior": None if told is None else told.kept_prior(),
                "prefix": recipe.verbalizer.prefix,
                "rules": self._rules(),
                "word_weights": recipe.verbalizer.word_weights,
                "none": recipe.data.none,
                "tagging": recipe.tagging.model_dump(),
                "probing": recipe.probing.model_dump(exclude={"candidates", "candidates_file"}),
                "generate": recipe.generate.model_dump(),
                "vocabulary": stored.vocabulary_digest(self.tokenizer),
                **trained,
            }
        )

    def _rules(self) -> dict[str, list[str]]:
        return {
            label: [language.to_text(rule) for rule in own]
            for label, own in zip(self.classes.names, self.texts, strict=False)
        }


def _none(labels: tuple[str, ...]) -> LabelWords:
    return LabelWords(labels, tuple(() for _ in labels))
