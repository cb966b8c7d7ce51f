"""Steps that move sizes between layers before rounding: what a recipe may say of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bmkit.recipe import Model


class Awq(Model):
    """Make the weights larger whose inputs are large, so that rounding hurts them less."""

    method: Literal["awq"]
    tries: int = Field(
        default=20, ge=2, le=100, description="How many strengths are tried at each place."
    )


class SmoothQuant(Model):
    """Make inputs alike in size, and their weights larger, before both are rounded."""

    method: Literal["smoothquant"]
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="How much of the inputs' range weights take over."
    )
