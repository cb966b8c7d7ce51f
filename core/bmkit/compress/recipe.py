"""What a compress recipe may say. No torch here: `validate` and `--plan` stay fast."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from bmkit.compress.options.experts import Moefy
from bmkit.compress.options.learning import Distill
from bmkit.compress.options.rounding import Gptq, Quantize
from bmkit.compress.options.sparse import Magnitude, SparseGpt, Wanda
from bmkit.compress.options.structure import DropLayers, FrequentTokens
from bmkit.recipe import Model, Recipe, contradiction


class Data(Model):
    """What steps that learn or count learn from."""

    calibration: str | None = Field(
        default=None,
        description="JSON lines of texts, chats or prompts, or a text file; the model answers "
        "prompts. If not given, the model makes up the prompts as well.",
    )
    tokens: int = Field(default=65536, ge=1, description="How many tokens to learn from.")
    sequence_length: int = Field(default=512, ge=16, description="Tokens of a text at most.")
    max_new_tokens: int = Field(
        default=128, ge=1, description="Tokens of an answer that the model is let make."
    )
    temperature: float = Field(
        default=0.0, ge=0, description="Sharpness of the draw in such an answer; 0 is greedy."
    )


Step = Annotated[
    Quantize | Gptq | Magnitude | Wanda | SparseGpt | DropLayers | FrequentTokens | Moefy | Distill,
    Field(discriminator="method"),
]
ROUNDING = ("quantize", "gptq")
"""Methods whose result is packed."""
_DOWN = ("down_proj", "fc2", "dense_4h_to_h", "output.dense", "wo", "c_proj")
"""What families call the matrix whose inputs are neurons."""


class CompressRecipe(Recipe):
    """`bmkit compress`."""

    METRICS: ClassVar = (
        "bytes_before",
        "bytes_after",
        "bytes_ratio",
        "weight_error",
        "output_error",
        "sparsity",
        "perplexity",
        "perplexity_before",
        "perplexity_ratio",
        "layers",
        "parameters",
        "agreement",
        "agreement_before",
        "train_loss",
        "covered",
        "active",
        "energy",
        "router_recall",
    )
    FILES: ClassVar = ("data.calibration",)

    kind: Literal["compress"]
    data: Data = Data()
    steps: list[Step] = Field(min_length=1, description="What to do, in order.")

    @model_validator(mode="after")
    def _rounding_comes_last(self) -> CompressRecipe:
        kinds = [step.method for step in self.steps]
        if early := next((kind for kind in kinds[:-1] if kind in ROUNDING), None):
            raise contradiction(
                "steps", f"`{early}` comes last: what follows would work on rounded weights"
            )
        return self

    @model_validator(mode="after")
    def _moefy_comes_before_patterns(self) -> CompressRecipe:
        kinds = [step.method for step in self.steps]
        if kinds.count("moefy") > 1:
            raise contradiction("steps", "`moefy` is there twice: experts are divided once")
        last = kinds.index("moefy") if "moefy" in kinds else 0
        for step in self.steps[:last]:
            pattern = getattr(step, "pattern", "")
            if ":" in pattern and not any(
                name.endswith(_DOWN) for name in getattr(step, "exclude_modules", [])
            ):
                raise contradiction(
                    "steps",
                    f"`moefy` comes before `{step.method}` with {pattern}: it puts neurons in "
                    "another order, and these are the inputs of down projections, whose neighbours "
                    f"the pattern counts",
                )
        return self
