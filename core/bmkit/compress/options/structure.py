"""Steps that leave parts of a model out: what a recipe may say of them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from bmkit.recipe import Model, contradiction
from bmkit.train.recipe import Train


class DropLayers(Model):
    """Leave whole layers out."""

    method: Literal["drop_layers"]
    keep: int | list[int] = Field(
        description="How many layers stay, spread evenly over the depth; or their numbers, from 0."
    )

    @model_validator(mode="after")
    def _some_stay(self) -> DropLayers:
        numbers = self.keep if isinstance(self.keep, list) else [self.keep - 1]
        if not numbers or min(numbers) < 0 or sorted(set(numbers)) != numbers:
            raise contradiction("keep", "it takes a number of layers, or their numbers, ascending")
        return self


Unit = Literal["ffn", "heads", "layers", "hidden"]


class _Widths(Model):
    parameters: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="The share of the blocks' parameters that stays; embeddings don't count.",
    )
    units: list[Unit] = Field(
        default=["ffn"],
        min_length=1,
        description="With `parameters`: what is cut, all of them alike.",
    )
    multiple_of: int = Field(
        default=32, ge=1, description="With `parameters`: what widths are multiples of."
    )
    intermediate_size: int | None = Field(
        default=None, ge=1, description="How many neurons of each feed-forward network stay."
    )
    num_key_value_heads: int | None = Field(
        default=None,
        ge=1,
        description="How many groups of heads that share keys and values stay in each layer.",
    )
    num_hidden_layers: int | None = Field(default=None, ge=1, description="How many layers stay.")
    hidden_size: int | None = Field(
        default=None, ge=1, description="How many channels of the hidden states stay."
    )
    refit: bool = Field(
        default=True, description="Whether what stays makes up for what goes, by least squares."
    )
    damp: float = Field(
        default=0.01, gt=0, le=1, description="Added to the curvature, of its diagonal's mean."
    )

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        counts = {name for name in COUNTS if getattr(self, name) is not None}
        if (self.parameters is not None) == bool(counts):
            raise contradiction(
                "parameters", f"it takes either a share, or some of {', '.join(COUNTS)}"
            )
        if counts and {"units", "multiple_of"} & self.model_fields_set:
            raise contradiction("units", "`units` and `multiple_of` go with `parameters`")
        return self


COUNTS = ("intermediate_size", "num_key_value_heads", "num_hidden_layers", "hidden_size")


class Shrink(_Widths):
    """Cut what carries least, the same number in all layers, as stock configs hold it."""

    method: Literal["shrink"]


class GateTrain(Train):
    """How to train gates: a rate that is as good for the multipliers."""

    learning_rate: float = Field(default=0.1, gt=0, description="Of gates and multipliers.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial"
    ] = Field(default="constant", description="How the learning rate falls.")
    warmup_steps: float = Field(
        default=0, ge=0, description="Steps of warm-up; below 1, a share of all steps."
    )


class Gates(_Widths):
    """Let gates on activations learn what stays, while the model says what it said."""

    method: Literal["gates"]
    warmup: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="The share of the training after which only as many gates are to be open.",
    )
    likeliest: int = Field(
        default=16, ge=1, le=256, description="Of the teacher's distribution, so many tokens."
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Softens both distributions before they are compared."
    )
    train: GateTrain = GateTrain()


class FrequentTokens(Model):
    """Let the output head say only the tokens that are said most: for drafts."""

    method: Literal["frequent_tokens"]
    tokens: int = Field(default=8192, ge=1, description="How many tokens.")
