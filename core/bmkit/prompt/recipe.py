"""What a prompt recipe may say. No torch here: `validate` and `--plan` stay fast."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from bmkit.prompt.calibrate import Calibrate
from bmkit.prompt.learning import LearningSetting, PromptTrain, Trained
from bmkit.prompt.pointing import PointingAt
from bmkit.prompt.severalmasks import require_masks
from bmkit.prompt.tasks import Generate, Probing, Tagging, Task, require_task, with_verbalizer
from bmkit.prompting import labelwords
from bmkit.recipe import Model, Recipe, contradiction

Kind = Literal["auto", "masked", "causal", "seq2seq"]


class Data(Model):
    """The rows: JSON lines, JSON, CSV or TSV, each compressed by gzip or not."""

    train: str | None = Field(default=None, description="Rows to learn from, or to calibrate on.")
    dev: str | None = Field(default=None, description="Held-out rows that are measured as well.")
    test: str | None = Field(default=None, description="Rows that are measured.")
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


class Message(Model):
    """One message of a chat."""

    role: str = Field(description="`system`, `user` or `assistant`; the last one's is `assistant`.")
    content: str = Field(description="A template.")


class TemplateSpec(Model):
    """How a row becomes a prompt: one of `text`, `file_path`, `jinja`, `chat`. See templates.md."""

    text: str | None = Field(default=None, description="A template in OpenPrompt's language.")
    file_path: str | None = Field(default=None, description="A file with one on each line.")
    choice: int = Field(default=0, ge=0, description="Which line of the file, from 0.")
    jinja: str | None = Field(default=None, description="A template in Jinja, with `{{ mask }}`.")
    chat: list[Message] | None = Field(
        default=None, min_length=1, description="Messages, put through the model's chat template."
    )
    truncate_method: Literal["tail", "head", "balanced"] = Field(
        default="tail", description="Where what may be shortened loses tokens."
    )
    max_seq_length: int = Field(
        default=512, ge=4, description="Tokens of a prompt; the model's context bounds it as well."
    )

    @model_validator(mode="after")
    def _one_that_can_be_read(self) -> TemplateSpec:
        from bmkit.prompt.templates import WAYS, parse

        said = [way for way in WAYS if getattr(self, way) is not None]
        if len(said) != 1:
            names = ", ".join(f"`{way}`" for way in WAYS)
            problem = f"it goes without `{said[0]}`" if said else f"one of {names} is required"
            raise contradiction(said[1] if said else "text", problem)
        if said[0] != "file_path":
            with PointingAt(said[0]):
                parse(self.model_dump(include={said[0]}), said[0])
        return self


class VerbalizerSpec(Model):
    """Which words stand for labels."""

    type: Literal[
        "manual",
        "one_to_one",
        "knowledgeable",
        "automatic",
        "soft",
        "prototypical",
        "ptr",
        "generation",
        "none",
    ] = Field(
        default="manual",
        description="`manual`: words of any number of tokens; `one_to_one`: one word for each "
        "label, of one token; `knowledgeable`: many words, of which those are kept that fit; "
        "`automatic`: words that are searched on rows; `soft`: a trained row of the head for "
        "each label; `prototypical`: a point among the states at the mask for each label; `ptr`: "
        "a word for each mask of the template; `generation`: texts that each row has for its "
        "labels; `none`: of tasks without labels.",
    )
    label_words: dict[str, str | list[str]] | list[str | list[str]] | None = Field(
        default=None,
        min_length=1,
        description="Words by label, or lists of words in the order of labels.",
    )
    file_path: str | None = Field(
        default=None,
        description="A file of label words: JSON by label, or text with a line for each label.",
    )
    choice: int = Field(default=0, ge=0, description="Which set of the file, from 0.")
    prefix: str = Field(
        default=" ", description="What is before each word; `<!>` in front of a word keeps it away."
    )
    multi_token_handler: Literal["first", "mean", "max", "likelihood"] = Field(
        default="first",
        description="The score of a word of several tokens: its first one's, their mean or "
        "highest; `likelihood`: of all, each behind those before it, and of what a causal prompt "
        "has behind its mask.",
    )
    combine: Literal["sum", "mean"] = Field(
        default="sum",
        description="Of `likelihood`: a word has that of all of its tokens, or the mean of theirs, "
        "so that long words lose nothing.",
    )
    aggregate: Literal["logarithms", "probabilities"] = Field(
        default="logarithms", description="A label has the mean of its words: of which of both."
    )
    max_token_split: int | None = Field(
        default=None, ge=1, description="Words of more tokens are left out."
    )
    candidate_frac: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Of `knowledgeable`: words with a token in this rarest share of the vocabulary "
        "are left out, by how likely they are at the mask.",
    )
    relevance: float = Field(
        default=1.0,
        ge=0,
        description="Of `knowledgeable`: words that go less with their own label than this, "
        "compared with the others, are left out.",
    )
    num_candidates: int = Field(
        default=1000,
        ge=0,
        description="Of `automatic`: how many of the likeliest tokens are looked at; 0: all.",
    )
    words_per_label: int = Field(
        default=1, ge=1, description="Of `automatic`: how many words a label gets."
    )
    balanced: bool = Field(
        default=True,
        description="Of `automatic`: a label's rows count together as much as all others.",
    )
    word_weights: bool = Field(
        default=False,
        description="With `tune.mode`: how much each word counts for its label is trained.",
    )
    size: int = Field(default=64, ge=1, description="Of `prototypical`: its points' dimensions.")
    epochs: int = Field(
        default=50,
        ge=1,
        description="Of `prototypical` with `tune.mode: none`: passes over the rows' states.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Another learning rate for what `soft`, `prototypical` and `word_weights` "
        "train.",
    )

    @property
    def learns(self) -> bool:
        """Tell whether it can't do without rows that have labels."""
        return self.type in ("automatic", "soft", "prototypical")

    @property
    def reads_states(self) -> bool:
        """Tell whether it works on states at masks, and not on words."""
        return self.type in ("soft", "prototypical")

    @model_validator(mode="after")
    def _words_are_somewhere(self) -> VerbalizerSpec:
        if self.type in ("automatic", "prototypical", "none"):
            for said in ("label_words", "file_path"):
                if getattr(self, said) is not None:
                    raise contradiction(said, f"`{self.type}` finds its own, or has none")
            return self
        if (self.label_words is None) == (self.file_path is None):
            problem = "it goes without `label_words`"
            if self.label_words is None:
                problem = "one of `label_words` and `file_path` is required"
            raise contradiction("file_path" if self.file_path else "label_words", problem)
        words = self.label_words
        listed = list(words.values() if isinstance(words, dict) else words or ())
        if self.type == "one_to_one" and any(len(_listed(own)) != 1 for own in listed):
            raise contradiction("label_words", "`one_to_one` takes one word for each label")
        seen: dict[frozenset[str] | tuple[str, ...], str] = {}
        names = list(words) if isinstance(words, dict) else [f"number {i}" for i in range(99)]
        for name, own in zip(names, listed, strict=False):
            key = tuple(_listed(own)) if self.type == "ptr" else frozenset(_listed(own))
            if key in seen:
                raise contradiction(
                    "label_words", f"`{seen[key]}` and `{name}` have the same words"
                )
            seen[key] = name
        return self


