"""Steps that train: what a recipe may say of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from bmkit import env
from bmkit.errors import UsageError
from bmkit.recipe import Model, contradiction
from bmkit.train.recipe import Train

Pair = tuple[int, int]


class _OfLayers(Model):
    weight: float = Field(
        default=1.0, gt=0, description="What it counts beside the loss of the logits."
    )
    layers: Literal["auto"] | list[Pair] = Field(
        default="auto",
        description="Pairs of numbers, from 0: a layer of the student, and the teacher's that it "
        "learns from. `auto`: all of the student's, by their share of the depth.",
    )

    @model_validator(mode="after")
    def _some_layers(self) -> _OfLayers:
        if self.layers != "auto" and (
            not self.layers or min(n for pair in self.layers for n in pair) < 0
        ):
            raise contradiction("layers", "it takes `auto`, or pairs of layers' numbers, from 0")
        return self


class Hidden(_OfLayers):
    """Learn hidden states of the teacher as well."""

    projection: Literal["auto", "always"] = Field(
        default="auto",
        description="Whether a trained matrix lies between a student's states and the teacher's. "
        "`auto`: where their widths differ.",
    )


class Attention(_OfLayers):
    """Learn attention maps of the teacher as well."""


class Distill(Model):
    """Train the model as it is by now to say what its teacher says."""

    method: Literal["distill"]
    teacher: str | None = Field(
        default=None,
        description="A model with the same vocabulary. If not given, the one that the recipe "
        "began with.",
    )
    teacher_quant: Literal["int8", "int4"] | None = Field(
        default=None, description="How the teacher's weights are rounded while it is loaded."
    )
    teacher_memory: str | None = Field(
        default=None,
        description="What the teacher's weights may take, as 4GiB; the rest is streamed. If not "
        "given, all that they need.",
    )
    loss: Literal["kl", "reverse_kl"] = Field(
        default="kl",
        description="Divergence of the student from the teacher, or of the teacher from the "
        "student, which rather leaves out what the teacher may say than says what it doesn't.",
    )
    likeliest: int = Field(
        default=16, ge=1, le=256, description="Of the teacher's distribution, so many tokens."
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Softens both distributions before they are compared."
    )
    label_weight: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="The share of the loss that is the cross-entropy of the text's own tokens.",
    )
    hidden: Hidden | None = Field(
        default=None, description="Learn hidden states of the teacher as well."
    )
    attention: Attention | None = Field(
        default=None, description="Learn attention maps of the teacher as well."
    )
    qat: bool = Field(
        default=False,
        description="Train with weights rounded as the step behind it, a `quantize`, rounds them.",
    )
    activations: Literal[8] | None = Field(
        default=None,
        description="With `qat`: also round what goes into those layers, token by token, to so "
        "many bits.",
    )
    freeze: list[str] = Field(
        default=[], description="Modules that are not trained, by the end of their name."
    )
    train_routers: bool = Field(
        default=False,
        description="After `moefy`: whether routers learn too, or choose as they did.",
    )
    train: Train = Train()

    @field_validator("teacher_memory")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                env.parse_bytes(value)
            except UsageError as exc:
                raise PydanticCustomError("size", "{text}", {"text": str(exc)}) from None
        return value

    @model_validator(mode="after")
    def _keys_agree(self) -> Distill:
        if self.loss == "reverse_kl" and self.temperature != 1.0:
            raise contradiction("temperature", "`reverse_kl` takes 1: only likely tokens are known")
        if self.activations is not None and not self.qat:
            raise contradiction("activations", "it needs `qat: true`")
        return self
