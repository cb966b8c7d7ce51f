"""What a compress recipe may say. No torch here: `validate` and `--plan` stay fast."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

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


class Gptq(Model):
    """Round the weights of linear layers, each making up for the errors of those before it."""

    method: Literal["gptq"]
    bits: Literal[4, 8] = Field(default=4, description="Bits of a weight.")
    group_size: Literal["channel", "auto", 32, 64, 128] = Field(
        default="auto", description="How many inputs share a scale, as in `quantize`."
    )
    scale_search: int = Field(
        default=20, ge=1, le=100, description="How many clipping points to try per scale."
    )
    act_order: bool = Field(
        default=True, description="Whether inputs of the largest energy are rounded first."
    )
    damp: float = Field(
        default=0.05, gt=0, le=1, description="Added to the curvature, of its diagonal's mean."
    )
    exclude_modules: list[str] = Field(
        default=[], description="Modules to leave as they are, by the end of their name."
    )


class _Sparse(Model):
    pattern: str = Field(
        default="unstructured",
        description="`n:m`, as 2:4: n of each m inputs stay; `unstructured`: the best stay.",
    )
    sparsity: float = Field(
        default=0.5, gt=0, lt=1, description="The share of weights that go, if there is no n:m."
    )
    exclude_modules: list[str] = Field(
        default=[], description="Modules to leave as they are, by the end of their name."
    )

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, value: str) -> str:
        kept, colon, of = value.partition(":")
        right = colon and kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of)
        if value != "unstructured" and not right:
            raise contradiction("pattern", "it takes `unstructured` or n:m, as 2:4")
        return value


class Magnitude(_Sparse):
    """Set the smallest weights of linear layers to zero."""

    method: Literal["magnitude"]
    both_ways: bool = Field(
        default=False,
        description="With 2:4: two of four of each row and of each column, so that the transposed "
        "matrix is 2:4 as well.",
    )

    @model_validator(mode="after")
    def _both_ways_are_of_four(self) -> Magnitude:
        if self.both_ways and self.pattern != "2:4":
            raise contradiction("both_ways", "it needs `pattern: 2:4`")
        return self


class Wanda(_Sparse):
    """Set the weights of linear layers to zero that carry least: |w| times its input's size."""

    method: Literal["wanda"]


class SparseGpt(_Sparse):
    """Set weights of linear layers to zero, and let the others make up for it."""

    method: Literal["sparsegpt"]
    damp: float = Field(
        default=0.01, gt=0, le=1, description="Added to the curvature, of its diagonal's mean."
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


Step = Annotated[
    Quantize | Gptq | Magnitude | Wanda | SparseGpt | DropLayers | Distill | FrequentTokens,
    Field(discriminator="method"),
]
ROUNDING = ("quantize", "gptq")
"""Methods whose result is packed."""


class CompressRecipe(Recipe):
    """`bmkit compress`."""

    METRICS: ClassVar = (
        "bytes_before",
        "bytes_after",
        "bytes_ratio",
        "weight_error",
        "output_error",
        "sparsity",
        "perplexity",
        "perplexity_before",
        "perplexity_ratio",
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
        if early := next((kind for kind in kinds[:-1] if kind in ROUNDING), None):
            raise contradiction(
                "steps", f"`{early}` comes last: what follows would work on rounded weights"
            )
        return self
