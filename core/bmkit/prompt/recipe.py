"""What a prompt recipe may say. No torch here: `validate` and `--plan` stay fast."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from bmkit.prompt.calibrate import Calibrate
from bmkit.prompt.learning import LearningSetting, PromptTrain, Trained
from bmkit.prompt.pointing import PointingAt
from bmkit.prompt.searching import Search, check
from bmkit.prompt.severalmasks import require_masks
from bmkit.prompt.tasks import Generate, Probing, Tagging, Task, require_task, with_verbalizer
from bmkit.prompt.templatespec import TemplateSpec
from bmkit.prompt.together import Ensemble, require_together
from bmkit.prompt.verbalizerspec import VerbalizerSpec
from bmkit.prompting import labelwords
from bmkit.recipe import Model, Recipe, contradiction

Kind = Literal["auto", "masked", "causal", "seq2seq"]


class Data(Model):
    """The rows: JSON lines, JSON, CSV or TSV, each compressed by gzip or not."""

    train: str | None = Field(default=None, description="Rows to learn from, or to calibrate on.")
    dev: str | None = Field(default=None, description="Held-out rows that are measured as well.")
    test: str | None = Field(default=None, description="Rows that are measured.")
    unlabelled: str | None = Field(
        default=None,
        description="Rows that the prompt labels; they go with it, to teach another model.",
    )
    columns: dict[str, str | int] = Field(
        default={},
        description="A template's names and the file's: `text_a: sentence`, `label: 0` (a number "
        "counts columns from 0), `meta.word: entity.text` (a path into nested rows).",
    )
    labels: list[str] | dict[str, str] | None = Field(
        default=None,
        min_length=1,
        description="The labels in their order, or a mapping from what files hold to labels; if "
        "not given, those of `label_words`, else those that the rows have.",
    )
    header: bool | None = Field(
        default=None,
        description="Whether the first line of CSV and TSV names columns; if not given, unless all "
        "of `columns` are numbers.",
    )
    quoted: bool | None = Field(
        default=None,
        description='Whether `"` encloses values; if not given, in CSV and not in TSV.',
    )
    separator: str | None = Field(
        default=None, min_length=1, description="Of `task: multilabel`: what is between labels."
    )
    none: str | None = Field(
        default=None,
        description="Of `relation` and `tagging`: the label of what is nothing, which F1 leaves "
        "out.",
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _numbers_are_names(cls, value: object) -> object:
        if isinstance(value, list):
            return [_text(name) for name in value]
        if isinstance(value, dict):
            return {key: _text(name) for key, name in value.items()}
        return value


def _text(value: object) -> object:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else value


class PromptRecipe(Recipe):
    """`bmkit prompt`."""

    METRICS: ClassVar = (
        "accuracy",
        "accuracy_sd",
        "macro_f1",
        "micro_f1",
        "dev_accuracy",
        "dev_macro_f1",
        "dev_micro_f1",
        "train_accuracy",
        "train_macro_f1",
        "train_micro_f1",
        "precision_at_1",
        "precision_at_10",
        "mean_reciprocal_rank",
        "exact_match",
        "token_f1",
        "rouge_l",
        "dev_exact_match",
        "dev_token_f1",
        "dev_rouge_l",
        "rows_truncated",
        "templates",
        "combinations",
        "train_loss",
        "trainable_parameters",
    )
    FILES: ClassVar = (
        "data.train",
        "data.dev",
        "data.test",
        "data.unlabelled",
        "probing.candidates_file",
        "template.file_path",
        "verbalizer.file_path",
    )
    MODELS: ClassVar = ("search.model",)

    kind: Literal["prompt"]
    task: Task = Field(
        default="classification",
        description="Each row has one label, or any number of them; two entities (`head`, `tail`) "
        "and one of their relations; words (`tokens`, `tags`); an `object` to be named; a `target` "
        "to be said.",
    )
    model_kind: Kind = Field(
        default="auto", description="How the model is asked; `auto` goes by its config."
    )
    data: Data = Data()
    template: TemplateSpec
    verbalizer: VerbalizerSpec
    search: Search | None = Field(
        default=None, description="Choose the template and the label words on rows."
    )
    calibrate: Calibrate = Calibrate()
    tagging: Tagging = Tagging()
    probing: Probing = Probing()
    generate: Generate = Generate()
    tune: Trained = Trained()
    learning_setting: LearningSetting = LearningSetting()
    train: PromptTrain = PromptTrain()
    ensemble: Ensemble | None = None

    @model_validator(mode="before")
    @classmethod
    def _tasks_without_labels(cls, values: Any) -> Any:
        return with_verbalizer(values)

    @model_validator(mode="after")
    def _labels_have_words(self) -> PromptRecipe:
        labels, words = self.labels, self.verbalizer.label_words
        if labels is not None and len(labels) < 2:
            raise contradiction("data.labels", "there is one label only: nothing to tell apart")
        if labels is not None and words is not None:
            with PointingAt("verbalizer.label_words"):
                labelwords.parse(words, labels)
        require_task(self)
        require_masks(self)
        if self.verbalizer.type == "knowledgeable" and self.calibrate.type != "contextual":
            raise contradiction(
                "calibrate.type", "`knowledgeable` refines words on rows: take contextual"
            )
        if self.task == "multilabel" and self.calibrate.type == "none":
            raise contradiction(
                "calibrate.type",
                "`task: multilabel` asks which labels a row makes likelier than they are by "
                "themselves: take content_free or contextual",
            )
        return self

    @model_validator(mode="after")
    def _rows_to_learn_from(self) -> PromptRecipe:
        mode, how, kind = self.tune.mode, self.learning_setting.type, self.verbalizer.type
        learns = mode != "none" or self.verbalizer.learns or self.search is not None
        if learns and how == "zero_shot":
            what = f"tune.mode: {mode}" if mode != "none" else f"verbalizer.type: {kind}"
            what = what if self.search is None else "search"
            raise contradiction(
                "learning_setting.type", f"`{what}` learns from rows: take few_shot or full"
            )
        if not learns and how != "zero_shot":
            raise contradiction(
                "tune.mode",
                f"`none` learns nothing: say what is trained, as `learning_setting` is {how}: "
                "soft, delta or full",
            )
        if learns and self.data.train is None:
            raise contradiction("data.train", "it is missing: there are no rows to learn from")
        return self

    @model_validator(mode="after")
    def _what_goes_together(self) -> PromptRecipe:
        mode, kind = self.tune.mode, self.verbalizer.type
        check(self)
        if kind == "soft" and mode == "none":
            raise contradiction("tune.mode", "a `soft` verbalizer is trained: take soft or delta")
        if self.verbalizer.reads_states:
            if self.calibrate.type != "none":
                raise contradiction(
                    "calibrate.type", f"a `{kind}` verbalizer has no words to calibrate"
                )
            if self.task == "multilabel":
                raise contradiction("verbalizer.type", f"`{kind}` tells one label a row")
        if self.verbalizer.multi_token_handler == "likelihood" and kind in (
            "automatic",
            "soft",
            "prototypical",
        ):
            raise contradiction(
                "verbalizer.multi_token_handler", f"`{kind}` reads one place: take first or mean"
            )
        if self.task == "multilabel" and kind == "automatic":
            raise contradiction("verbalizer.type", "`automatic` wants rows of one label")
        held_out = self.data.dev is not None or self.learning_setting.type == "few_shot"
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self.train, name) and not held_out:
                raise contradiction("train", f"{name} needs data.dev")
        return self

    @model_validator(mode="after")
    def _members_are_prompts(self) -> PromptRecipe:
        require_together(self)
        return self

    def member(self, number: int) -> dict[str, Any]:
        """Return the keys in which a member of the ensemble differs; 0 is the recipe's own."""
        if self.ensemble is None or not number:
            return {"ensemble": None}
        other = self.ensemble.members[number - 1]
        own = {"verbalizer": other.verbalizer} if other.verbalizer else {}
        return {"template": other.template, "ensemble": None, **own}

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Return the labels in their order, as far as the recipe says them."""
        said = self.data.labels
        if isinstance(said, list):
            return tuple(said)
        if isinstance(said, dict):
            return tuple(dict.fromkeys(said.values()))
        words = self.verbalizer.label_words
        return tuple(words) if isinstance(words, dict) else None
