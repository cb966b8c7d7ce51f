"""Steps that round weights: what a recipe may say of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bmkit.recipe import Model, contradiction


class _Rounding(Model):
    bits: Literal[2, 3, 4, 8] = Field(default=8, description="Bits of a weight.")
    group_size: Literal["channel", "auto", 32, 64, 128] = Field(
        default="channel",
        description="How many inputs share a scale: `channel` is all of a row; "
        "`auto` is the largest of 128, 64, 32 that divides every layer.",
    )
    symmetric: bool = Field(
        default=True,
        description="Whether zero is the middle of the grid; else each group has a zero-point.",
    )
    scale_search: int = Field(
        default=1,
        ge=1,
        le=100,
        description="How many clipping points to try per scale, keeping the least sum of squared "
        "errors times |w|; 1 keeps the largest weight exact.",
    )
    scale_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="What scales are stored in. `auto`: bfloat16 for groups, else float32.",
    )
    embeddings: Literal[8] | None = Field(
        default=None,
        description="Bits of embeddings, a scale a row, and of an output head that isn't tied to "
        "them; none leaves them as they are. Beside layers of other bits, bmkit alone reads it.",
    )
    layout: Literal["dense-zeros", "packed"] = Field(
        default="dense-zeros",
        description="`packed` stores matrices that were pruned to 2:4 without the zeros, 4-bit "
        "weights in 3 bits; bmkit alone reads that. `dense-zeros` stores the zeros.",
    )
    exclude_modules: list[str] = Field(
        default=[],
        description="Linear layers to leave as they are, by the end of their name.",
    )

    @model_validator(mode="after")
    def _packed_has_bits_that_fit(self) -> _Rounding:
        few = self.bits in {2, 3} and getattr(self, "average_bits", None) is None
        if self.layout == "packed" and few:
            raise contradiction("layout", "`packed` stores weights of 4 or 8 bits")
        return self


class Quantize(_Rounding):
    """Round the weights of linear layers to a small grid."""

    method: Literal["quantize"]
    activations: Literal["dynamic", "static"] | None = Field(
        default=None,
        description="Whether what goes into the layers is rounded to 8 bits as well: each token by "
        "its own scale, or all by one that is found on text. For `bits: 8`.",
    )

    @model_validator(mode="after")
    def _activations_go_with_rows_of_eight(self) -> Quantize:
        plain = self.bits == 8 and self.group_size == "channel" and self.symmetric
        if self.activations and not plain:
            raise contradiction(
                "activations", "it needs `bits: 8`, `group_size: channel` and a symmetric grid"
            )
        for key in ("embeddings", "layout"):
            if self.activations and getattr(self, key) not in (None, "dense-zeros"):
                raise contradiction(key, "it does not go with `activations`")
        return self


class Gptq(_Rounding):
    """Round the weights of linear layers, each making up for the errors of those before it."""

    method: Literal["gptq"]
    bits: Literal[2, 3, 4, 8] = Field(default=4, description="Bits of a weight.")
    group_size: Literal["channel", "auto", 32, 64, 128] = Field(
        default="auto", description="How many inputs share a scale, as in `quantize`."
    )
    scale_search: int = Field(
        default=20, ge=1, le=100, description="How many clipping points to try per scale."
    )
    average_bits: float | None = Field(
        default=None,
        ge=2,
        le=8,
        description="Layers get 2, 3, 4 or 8 bits, so many a weight on the average: more where "
        "rounding costs their outputs more. In the place of `bits`.",
    )
    act_order: bool = Field(
        default=True, description="Whether inputs of the largest energy are rounded first."
    )
    damp: float = Field(
        default=0.05, gt=0, le=1, description="Added to the curvature, of its diagonal's mean."
    )
