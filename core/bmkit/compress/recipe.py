"""What a compress recipe may say. No torch here: `validate` and `--plan` stay fast."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from bmkit.compress.options.experts import Moefy
from bmkit.compress.options.foreign import OptimumGptq, Quanto
from bmkit.compress.options.learning import Distill
from bmkit.compress.options.rounding import Gptq, Quantize
from bmkit.compress.options.scaling import Awq, SmoothQuant
from bmkit.compress.options.sparse import Magnitude, SparseGpt, Wanda
from bmkit.compress.options.structure import DropLayers, FrequentTokens, Gates, Shrink
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
    Quantize
    | Gptq
    | Awq
    | SmoothQuant
    | Magnitude
    | Wanda
    | SparseGpt
    | DropLayers
    | Shrink
    | Gates
    | Moefy
    | Distill
    | FrequentTokens
    | Quanto
    | OptimumGptq,
    Field(discriminator="method"),
]
ROUNDING = ("quantize", "gptq", "quanto", "optimum_gptq")
"""Methods whose result is packed."""
SPARSE = ("magnitude", "wanda", "sparsegpt")
"""Methods that set weights to zero."""
SCALING = ("awq", "smoothquant")
"""Methods that divide what goes into layers."""
STRUCTURE = ("drop_layers", "shrink", "gates")
"""Methods that leave parts out."""
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
        "places",
        "error_left",
        "perplexity",
        "perplexity_before",
        "perplexity_ratio",
        "disk_bytes",
        "disk_ratio",
        "nonzeros",
        "flops_per_token",
        "decode",
        "decode_before",
        "decode_ratio",
        "prefill",
        "prefill_before",
        "prefill_ratio",
        "layers",
        "parameters",
        "parameters_ratio",
        "expected_ratio",
        "agreement",
        "agreement_before",
        "train_loss",
        "covered",
        "active",
        "energy",
        "router_recall",
    )
    FILES: ClassVar = ("data.calibration",)
    MODELS: ClassVar = ("steps.*.teacher",)

    kind: Literal["compress"]
    data: Data = Data()
    measure_speed: bool = Field(
        default=True,
        description="Whether to time speaking and reading, before and after each step; the models "
        "are opened for that.",
    )
    steps: list[Step] = Field(min_length=1, description="What to do, in order.")

    @model_validator(mode="after")
    def _scaling_comes_before_rounding(self) -> CompressRecipe:
        for step, after in zip(self.steps, [*self.steps[1:], None], strict=True):
            if isinstance(step, Awq | SmoothQuant) and not isinstance(after, Quantize | Gptq):
                raise contradiction(
                    "steps", f"`{step.method}` scales for a grid: `quantize` or `gptq` follows it"
                )
            rounds_inputs = isinstance(after, Quantize) and after.activations is not None
            if isinstance(step, SmoothQuant) and not rounds_inputs:
                raise contradiction(
                    "steps",
                    "`smoothquant` makes weights harder to round and inputs easier: it helps where "
                    "`quantize` with `activations` follows",
                )
        return self

    @model_validator(mode="after")
    def _what_is_trained_for_rounding_is_rounded(self) -> CompressRecipe:
        behind = [*self.steps[1:], None]
        for step, after in zip(self.steps, behind, strict=True):
            if isinstance(step, Distill) and step.qat and not isinstance(after, Quantize):
                raise contradiction(
                    "steps", "`qat: true` trains for the rounding of a `quantize` right behind it"
                )
        return self

    @model_validator(mode="after")
    def _rounding_comes_last(self) -> CompressRecipe:
        kinds = [step.method for step in self.steps]
        if early := next((kind for kind in kinds[:-1] if kind in ROUNDING), None):
            raise contradiction(
                "steps", f"`{early}` comes last: what follows would work on rounded weights"
            )
        return self

    @model_validator(mode="after")
    def _structure_comes_before_zeros(self) -> CompressRecipe:
        kinds = [step.method for step in self.steps]
        if "moefy" in kinds:
            behind = [
                k for k in kinds[kinds.index("moefy") :] if k in ("shrink", "gates", *SCALING)
            ]
            if behind:
                raise contradiction(
                    "steps",
                    f"`{behind[0]}` does not go behind `moefy`: its routers choose among the "
                    "neurons, and by the inputs, that there were when they were made",
                )
        sparse = next((i for i, kind in enumerate(kinds) if kind in SPARSE), len(kinds))
        if late := next((kind for kind in kinds[sparse:] if kind in STRUCTURE), None):
            raise contradiction(
                "steps",
                f"`{late}` comes before `{kinds[sparse]}`: what is cut away needs no zeros, and "
                "what makes up for it would fill them",
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
