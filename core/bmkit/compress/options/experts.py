"""The step that divides feed-forwards into experts: what a recipe may say of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bmkit.recipe import Model, contradiction


class Moefy(Model):
    """Divide the neurons of feed-forwards into experts, of which each token computes some."""

    method: Literal["moefy"]
    size: int = Field(default=32, ge=1, description="Neurons of an expert.")
    experts: int | None = Field(
        default=None, ge=2, description="How many experts a block has, in the place of `size`."
    )
    shared: float = Field(
        default=0.125,
        ge=0,
        lt=1,
        description="The share of neurons that every token computes: those that are used most.",
    )
    active: float = Field(
        default=0.75,
        gt=0,
        le=1,
        description="The share of neurons that a token computes, of all blocks together; shared "
        "ones count. Each block gets as many experts as pay there.",
    )
    cluster: Literal["foreseen", "coactivation", "weights"] = Field(
        default="foreseen",
        description="Which neurons make up an expert: those whose use inputs foretell alike, those "
        "that the same tokens use, or those whose weights are alike.",
    )
    router: Literal["linear", "mlp", "similarity"] = Field(
        default="linear",
        description="What tells the experts of a token: a linear layer, two layers, or without "
        "training the nearest centres of weights.",
    )
    max_loss: float = Field(
        default=1.5,
        ge=1,
        description="The result is refused if its perplexity is more than so many times that of "
        "the model that the recipe began with.",
    )

    @model_validator(mode="after")
    def _more_is_active_than_shared(self) -> Moefy:
        if self.active <= self.shared:
            raise contradiction("active", "it takes more than `shared`, which counts in it")
        return self
