"""What a recipe may say about a delta. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from bmkit.errors import did_you_mean
from bmkit.recipe import Model, contradiction

NON_LINEARITIES = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python"),
    *("gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear"),
    *("mish", "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu"),
    *("sqrtsoftplus", "swish", "tanh", "xielu"),
)
"""Activations by transformers' names."""
INSIDE = ("attn.o", "mlp.down")
"""Behind attention and behind the feed-forward, in each block."""


def _written(value: Any) -> str:
    return "text" if isinstance(value, str) else "list"


Layers = Annotated[
    Annotated[list[int], Tag("list")] | Annotated[str, Tag("text")], Discriminator(_written)
]
"""Numbers of blocks, or a text of numbers and ranges."""


class _Delta(Model):
    PROMPT: ClassVar = False
    """Whether it stands in front of what the model reads, and goes to no module."""

    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]+$",
        description="What the delta is called in the artifact; its type if not given.",
    )

    @property
    def targets(self) -> dict[str, Any]:
        """Return what says where it goes, by the names that `address.matched` has for it."""
        return {}


class _Targeted(_Delta):
    KINDS: ClassVar[tuple[str, ...]] = ("linear", "norm", "embedding", "block")
    """What it can go to."""

    target_modules: list[str] | Literal["all-linear"] = Field(
        default=list(INSIDE),
        description="Where it goes: ends of modules' names, roles (`attn.q`, `mlp`, `norm`), "
        "`[r]` and a regular expression, or `all-linear`.",
    )
    exclude_modules: list[str] = Field(default=[], description="Modules to leave out.")
    layers: Layers | None = Field(
        default=None, description="Numbers of the blocks to train in, or `20-29`; all if not given."
    )
    last: int | None = Field(default=None, ge=1, description="In so many of the last blocks alone.")

    @model_validator(mode="after")
    def _one_choice_of_layers(self) -> _Targeted:
        if self.layers is not None and self.last is not None:
            raise contradiction("last", "it goes without `layers`")
        return self

    @property
    def targets(self) -> dict[str, Any]:
        """Return what says where it goes."""
        names = ("target_modules", "exclude_modules", "layers", "last")
        return {name: getattr(self, name) for name in names}


class _Linear(_Targeted):
    KINDS: ClassVar[tuple[str, ...]] = ("linear",)
    target_modules: list[str] | Literal["all-linear"] = Field(
        default="all-linear",
        description="Linear layers to train beside, by the end of their names, by roles or `[r]` "
        "and a regular expression; `all-linear` is every one but the output head.",
    )


class Lora(_Linear):
    """Low-rank updates beside frozen linear layers (LoRA, arXiv 2106.09685), carried by PEFT."""

    KINDS = ("linear", "embedding")
    type: Literal["lora"]
    r: int = Field(default=8, ge=1, description="Rank of the update.")
    lora_alpha: float = Field(default=16, gt=0, description="The update is scaled by alpha / r.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the update.")
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(r) instead.")
    use_dora: bool = Field(
        default=False, description="Train the length of weights apart (DoRA, arXiv 2402.09353)."
    )
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = Field(
        default="default",
        description="What the update begins with: `pissa` (arXiv 2404.02948) and `olora` (arXiv "
        "2406.01775) take the largest part of the weight out of it and train that.",
    )
    rank_pattern: dict[str, int] = Field(
        default={}, description="Other ranks, by the end of modules' names."
    )
    alpha_pattern: dict[str, float] = Field(
        default={}, description="Other alphas, by the end of modules' names."
    )
    target_parameters: list[str] = Field(
        default=[],
        description="Parameters that hold the matrices of all experts in one, by the end of their "
        "names, as `experts.gate_up_proj`; each expert gets an update of its own.",
    )

    @model_validator(mode="after")
    def _plain_on_parameters(self) -> Lora:
        if not self.target_parameters:
            return self
        if self.lora_dropout or self.use_dora:
            name = "use_dora" if self.use_dora else "lora_dropout"
            raise contradiction(name, "it can't be had with `target_parameters`")
        if self.init_lora_weights not in ("default", "gaussian"):
            raise contradiction(
                "init_lora_weights",
                f"`{self.init_lora_weights}` can't be had with `target_parameters`",
            )
        return self


