"""The sequential adapter: h + s · up(act(down(h))) behind a module.

Houlsby et al. (arXiv 1902.00751) put one behind the attention and one behind the feed-forward of
each block, Pfeiffer et al. (arXiv 2005.00247) only the latter: `target_modules` says where. With
`linear: phm` it is Compacter (arXiv 2106.04647).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from bmkit.deltas.tuners.beside import Beside, BesideTuner
from bmkit.deltas.tuners.bottleneck import Bottleneck, BottleneckConfig, Rule
from bmkit.deltas.tuners.width import output_width


@dataclass
class AdapterConfig(BottleneckConfig):
    """Bottlenecks behind modules: leaves, or blocks, of which the first output is changed."""

    kind: ClassVar[str] = "BMKIT_ADAPTER"


class AdapterLayer(Beside):
    """The sequential adapters behind one module; of several active ones each reads the last's."""

    attribute = "delta_adapter"
    adapter_layer_names = ("bmkit_adapter_layers",)

    def __init__(self, host: nn.Module, where: str) -> None:
        super().__init__(host, where)
        self.bmkit_adapter_layers = nn.ModuleDict()

    @property
    def bottlenecks(self) -> nn.ModuleDict:
        """Return the adapters."""
        return self.bmkit_adapter_layers

    def changed(self, names: list[str], args: Any, kwargs: Any, h: Tensor) -> Tensor:
        """Return h changed by one adapter after the other."""
        for name in names:
            h = h + self.bottlenecks[name](h)
        return h

    def look(self) -> None:
        """Raise ValueError if one works here: a non-linear function has no place in weights."""
        if self.working():
            raise ValueError(UNMERGEABLE)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError."""
        raise ValueError(UNMERGEABLE)

    def unmerge(self) -> None:
        """Do nothing, as nothing can have been merged."""


UNMERGEABLE = "an adapter isn't linear and can't be merged into weights: keep it beside the model"


class BottleneckTuner(BesideTuner):
    """Puts bottlenecks beside modules."""

    common: tuple[Rule | None] = (None,)  # in a tuple it is no child of this module

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self.common = (None,)  # of the adapter that is now put in

    def _check_merge_allowed(self) -> None:
        raise ValueError(UNMERGEABLE)

    def bottleneck(self, inputs: int, outputs: int, config: BottleneckConfig) -> Bottleneck:
        """Make one, with the rule of those that were made for the same adapter."""
        made = Bottleneck(inputs, outputs, config, self.common[0])
        self.common = made.common
        return made

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        held = f".{cls.tuner_layer_cls.adapter_layer_names[0]}."
        if held in key:
            return key.replace(f"{held}{adapter_name}.", held)
        return str(super()._remove_adapter_name_from_key(key, adapter_name))


class AdapterTuner(BottleneckTuner):
    """PEFT's view of the sequential adapter."""

    prefix = "bmkit_adapter_"
    tuner_layer_cls = AdapterLayer

    def add(self, layer: AdapterLayer, name: str, config: AdapterConfig) -> None:
        """Put a new adapter behind a module."""
        model_config = getattr(self.model, "config", None)
        width = output_width(layer.get_base_layer(), model_config)
        layer.bottlenecks[name] = self.bottleneck(width, width, config)
