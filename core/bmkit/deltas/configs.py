"""What PEFT is told of a delta: one function a method, from what the recipe says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bmkit.deltas.recipe import (
    AdaLora,
    Adapter,
    BitFit,
    Boft,
    Compacter,
    Ia3,
    LayerNorm,
    Lora,
    LowRankAdapter,
    Oft,
    ParallelAdapter,
    Prefix,
    Prompt,
    PTuning,
    TrainableTokens,
    Vera,
)
from bmkit.errors import RecipeError


@dataclass(frozen=True)
class Place:
    """Where a delta goes, and what its model is for."""

    modules: Sequence[str] = ()
    """Full names of the modules that it is put beside, so that PEFT has nothing to interpret."""
    inputs: Sequence[str] = ()
    """Of a second list of modules that some methods have."""
    parameters: Sequence[str] = ()
    """Full names of parameters of experts."""
    task_type: str | None = None
    """One of PEFT's, as `CAUSAL_LM`; None where it has none."""
    modules_to_save: Sequence[str] = ()
    """Modules of the model that are trained and kept with the delta."""
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Rows that are trained and kept with the delta, by full names of embeddings or heads."""
    tokenizer: Any = None
    tokenizer_path: str | None = None
    hidden: int = 0
    """The model's width."""

    @property
    def common(self) -> dict[str, Any]:
        """Return what all configs have."""
        found: dict[str, Any] = {"task_type": self.task_type}
        if self.modules_to_save:
            found["modules_to_save"] = sorted(self.modules_to_save)
        return found


def _whole(value: float) -> float:
    """Return 16.0 as 16: PEFT's configs are told apart by it."""
    return int(value) if value == int(value) else value


def lora(spec: Lora, place: Place) -> Any:
    """Return PEFT's config of low-rank updates; `pissa` and `olora` change the base's weights."""
    from peft import LoraConfig

    init: Any = True if spec.init_lora_weights == "default" else spec.init_lora_weights
    return LoraConfig(
        r=spec.r,
        lora_alpha=_whole(spec.lora_alpha),
        lora_dropout=spec.lora_dropout,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        init_lora_weights=init,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern={name: _whole(value) for name, value in spec.alpha_pattern.items()},
        target_modules=sorted(place.modules),
        target_parameters=sorted(place.parameters) or None,
        trainable_token_indices={name: list(rows) for name, rows in place.rows.items()} or None,
        **place.common,
    )


def adalora(spec: AdaLora, place: Place) -> Any:
    """Return PEFT's config of low-rank updates whose ranks fall while they are trained.

    When they do is said once it is known how many steps there are (`train.ranks`).
    """
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        init_r=spec.init_r,
        target_r=spec.target_r,
        lora_alpha=_whole(spec.lora_alpha),
        lora_dropout=spec.lora_dropout,
        orth_reg_weight=spec.orth_reg_weight,
        total_step=1,
        target_modules=sorted(place.modules),
        **place.common,
    )


def ia3(spec: Ia3, place: Place) -> Any:
    """Return PEFT's config of learned scales; `place.inputs` are those of the feed-forward."""
    from peft import IA3Config

    return IA3Config(
        target_modules=sorted(place.modules),
        feedforward_modules=sorted(set(place.inputs) & set(place.modules)),
        **place.common,
    )


def vera(spec: Vera, place: Place) -> Any:
    """Return PEFT's config of scales between shared random matrices, which are drawn anew."""
    from peft import VeraConfig

    return VeraConfig(
        r=spec.r,
        vera_dropout=spec.vera_dropout,
        d_initial=spec.d_initial,
        save_projection=True,
        target_modules=sorted(place.modules),
        **place.common,
    )


def oft(spec: Oft, place: Place) -> Any:
    """Return PEFT's config of rotated inputs."""
    from peft import OFTConfig

    return OFTConfig(
        r=0,
        oft_block_size=spec.oft_block_size,
        module_dropout=spec.module_dropout,
        target_modules=sorted(place.modules),
        **place.common,
    )


def boft(spec: Boft, place: Place) -> Any:
    """Return PEFT's config of rotations made of butterflies."""
    from peft import BOFTConfig

    return BOFTConfig(
        boft_block_size=spec.boft_block_size,
        boft_n_butterfly_factor=spec.boft_n_butterfly_factor,
        target_modules=sorted(place.modules),
        **place.common,
    )