class AdaLora(_Linear):
    """LoRA whose ranks go to where they are worth most (AdaLoRA, arXiv 2303.10512), by PEFT."""

    type: Literal["adalora"]
    init_r: int = Field(default=12, ge=1, description="Rank of each update at the beginning.")
    target_r: int = Field(default=8, ge=1, description="Mean rank at the end.")
    lora_alpha: float = Field(default=32, gt=0, description="The update is scaled by alpha / r.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the update.")
    orth_reg_weight: float = Field(
        default=0.5, ge=0, description="Weight of the penalty that keeps directions orthogonal."
    )

    @model_validator(mode="after")
    def _falls(self) -> AdaLora:
        if self.target_r > self.init_r:
            raise contradiction("target_r", "ranks only fall: it is above init_r")
        return self


class Ia3(_Targeted):
    """Learned scales of keys, values and the feed-forward (IA3, arXiv 2205.05638), by PEFT."""

    KINDS = ("linear",)
    type: Literal["ia3"]
    target_modules: list[str] | Literal["all-linear"] = Field(
        default=["attn.k", "attn.v", "mlp.down"], description="Linear layers whose side is scaled."
    )
    feedforward_modules: list[str] = Field(
        default=["mlp.down"],
        description="Those of them whose inputs are scaled, not their outputs.",
    )


class Vera(_Linear):
    """Scales between two random matrices that all layers share (VeRA, arXiv 2310.11454), PEFT's."""

    type: Literal["vera"]
    r: int = Field(default=256, ge=1, description="Rank of the random matrices.")
    vera_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the update.")
    d_initial: float = Field(default=0.1, description="What the inner scales begin with.")


class Oft(_Linear):
    """Rotations of a layer's inputs, block by block (OFT, arXiv 2306.07280), carried by PEFT."""

    type: Literal["oft"]
    oft_block_size: int = Field(
        default=32, ge=2, description="Inputs that are rotated together; divides all of them."
    )
    module_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="How often a block isn't rotated in training."
    )


class Boft(_Linear):
    """Rotations made of butterflies (BOFT, arXiv 2311.06243), carried by PEFT."""

    type: Literal["boft"]
    boft_block_size: int = Field(
        default=8, ge=2, description="Inputs that a factor rotates together; divides all of them."
    )
    boft_n_butterfly_factor: int = Field(default=1, ge=1, description="How many factors.")


class LayerNorm(_Targeted):
    """Norms alone are trained (LayerNorm tuning, arXiv 2312.11420), carried by PEFT."""

    KINDS = ("norm",)
    type: Literal["layer_norm"]
    target_modules: list[str] | Literal["all-linear"] = Field(
        default=["norm"], description="Norms to train, by the end of their names or by roles."
    )


class TrainableTokens(_Delta):
    """Rows of the embedding that are trained, the others aren't; carried by PEFT."""

    type: Literal["trainable_tokens"]
    tokens: list[str | int] = Field(
        min_length=1, description="Tokens by their text or their number; each must be one token."
    )


class Prefix(_Delta):
    """Keys and values in front of all others (prefix tuning, arXiv 2101.00190), by PEFT."""

    PROMPT = True
    type: Literal["prefix"]
    num_virtual_tokens: int = Field(default=6, ge=1, description="How many, in each layer.")
    prefix_projection: bool = Field(
        default=False, description="Train an embedding and an MLP that they come out of."
    )
    encoder_hidden_size: int | None = Field(
        default=None, ge=1, description="Width inside of that MLP; the model's if not given."
    )


class Prompt(_Delta):
    """Vectors in front of the embedded tokens (prompt tuning, arXiv 2104.08691), by PEFT."""

    PROMPT = True
    type: Literal["prompt"]
    num_virtual_tokens: int = Field(default=20, ge=1, description="How many.")
    prompt_tuning_init: Literal["random", "sample_vocab", "text"] = Field(
        default="sample_vocab",
        description="What they begin with: numbers, rows of the embedding, or those of a text.",
    )
    prompt_tuning_init_text: str | None = Field(
        default=None, min_length=1, description="With `text`, the text; it is repeated to fit."
    )

    @model_validator(mode="after")
    def _text_for_text(self) -> Prompt:
        if (self.prompt_tuning_init == "text") != (self.prompt_tuning_init_text is not None):
            raise contradiction(
                "prompt_tuning_init_text", "it goes with `prompt_tuning_init: text`, and only so"
            )
        return self


class PTuning(_Delta):
    """Such vectors from an LSTM or an MLP (P-tuning, arXiv 2103.10385), carried by PEFT."""

    PROMPT = True
    type: Literal["p_tuning"]
    num_virtual_tokens: int = Field(default=20, ge=1, description="How many.")
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = Field(
        default="MLP", description="What they come out of; only what comes out is kept."
    )
    encoder_hidden_size: int | None = Field(
        default=None, ge=1, description="Its width; the model's if not given."
    )
    encoder_num_layers: int = Field(default=2, ge=1, description="Of an LSTM.")
    encoder_dropout: float = Field(default=0.0, ge=0, lt=1, description="Inside of it.")


