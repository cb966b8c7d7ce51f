"""What a recipe may say about training: TrainingArguments' names. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bmkit.recipe import Model, contradiction


class Train(Model):
    """How to train."""

    max_steps: int = Field(
        default=-1, ge=-1, description="Optimizer steps; -1 means by num_train_epochs."
    )
    num_train_epochs: float = Field(default=1.0, gt=0, description="Passes over the data.")
    learning_rate: float = Field(default=5e-4, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial"
    ] = Field(default="linear", description="How the learning rate falls.")
    warmup_steps: float = Field(
        default=0.05, ge=0, description="Steps of warm-up; below 1, a share of all steps."
    )
    per_device_train_batch_size: int = Field(default=8, ge=1, description="Rows in a batch.")
    per_device_eval_batch_size: int = Field(default=8, ge=1, description="Rows in a dev batch.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Batches in a step.")
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="Recompute activations in the backward pass: less memory, slower; `auto` does "
        "so in as many blocks as memory needs.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to it.")
    save_steps: int = Field(
        default=10, ge=1, description="Steps between checkpoints that a killed run resumes from."
    )
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps between measurements on `data.dev`; once an epoch if not given.",
    )
    load_best_model_at_end: bool = Field(
        default=False, description="Keep the weights that were best on `data.dev`, not the last."
    )
    metric_for_best_model: Literal["dev_loss", "dev_accuracy", "dev_f1", "dev_idle_f1"] | None = (
        Field(
            default=None,
            description="The figure that says which are best: `dev_loss`, or one of the task's.",
        )
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many measurements without a better one.",
    )

    @model_validator(mode="after")
    def _takes_a_step(self) -> Train:
        if self.max_steps == 0:
            raise contradiction("max_steps", "0 steps train nothing; -1 is by num_train_epochs")
        return self
