"""What a recipe may say about a delta. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bmkit.recipe import Model


class Lora(Model):
    """Low-rank updates beside frozen linear layers (LoRA, arXiv 2106.09685), carried by PEFT."""

    type: Literal["lora"]
    target_modules: list[str] | Literal["all-linear"] = Field(
        default="all-linear",
        description="Modules to train beside, by the end of their names; `all-linear` is every "
        "linear layer but the output head.",
    )
    exclude_modules: list[str] = Field(default=[], description="Modules to leave out.")
    layers: list[int] | None = Field(
        default=None, description="Numbers of the blocks to train in; all if not given."
    )
    r: int = Field(default=8, ge=1, description="Rank of the update.")
    lora_alpha: float = Field(default=16, gt=0, description="The update is scaled by alpha / r.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the update.")
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(r) instead.")