def layer_norm(spec: LayerNorm, place: Place) -> Any:
    """Return PEFT's config of trained norms."""
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=sorted(place.modules), **place.common)


def trainable_tokens(spec: TrainableTokens, place: Place) -> Any:
    """Return PEFT's config of trained rows of the embedding.

    Raises RecipeError for a text that isn't one token of the model's.
    """
    from peft import TrainableTokensConfig

    indices = [_token(place.tokenizer, token) for token in spec.tokens]
    return TrainableTokensConfig(token_indices=sorted(set(indices)), **place.common)


def _token(tokenizer: Any, token: str | int) -> int:
    size = len(tokenizer)
    if isinstance(token, int):
        if not 0 <= token < size:
            raise RecipeError(
                f"tokens: there is no token {token}", hint=f"they are 0 to {size - 1}"
            )
        return token
    known: int | None = tokenizer.get_vocab().get(token)
    if known is not None:
        return known
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise RecipeError(
            f"tokens: `{token}` is {len(ids)} tokens of this model",
            hint="name one of its tokens, or its number",
        )
    return int(ids[0])


def prefix(spec: Prefix, place: Place) -> Any:
    """Return PEFT's config of keys and values that stand in front, in each layer."""
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        num_virtual_tokens=spec.num_virtual_tokens,
        prefix_projection=spec.prefix_projection,
        encoder_hidden_size=spec.encoder_hidden_size or place.hidden,
        task_type=place.task_type,
    )


def prompt(spec: Prompt, place: Place) -> Any:
    """Return PEFT's config of vectors in front of the embedded tokens."""
    from peft import PromptTuningConfig

    return PromptTuningConfig(
        num_virtual_tokens=spec.num_virtual_tokens,
        prompt_tuning_init=spec.prompt_tuning_init.upper(),
        prompt_tuning_init_text=spec.prompt_tuning_init_text,
        tokenizer_name_or_path=place.tokenizer_path if spec.prompt_tuning_init_text else None,
        task_type=place.task_type,
    )


def p_tuning(spec: PTuning, place: Place) -> Any:
    """Return PEFT's config of such vectors out of an encoder."""
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(
        num_virtual_tokens=spec.num_virtual_tokens,
        encoder_reparameterization_type=spec.encoder_reparameterization_type,
        encoder_hidden_size=spec.encoder_hidden_size or place.hidden,
        encoder_num_layers=spec.encoder_num_layers,
        encoder_dropout=spec.encoder_dropout,
        task_type=place.task_type,
    )


def _bottleneck(spec: Any, **more: Any) -> dict[str, Any]:
    names = ("bottleneck_dim", "reduction_factor", "non_linearity", "scale", "dropout")
    return {name: getattr(spec, name) for name in names} | more


def adapter(spec: Adapter, place: Place) -> Any:
    """Return the config of bottlenecks behind modules."""
    from bmkit.deltas.own import AdapterConfig

    return AdapterConfig(target_modules=sorted(place.modules), **_bottleneck(spec), **place.common)


def parallel_adapter(spec: ParallelAdapter, place: Place) -> Any:
    """Return the config of bottlenecks beside modules; `place.inputs` are those that are read."""
    from bmkit.deltas.own import ParallelAdapterConfig

    return ParallelAdapterConfig(
        target_modules=sorted(place.modules),
        input_modules=sorted(place.inputs) or None,
        **_bottleneck(spec),
        **place.common,
    )


def compacter(spec: Compacter, place: Place) -> Any:
    """Return the config of bottlenecks of sums of Kronecker products."""
    from bmkit.deltas.own import AdapterConfig

    more = {
        name: getattr(spec, name)
        for name in ("hypercomplex_division", "phm_rank", "shared_phm_rule", "learn_phm")
    }
    return AdapterConfig(
        target_modules=sorted(place.modules),
        linear="phm",
        **_bottleneck(spec, **more),
        **place.common,
    )


def low_rank_adapter(spec: LowRankAdapter, place: Place) -> Any:
    """Return the config of bottlenecks of thin matrices."""
    from bmkit.deltas.own import AdapterConfig

    return AdapterConfig(
        target_modules=sorted(place.modules),
        linear="low_rank",
        **_bottleneck(spec, low_rank_rank=spec.low_rank_rank),
        **place.common,
    )


def bitfit(spec: BitFit, place: Place) -> Any:
    """Return the config of trained biases."""
    from bmkit.deltas.own import BitFitConfig

    return BitFitConfig(target_modules=sorted(place.modules), **place.common)
