"""Steps that train: what a recipe may say of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bmkit.recipe import Model
from bmkit.train.recipe import Train


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
    train_routers: bool = Field(
        default=False,
        description="After `moefy`: whether routers learn too, or choose as they did.",
    )
    train: Train = Train()