class _Bottleneck(_Targeted):
    WIDTH: ClassVar = ("bottleneck_dim", 24)
    """What says how wide it is inside, if the recipe doesn't."""

    bottleneck_dim: int | None = Field(
        default=None, ge=1, description="Width inside; 24 if neither it nor the next is given."
    )
    reduction_factor: int | None = Field(
        default=None, ge=1, description="Or the module's width over that inside."
    )
    non_linearity: str = Field(
        default="gelu_new", description="The activation inside, by transformers' names."
    )
    scale: float = Field(default=1.0, description="What the result is multiplied with.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Behind the activation.")

    @model_validator(mode="after")
    def _known_non_linearity(self) -> _Bottleneck:
        if self.non_linearity not in NON_LINEARITIES:
            known = f"there are {', '.join(NON_LINEARITIES)}"
            close = did_you_mean(self.non_linearity, NON_LINEARITIES, otherwise=known)
            text = f"transformers has no activation `{self.non_linearity}`; {close}"
            raise contradiction("non_linearity", text)
        return self

    @model_validator(mode="after")
    def _one_width(self) -> _Bottleneck:
        if self.bottleneck_dim is None and self.reduction_factor is None:
            name, value = self.WIDTH
            object.__setattr__(self, name, value)
        if self.bottleneck_dim is not None and self.reduction_factor is not None:
            raise contradiction("bottleneck_dim", "it takes it or reduction_factor, one of both")
        return self


class Adapter(_Bottleneck):
    """Bottlenecks behind modules (Houlsby et al., arXiv 1902.00751; mlp alone is Pfeiffer's)."""

    type: Literal["adapter"]


class ParallelAdapter(_Bottleneck):
    """Bottlenecks beside modules (He et al., arXiv 2110.04366)."""

    type: Literal["parallel_adapter"]
    target_modules: list[str] | Literal["all-linear"] = Field(
        default=["attn", "mlp"], description="Modules to whose outputs it adds, as in `adapter`."
    )
    input_modules: list[str] | None = Field(
        default=None, description="Modules whose inputs it reads; the same ones if not given."
    )
    scale: float = Field(default=4.0, description="What the result is multiplied with.")


class Compacter(_Bottleneck):
    """Adapters of sums of Kronecker products (Compacter, arXiv 2106.04647)."""

    WIDTH = ("reduction_factor", 16)
    type: Literal["compacter"]
    reduction_factor: int | None = Field(
        default=None, ge=1, description="The module's width over that inside; 16 if not given."
    )
    hypercomplex_division: int = Field(default=4, ge=1, description="Products in a sum.")
    phm_rank: int = Field(default=1, ge=1, description="Rank of their large factors.")
    shared_phm_rule: bool = Field(
        default=True, description="Whether all layers share the small factors."
    )
    learn_phm: bool = Field(default=True, description="Whether the small factors are trained.")


class LowRankAdapter(_Bottleneck):
    """Adapters whose matrices are products of two thin ones, of any rank."""

    WIDTH = ("reduction_factor", 32)
    type: Literal["low_rank_adapter"]
    reduction_factor: int | None = Field(
        default=None, ge=1, description="The module's width over that inside; 32 if not given."
    )
    low_rank_rank: int = Field(default=1, ge=1, description="Rank of both matrices.")


class BitFit(_Targeted):
    """Biases alone are trained, also where there were none (BitFit, arXiv 2106.10199)."""

    KINDS = ("linear", "norm")
    type: Literal["bitfit"]
    target_modules: list[str] | Literal["all-linear"] = Field(
        default=["all-linear", "norm"], description="Linear layers and norms that get a bias."
    )


Delta = Annotated[
    Lora
    | AdaLora
    | Ia3
    | Vera
    | Oft
    | Boft
    | LayerNorm
    | TrainableTokens
    | Prefix
    | Prompt
    | PTuning
    | Adapter
    | ParallelAdapter
    | Compacter
    | LowRankAdapter
    | BitFit,
    Field(discriminator="type"),
]


def names(deltas: list[Any]) -> list[str]:
    """Return what deltas are called: their own names, else their types, numbered from the second.

    Raises RecipeContradiction if two have the same.
    """
    found: list[str] = []
    for delta in deltas:
        own = delta.name or delta.type
        number = 2
        while delta.name is None and own in found:
            own, number = f"{delta.type}-{number}", number + 1
        if own in found:
            raise contradiction("deltas", f"two are called `{own}`")
        found.append(own)
    return found
