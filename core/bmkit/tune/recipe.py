"""What a tune recipe may say. No torch here: `validate` and `--plan` stay fast."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from bmkit.data.slices.dialogue import TAGS
from bmkit.deltas.recipe import Delta, names
from bmkit.recipe import Model, Recipe, contradiction
from bmkit.train.recipe import Train

Task = Literal[
    "auto",
    "causal_lm",
    "seq2seq_lm",
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "preference",
    "duplex",
]
DECISIONS = ("idle_precision", "idle_recall", "idle_f1", "false_takeover", "takeover")
"""What is measured of a duplex model's decisions."""


class Data(Model):
    """What to train on."""

    train: str = Field(
        description="JSON lines: `messages`, `prompt`/`completion` or `text` to say; `text` (and "
        "`text_pair`) with a `label`, or with `probabilities` by label; `tokens` with `tags`; "
        "`prompt` with `chosen` and `rejected`; dialogues in `slices`."
    )
    dev: str | None = Field(
        default=None, description="Held-out rows: what is measured before, meanwhile and after."
    )
    mix: str | None = Field(
        default=None,
        description="Rows of chat or text beside dialogues in slices, so that the model stays able "
        "to answer ordinary prompts.",
    )
    own_words: int = Field(
        default=0,
        ge=0,
        description="Beside dialogues in slices: of so many tokens, what the model says before it "
        "is trained, to users' turns that it makes up; mixed in as rows of `mix` are. Fewer where "
        "`train.max_steps` steps don't read so many.",
    )
    mix_share: float = Field(
        default=0.2, ge=0, lt=1, description="How many of all rows are of `mix` and `own_words`."
    )
    format: Literal["auto", "chat", "raw"] = Field(
        default="auto",
        description="`chat` puts prompts through the model's chat template, `raw` doesn't; `auto` "
        "does if there is one.",
    )
    max_length: int = Field(default=512, ge=8, description="Tokens of a row; longer rows are cut.")
    packing: bool = Field(
        default=False,
        description="Put several rows, kept apart, into each sequence of `max_length`: fewer "
        "steps, and no padding.",
    )
    labels: list[str] | None = Field(
        default=None,
        min_length=2,
        description="The labels that there are, in their order; those of `train` if not given.",
    )

    @model_validator(mode="after")
    def _each_label_once(self) -> Data:
        labels = self.labels or []
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise contradiction("labels", f"`{twice}` is there twice")
        return self


class Scheme(Model):
    """Of `task: duplex`: which marks stand between slices, and which tokens they are."""

    name: Literal["idle", "state", "minicpm"] = Field(
        default="idle",
        description="`idle`: one token of silence; `state`: the agent says first what the user "
        "does; `minicpm`: the layout of MiniCPM-duplex.",
    )
    tokens: Literal["auto", "spare", "added"] | dict[str, str] = Field(
        default="auto",
        description="`spare`: special tokens that nothing uses; `added`: new ones; `auto`: spare "
        "if there are enough; or the tokens by mark, as `{idle: …, user: …, agent: …}`.",
    )


class SliceOptions(Model):
    """Of `task: duplex`: what a slice is, and how silence is told."""

    period_ms: int = Field(default=1000, ge=1, description="How long a slice is, in milliseconds.")
    agent_tokens: int = Field(default=10, ge=1, description="What the agent says in a slice.")
    collapse_idle: bool = Field(
        default=True, description="Whether silence takes one pair of slices, however long it is."
    )
    threshold: float | Literal["calibrate", "argmax"] = Field(
        default="calibrate",
        description="The model speaks where silence is less likely than this; `calibrate` finds it "
        "on `data.dev`, with `argmax` it speaks where silence isn't the likeliest.",
    )

    @model_validator(mode="after")
    def _probability(self) -> SliceOptions:
        if isinstance(self.threshold, float) and not 0 < self.threshold < 1:
            raise contradiction("threshold", "a probability is between 0 and 1")
        return self


class Weights(Model):
    """Of `task: duplex`: what the agent's tokens count in the loss."""

    decision: float = Field(
        default=2.0, ge=0, description="The first of a slice: silence, or what is said."
    )
    text: float = Field(default=1.0, ge=0, description="The others of what is said.")
    end: float = Field(default=1.0, ge=0, description="The end of a slice.")


class TuneTrain(Train):
    """How to train, and what to leave of it."""

    tensorboard: bool = Field(
        default=False,
        description="Leave a file for TensorBoard as well; needs bmkit[tensorboard].",
    )


OWN_LONGEST = 512
"""Tokens of a row of what the model says itself, at most; half of a chat are an answer's."""


