"""A model's output head: what it reads, and how the model's logits follow from what it says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bmkit.train.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class Head:
    """The head of a model that was found by `find`."""

    module: nn.Module
    """Reads hidden states [..., width], says logits [..., vocabulary]."""
    offset: int = 0
    """Positions that the model puts in front of a row's own, as prompt tuning does."""
    scale: float = 1.0
    softcap: float | None = None
    """Logits are scale · what the module says, then softcap · tanh(logits / softcap)."""

    @property
    def linear(self) -> bool:
        """Tell whether the module is a weight and a bias, with no delta beside them."""
        return type(self.module) is nn.Linear

    def read(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Run `model` up to its head; return what that reads [batch, time, width].

        The positions that the model puts in front of the rows are left out.
        """
        with _diverted(self.module) as seen:
            model(**inputs)
        (hidden,) = seen
        return hidden[:, self.offset :]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the model's logits [n, vocabulary] behind `hidden` [n, width]."""
        said: Tensor = self.module(hidden)
        return _adjusted(said, self.scale, self.softcap)

    def cross_entropy(
        self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return the summed cross-entropy of `targets` [n] behind `hidden` [n, width].

        Each counts by its part of `weights` [n]. No logits are kept if the head is linear, also if
        some of its rows are trained apart; else those of all n are.
        """
        module, own = _rows_apart(self.module) or (self.module, None)
        if type(module) is nn.Linear:
            return linear_cross_entropy(
                hidden,
                module.weight,
                targets,
                bias=module.bias,
                scale=self.scale,
                softcap=self.softcap,
                weights=weights,
                own=own,
            )
        logits = self.logits(hidden).float()
        if weights is None:
            return functional.cross_entropy(logits, targets, reduction="sum")
        return functional.cross_entropy(logits, targets, reduction="none") @ weights.float()


def _rows_apart(module: Any) -> tuple[nn.Linear, tuple[Tensor, Tensor]] | None:
    """Return the linear head inside of PEFT's wrapper of trained rows, their tokens and the rows.

    None for any other module, and if no rows, or those of two deltas, are in the head's place.
    """
    adapter = getattr(module, "token_adapter", None)
    if adapter is None or adapter.merged or adapter.disable_adapters:
        return None
    base, active = adapter.get_base_layer(), adapter.active_adapters
    if type(base) is not nn.Linear or base.bias is not None or len(active) != 1:
        return None
    rows = adapter.trainable_tokens_delta[active[0]]
    return base, (torch.tensor(adapter.token_indices[active[0]], device=rows.device), rows)


@torch.no_grad()
def find(model: Any) -> Head | None:
    """Return the head of `model`, which PEFT may have wrapped, or None if there is no telling.

    Four tokens are run through the model: the head must be called once, and the logits must follow
    from what it says by a scale or a cap that the config names. What runs a model inside of itself
    (as DistributedDataParallel does) has no head here.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = getattr(core, "get_output_embeddings", lambda: None)()
    if not isinstance(module, nn.Module) or core.config.is_encoder_decoder or _hooked(module):
        return None
    config = core.config.get_text_config()
    ids = torch.arange(4, device=model.device)[None] % config.vocab_size
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, read, said: seen.append((read[0], said)))
    try:
        logits = model(input_ids=ids).logits
    finally:
        handle.remove()
    if len(seen) != 1:
        return None
    read, said = seen[0]
    if said.shape != logits.shape or read.shape[:2] != said.shape[:2]:
        return None
    for scale, softcap in _ways(config):
        if _equal(_adjusted(said, scale, softcap), logits):
            return Head(module, said.shape[1] - ids.shape[1], scale, softcap)
    return None


def prompted(model: Any) -> bool:
    """Tell whether PEFT puts virtual tokens, or keys and values, in front of the model's rows."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _hooked(module: nn.Module) -> bool:
    """Tell whether something else listens to the module, or stands in for its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(hooks) or "forward" in vars(module)


def _ways(config: Any) -> Iterator[tuple[float, float | None]]:
    """Yield the scales and caps that configs of transformers' models name."""
    yield 1.0, None
    for name in ("logit_scale", "lm_head_multiplier"):
        if isinstance(value := getattr(config, name, None), int | float):
            yield float(value), None
    if value := getattr(config, "logits_scaling", None):
        yield 1 / value, None
    if value := getattr(config, "final_logit_softcapping", None):
        yield 1.0, float(value)


def _adjusted(said: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = said if scale == 1.0 else said * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _equal(found: Tensor, logits: Tensor) -> bool:
    near = 4 * torch.finfo(found.dtype).eps
    most = float(logits.abs().max())
    if not math.isfinite(most):
        return False
    return torch.allclose(found.float(), logits.float(), rtol=near, atol=near * most)


@contextmanager
def _diverted(module: nn.Module) -> Iterator[list[Tensor]]:
    """Let `module` note what it reads, and say logits of no tokens, while the block runs."""
    seen: list[Tensor] = []

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(hidden)
        return hidden[..., :0]

    module.forward = forward
    try:
        yield seen
    finally:
        del module.forward
