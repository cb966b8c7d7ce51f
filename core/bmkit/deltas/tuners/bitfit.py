"""BitFit (arXiv 2106.10199): a trained bias, added to what a layer gives.

It is zero at the start, also where the layer has no bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from bmkit.deltas.tuners.beside import Beside, BesideConfig, BesideTuner
from bmkit.deltas.tuners.width import bare, is_linear, is_norm, output_width


@dataclass
class BitFitConfig(BesideConfig):
    """Biases of linear layers and norms."""

    kind: ClassVar[str] = "BMKIT_BITFIT"


class BitFitLayer(Beside):
    """The biases of one layer; those of several active adapters are added up."""

    attribute = "delta_bitfit"
    adapter_layer_names = ("bmkit_bitfit_bias",)

    def __init__(self, host: nn.Module, where: str) -> None:
        super().__init__(host, where)
        self.bmkit_bitfit_bias = nn.ParameterDict()
        self.unmerged: Tensor | None = None

    def changed(self, names: list[str], args: Any, kwargs: Any, h: Tensor) -> Tensor:
        """Return h and all biases."""
        for name in names:
            h = h + self.bmkit_bitfit_bias[name].to(h.dtype)
        return h

    def look(self) -> None:
        """Raise ValueError if the layer has no bias of its own."""
        if self.working() and self.own_bias() is None:
            raise ValueError(no_bias(self.where))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add biases to the layer's own. Raises ValueError if it has none, or one of its kind."""
        bias = self.own_bias()
        if bias is None:
            raise ValueError(no_bias(self.where))
        held = self._get_available_adapters()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in held:
                continue
            with torch.no_grad():
                merged = (bias.float() + self.bmkit_bitfit_bias[name].float()).to(bias.dtype)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"{self.where}: its bias would hold NaN or infinite values")
                if self.unmerged is None:
                    self.unmerged = bias.detach().clone()
                bias.copy_(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Give the layer its own bias back, bit for bit."""
        bias = self.own_bias()
        if self.unmerged is not None and bias is not None:
            with torch.no_grad():
                bias.copy_(self.unmerged)
        self.unmerged = None
        self.merged_adapters.clear()

    def own_bias(self) -> nn.Parameter | None:
        """Return the bias of the layer itself, if it has one that can be written."""
        return self.get_base_layer()._parameters.get("bias")


class BitFitTuner(BesideTuner):
    """PEFT's view of BitFit."""

    prefix = "bmkit_bitfit_"
    tuner_layer_cls = BitFitLayer

    def check(self, target: nn.Module, where: str) -> None:
        """Raise ValueError if the module is neither a linear layer nor a norm."""
        if not (is_linear(bare(target)) or is_norm(bare(target))):
            raise ValueError("it is no linear layer and no norm: BitFit has no bias for it")

    def add(self, layer: BitFitLayer, name: str, config: BitFitConfig) -> None:
        """Put a new bias behind a layer."""
        width = output_width(layer.get_base_layer())
        layer.bmkit_bitfit_bias[name] = nn.Parameter(torch.zeros(width))

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        lacking = [layer.where for layer in self.layers() if layer.own_bias() is None]
        if lacking:
            raise ValueError(no_bias(lacking[0], len(lacking) - 1))


def no_bias(where: str, others: int = 0) -> str:
    """Say that a bias can't be merged."""
    more = f", and {others} layers more" if others else ""
    return f"{where} has no bias to merge into{more}: keep the delta beside the model"