class TuneRecipe(Recipe):
    """`bmkit tune`."""

    METRICS: ClassVar = (
        "train_loss",
        "dev_loss",
        "dev_loss_before",
        "dev_accuracy",
        "dev_accuracy_before",
        "dev_f1",
        "dev_f1_before",
        *(f"dev_{name}{when}" for name in DECISIONS for when in ("", "_before", "_by_threshold")),
        *(f"dev_right_{tag}{when}" for tag in TAGS for when in ("", "_before")),
        "threshold",
        "steps",
        "best_step",
        "lost_share_left",
        "tokens",
        "trainable_parameters",
        "delta_bytes",
    )
    FILES: ClassVar = ("data.train", "data.dev", "data.mix")
    MODELS: ClassVar = ("original",)

    kind: Literal["tune"]
    dtype: Literal["auto", "float32", "bfloat16", "float16", "quickest"] = Field(  # type: ignore[assignment]
        default="auto",
        description="`auto` computes in the stored dtype on a GPU that can, else in float32; "
        "`quickest` does so on a processor with AMX too, if that is bfloat16, and nothing of the "
        "model itself is trained.",
    )
    task: Task = Field(
        default="auto",
        description="What the model is to do; `auto` goes by the rows, else by the model.",
    )
    deltas: list[Delta] = Field(
        default=[], description="What to train beside the model; several work together."
    )
    unfreeze: list[str] = Field(
        default=[],
        description="Modules of the model that are trained as well, addressed as `target_modules` "
        "are; `all` is the whole model.",
    )
    original: str | None = Field(
        default=None,
        description="The model that a rounded or pruned one was made from: `lora` begins with the "
        "best approximation of what was lost (LoftQ, arXiv 2310.08659), not with nothing.",
    )
    strength: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="How much of what `lora` has learned goes into the result: a little less "
        "forgets less of what the model could do before (arXiv 2109.01903).",
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        description="Of `task: preference`: how far the model is held to what it said before.",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Of rows with `probabilities`: how much flatter they, and what the model says, "
        "are made in training.",
    )
    scheme: Scheme = Scheme()
    slice: SliceOptions = SliceOptions()
    weights: Weights = Weights()
    data: Data
    train: TuneTrain = TuneTrain()
    cache_states: bool | Literal["auto"] = Field(
        default="auto",
        description="Where only the last blocks are trained, keep what the first ones say of each "
        "row, for the next epochs; `auto` does so if there are any.",
    )
    merge: bool = Field(
        default=False, description="Write the delta merged into its base, as a model."
    )

    def settled(self, config: Mapping[str, Any], files: Mapping[str, Path]) -> TuneRecipe:
        """Return it with the dtype that `quickest` means here."""
        from bmkit.tune.task import quickest  # it knows the recipe

        if self.dtype != "quickest":
            return self
        return self.model_copy(update={"dtype": quickest(self, config, files["data.train"])})

    def own_words(self, processes: int) -> int:
        """Return how many tokens the model is to say itself: no more than its rows can hold."""
        data, train = self.data, self.train
        if not data.mix_share:
            return 0
        if train.max_steps < 0:
            return data.own_words
        size = train.per_device_train_batch_size * train.gradient_accumulation_steps
        rows = math.ceil(train.max_steps * size * processes * data.mix_share)
        return min(data.own_words, rows * min(data.max_length, OWN_LONGEST))

    @model_validator(mode="after")
    def _something_is_trained(self) -> TuneRecipe:
        if not self.deltas and not self.unfreeze:
            raise contradiction("deltas", "nothing is trained: name a delta, or `unfreeze` modules")
        if not self.deltas and not self.merge:
            raise contradiction(
                "merge", "it has to be true: without `deltas` there is only a model"
            )
        if "all" in self.unfreeze and self.deltas:
            raise contradiction("unfreeze", "`all` goes without `deltas`")
        names(self.deltas)
        plain = [d for d in self.deltas if d.type == "lora"]
        if self.original is not None and (
            len(plain) != 1
            or plain[0].use_dora
            or plain[0].target_parameters
            or plain[0].init_lora_weights != "default"
        ):
            raise contradiction(
                "original",
                "it goes with one `lora`, without DoRA, `init_lora_weights` or `target_parameters`",
            )
        if self.strength < 1 and (
            self.original is not None
            or any(d.use_dora or d.init_lora_weights in ("pissa", "olora") for d in plain)
        ):
            raise contradiction(
                "strength",
                "below 1 it goes without DoRA, `pissa`, `olora` and `original`",
            )
        if sum(delta.PROMPT for delta in self.deltas) > 1:
            raise contradiction("deltas", "only one may stand in front of what the model reads")
        return self

    @model_validator(mode="after")
    def _dev_for_what_needs_it(self) -> TuneRecipe:
        wants = ("load_best_model_at_end", "early_stopping_patience")
        ranks = any(delta.type == "adalora" for delta in self.deltas)
        for name in wants:
            if getattr(self.train, name) and ranks:
                raise contradiction(
                    f"train.{name}", f"{name}: adalora's ranks are right at the end alone"
                )
            if getattr(self.train, name) and self.data.dev is None:
                raise contradiction(f"train.{name}", f"{name} needs data.dev")
        for name in self.gates:
            if name in self.METRICS and name.startswith("dev_") and self.data.dev is None:
                raise contradiction(f"gates.{name}", f"{name} is measured with data.dev alone")
        return self
