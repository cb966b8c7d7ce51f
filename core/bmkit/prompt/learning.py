"""What a prompt recipe says of learning: what is trained, and on how many rows. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bmkit.deltas.recipe import Delta, names
from bmkit.recipe import Model, contradiction
from bmkit.train.recipe import Train


class Trained(Model):
    """What is trained."""

    mode: Literal["none", "soft", "delta", "full"] = Field(
        default="none",
        description="`soft`: the template's soft tokens; `delta`: those and `deltas`; `full`: the "
        "whole model with them, which is kept in the prompt.",
    )
    deltas: list[Delta] = Field(
        default=[],
        description="What to train beside the model, with the keys that they have in `tune`.",
    )
    encoder: Literal["none", "mlp", "lstm"] = Field(
        default="none",
        description="What soft tokens come out of while they are trained; only they are kept.",
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="Another learning rate for soft tokens."
    )

    @model_validator(mode="after")
    def _says_what_it_trains(self) -> Trained:
        if self.mode == "none":
            for name in ("encoder", "learning_rate"):
                if getattr(self, name) not in (None, "none"):
                    raise contradiction(name, "it says nothing with `mode: none`")
        if self.mode != "delta" and self.deltas:
            raise contradiction("deltas", f"`mode: {self.mode}` has none")
        if self.mode == "delta" and not self.deltas:
            raise contradiction("deltas", "`mode: delta` takes one at least")
        names(self.deltas)
        if sum(delta.PROMPT for delta in self.deltas) > 1:
            raise contradiction("deltas", "only one may stand in front of what the model reads")
        return self


class LearningSetting(Model):
    """From how many rows is learned."""

    type: Literal["zero_shot", "few_shot", "full"] = Field(
        default="zero_shot", description="From none, a few of each label, or all of `data.train`."
    )
    num_examples_per_label: int | None = Field(
        default=None, ge=1, description="Of `few_shot`: rows of each label."
    )
    num_examples_total: int | None = Field(
        default=None, ge=1, description="Of `few_shot`: rows of any label."
    )
    seeds: list[int] = Field(
        default=[],
        description="A draw and a run for each, whose metrics are averaged; `seed` if not given.",
    )

    @model_validator(mode="after")
    def _says_how_many(self) -> LearningSetting:
        counts = ("num_examples_per_label", "num_examples_total")
        said = [name for name in counts if getattr(self, name) is not None]
        if self.type == "few_shot" and len(said) != 1:
            raise contradiction(
                said[1] if said else "type", f"`few_shot` takes one of {' and '.join(counts)}"
            )
        if self.type != "few_shot" and said:
            raise contradiction(said[0], f"it says nothing with `type: {self.type}`")
        if self.type == "zero_shot" and self.seeds:
            raise contradiction("seeds", "nothing is drawn with `type: zero_shot`")
        if len(set(self.seeds)) != len(self.seeds):
            raise contradiction("seeds", "one comes twice")
        if any(not 0 <= seed < 2**32 for seed in self.seeds):
            raise contradiction("seeds", "a seed is a number from 0 to 2**32 - 1")
        return self


class PromptTrain(Train):
    """How to train, and how many rows are asked together."""

    per_device_eval_batch_size: int = Field(
        default=32, ge=1, description="Rows that are asked together."
    )
