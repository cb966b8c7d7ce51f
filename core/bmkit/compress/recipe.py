"""What a compress recipe may say. No torch here: `validate` and `--plan` stay fast."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from bmkit.recipe import Model, Recipe


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


class CompressRecipe(Recipe):
    """`bmkit compress`."""

    METRICS: ClassVar = ("bytes_before", "bytes_after", "bytes_ratio", "weight_error")

    kind: Literal["compress"]
    steps: list[Quantize] = Field(min_length=1, max_length=1, description="What to do, in order.")
