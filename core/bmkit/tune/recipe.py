"""What a tune recipe may say. No torch here: `validate` and `--plan` stay fast."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from bmkit.deltas.recipe import Lora
from bmkit.recipe import Model, Recipe
from bmkit.train.recipe import Train


class Data(Model):
    """What to train on."""

    train: str = Field(
        description="JSON lines of `messages`, `prompt`/`completion` or `text` rows."
    )
    dev: str | None = Field(default=None, description="Held-out rows: loss before and after.")
    format: Literal["auto", "chat", "raw"] = Field(
        default="auto",
        description="`chat` puts prompts through the model's chat template, `raw` doesn't; `auto` "
        "does if there is one.",
    )
    max_length: int = Field(default=512, ge=8, description="Tokens of a row; longer rows are cut.")


class TuneRecipe(Recipe):
    """`bmkit tune`."""

    METRICS: ClassVar = (
        "train_loss",
        "dev_loss",
        "dev_loss_before",
        "steps",
        "tokens",
        "trainable_parameters",
    )
    FILES: ClassVar = ("data.train", "data.dev")

    kind: Literal["tune"]
    deltas: list[Lora] = Field(min_length=1, max_length=1, description="What to train.")
    data: Data
    train: Train = Train()
    merge: bool = Field(
        default=False, description="Write the delta merged into its base, as a model."
    )