def _listed(own: str | list[str]) -> list[str]:
    return [own] if isinstance(own, str) else own


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
        "rows_truncated",
        "train_loss",
        "trainable_parameters",
    )
    FILES: ClassVar = (
        "data.train",
        "data.dev",
        "data.test",
        "probing.candidates_file",
        "template.file_path",
        "verbalizer.file_path",
    )

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
    calibrate: Calibrate = Calibrate()
    tagging: Tagging = Tagging()
    probing: Probing = Probing()
    generate: Generate = Generate()
    tune: Trained = Trained()
    learning_setting: LearningSetting = LearningSetting()
    train: PromptTrain = PromptTrain()

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
        learns = mode != "none" or self.verbalizer.learns
        if learns and how == "zero_shot":
            what = f"tune.mode: {mode}" if mode != "none" else f"verbalizer.type: {kind}"
            raise contradiction(
                "learning_setting.type", f"`{what}` learns from rows: take few_shot or full"
            )
        if not learns and how != "zero_shot":
            raise contradiction(
                "tune.mode",
                f"`none` learns nothing: say what is trained, as `learning_setting` is {how}",
            )
        if learns and self.data.train is None:
            raise contradiction("data.train", "it is missing: there are no rows to learn from")
        return self

    @model_validator(mode="after")
    def _what_goes_together(self) -> PromptRecipe:
        mode, kind = self.tune.mode, self.verbalizer.type
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
