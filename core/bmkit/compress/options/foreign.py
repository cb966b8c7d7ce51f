"""Steps that other libraries do: what a recipe may say of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from bmkit.recipe import Model, contradiction

_EXCLUDE: Any = Field(
    default=[], description="Linear layers to leave as they are, by the end of their name."
)


class Quanto(Model):
    """Round weights, and if wanted activations, by optimum-quanto, in its own format."""

    method: Literal["quanto"]
    weights: Literal["int2", "int4", "int8", "float8"] = Field(
        default="float8",
        description="What a weight is stored as. Scales are by row, of `int2` and `int4` by 128 "
        "inputs or the largest of 96, 64, 32 that divides.",
    )
    activations: Literal["int8", "float8"] | None = Field(
        default=None,
        description="What goes into layers and comes out of them is rounded to, by scales that are "
        "found on text.",
    )
    optimizer: Literal["hqq"] | None = Field(
        default=None,
        description="`hqq` looks for the scales of `int2` and `int4` by Half-Quadratic "
        "Quantization; else the extremes of a group give them.",
    )
    exclude_modules: list[str] = _EXCLUDE

    @model_validator(mode="after")
    def _groups_have_an_optimizer(self) -> Quanto:
        if self.optimizer and self.weights not in ("int2", "int4"):
            raise contradiction(
                "optimizer", f"`{self.weights}` has one scale a row, by its extreme"
            )
        return self


class OptimumGptq(Model):
    """Round weights by optimum's GPTQ, in the format that GPTQModel's kernels and vLLM read."""

    method: Literal["optimum_gptq"]
    bits: Literal[2, 3, 4, 8] = Field(default=4, description="Bits of a weight.")
    group_size: Literal["channel", "auto", 32, 64, 128] = Field(
        default="auto",
        description="How many inputs share a scale: `channel` is all of a row; "
        "`auto` is the largest of 128, 64, 32 that divides every layer.",
    )
    symmetric: bool = Field(default=True, description="Whether zero is the middle of the grid.")
    act_order: bool = Field(
        default=False, description="Whether inputs of the largest energy are rounded first."
    )
    damp: float = Field(
        default=0.05, gt=0, lt=1, description="Added to the curvature, of its diagonal's mean."
    )
    exclude_modules: list[str] = _EXCLUDE
