"""What a compress recipe may say. No torch here: `validate` and `--plan` stay fast."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from bmkit.recipe import Model, Recipe, contradiction
from bmkit.train.recipe import Train


class Data(Model):
    """What steps that learn or count learn from."""

    calibration: str | None = Field(
        default=None,
        description="JSON lines of texts, chats or prompts, or a text file; the model answers "
        "prompts. If not given, the model makes up the prompts as well.",
    )
    tokens: int = Field(default=65536, ge=1, description="How many tokens to learn from.")
    sequence_length: int = Field(default=512, ge=16, description="Tokens of a text at most.")
    max_new_tokens: int = Field(
        default=128, ge=1, description="Tokens of an answer that the model is let make."
    )
    temperature: float = Field(
        default=0.0, ge=0, description="Sharpness of the draw in such an answer; 0 is greedy."
    )


class Quantize(Model):
    """Round the weights of linear layers to a small grid."""

    method: Literal["quantize"]
    bits: Literal[4, 8] = Field(default=8, description="Bits of a weight.")
    group_size: Literal["channel", "auto", 32, 64, 128] = Field(
        default="channel",
        description="How many inputs share a scale: `channel` is all of a row; "
        "`auto` is the largest of 128, 64, 32 that divides every layer.",
    )
    scale_search: int = Field(
        default=1,
        ge=1,
        le=100,
        description="How many clipping points to try per scale, keeping the smallest squared error;"
        " 1 keeps the largest weight exact.",
    )
    exclude_modules: list[str] = Field(
        default=[],
        description="Modules to leave as they are, by the end of their name. Embeddings and the "
        "output head are left in any case.",
    )


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


class Distill(Model):
    """Train the model as it is by now to say what the one that the recipe began with says."""

    method: Literal["distill"]
    likeliest: int = Field(
        default=16, ge=1, le=256, description="Of the teacher's distribution, so many tokens."
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Softens both distributions before they are compared."
    )
    freeze: list[str] = Field(
        default=[], description="Modules that are not trained, by the end of their name."
    )
    train: Train = Train()


class FrequentTokens(Model):
    """Let the output head say only the tokens that are said most: for drafts."""

    method: Literal["frequent_tokens"]
    tokens: int = Field(default=8192, ge=1, description="How many tokens.")


Step = Annotated[Quantize | DropLayers | Distill | FrequentTokens, Field(discriminator="method")]


class CompressRecipe(Recipe):
    """`bmkit compress`."""

    METRICS: ClassVar = (
        "bytes_before",
        "bytes_after",
        "bytes_ratio",
        "weight_error",
        "layers",
        "parameters",
        "agreement",
        "agreement_before",
        "train_loss",
        "covered",
    )
    FILES: ClassVar = ("data.calibration",)

    kind: Literal["compress"]
    data: Data = Data()
    steps: list[Step] = Field(min_length=1, description="What to do, in order.")

    @model_validator(mode="after")
    def _rounding_comes_last(self) -> CompressRecipe:
        kinds = [step.method for step in self.steps]
        if "quantize" in kinds[:-1]:
            raise contradiction(
                "steps", "`quantize` comes last: what follows would work on rounded weights"
            )
        return self
