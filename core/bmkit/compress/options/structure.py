"""Steps that leave parts of a model out: what a recipe may say of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bmkit.recipe import Model, contradiction


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


class FrequentTokens(Model):
    """Let the output head say only the tokens that are said most: for drafts."""

    method: Literal["frequent_tokens"]
    tokens: int = Field(default=8192, ge=1, description="How many tokens.")
