"""The parallel adapter (arXiv 2110.04366): what goes into module A changes what comes out of B.

B's output + s · up(act(down(A's input))).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bmkit.deltas.tuners.adapter import UNMERGEABLE, BottleneckTuner
from bmkit.deltas.tuners.beside import Beside, input_of
from bmkit.deltas.tuners.bottleneck import BottleneckConfig
from bmkit.deltas.tuners.width import input_width, output_width

_BLOCK = re.compile(r"^(.*?\.\d+)(?:\.|$)")


@dataclass
class ParallelAdapterConfig(BottleneckConfig):
    """Bottlenecks from the input of a module to the output of the same or another one."""

    kind: ClassVar[str] = "BMKIT_PARALLEL_ADAPTER"

    input_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names, or ends of names, of the modules whose input is read, one in the "
            "block of each of target_modules; null: these themselves."
        },
    )
    scale: float = field(
        default=4.0,
        metadata={"help": "What the bottleneck's output is times; 4 as in the paper."},
    )


class ParallelAdapterLayer(Beside):
    """The parallel adapters of one module; the changes of several active ones are added up."""

    attribute = "delta_parallel_adapter"
    adapter_layer_names = ("bmkit_parallel_adapter_layers",)

    def __init__(self, host: nn.Module, where: str) -> None:
        super().__init__(host, where)
        self.bmkit_parallel_adapter_layers = nn.ModuleDict()
        self.listening: dict[str, RemovableHandle] = {}
        self.heard: dict[str, Tensor] = {}

    @property
    def bottlenecks(self) -> nn.ModuleDict:
        """Return the adapters."""
        return self.bmkit_parallel_adapter_layers

    def listen(self, name: str, module: nn.Module) -> None:
        """Let adapter `name` read what goes into `module`, which runs before this layer's own."""
        if module is not self.host[0]:
            hear = partial(self._hear, name)
            self.listening[name] = module.register_forward_pre_hook(hear, with_kwargs=True)

    def changed(self, names: list[str], args: Any, kwargs: Any, h: Tensor) -> Tensor:
        """Return h and the changes of all adapters."""
        change = h
        for name in names:
            change = change + self.bottlenecks[name](self._input(name, args, kwargs)).to(h.dtype)
        return change

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was heard: a copy hears for itself."""
        return {**self.__dict__, "heard": {}}

    def _hear(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        if name in self.working():
            self.heard[name] = input_of(args, kwargs)

    def _input(self, name: str, args: Any, kwargs: Any) -> Tensor:
        if name not in self.listening:
            return input_of(args, kwargs)
        if name not in self.heard:
            raise ValueError(f"{self.where} ran before the module that its adapter reads")
        return self.heard.pop(name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and let it listen no more."""
        super().delete_adapter(adapter_name)
        self.heard.pop(adapter_name, None)
        if adapter_name in self.listening:
            self.listening.pop(adapter_name).remove()

    def remove(self) -> None:
        """Take this off both modules."""
        for handle in self.listening.values():
            handle.remove()
        self.listening.clear()
        super().remove()

    def look(self) -> None:
        """Raise ValueError if one works here: a non-linear function has no place in weights."""
        if self.working():
            raise ValueError(UNMERGEABLE)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError."""
        raise ValueError(UNMERGEABLE)

    def unmerge(self) -> None:
        """Do nothing, as nothing can have been merged."""


class ParallelAdapterTuner(BottleneckTuner):
    """PEFT's view of the parallel adapter."""

    prefix = "bmkit_parallel_adapter_"
    tuner_layer_cls = ParallelAdapterLayer

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        wanted = peft_config.input_modules
        names = [n for n, _ in model.named_modules() if n]
        if isinstance(wanted, str):
            self.inputs = [n for n in names if re.fullmatch(wanted, n)]
        else:
            ends = tuple(f".{end}" for end in wanted or ())
            self.inputs = [n for n in names if n in (wanted or ()) or n.endswith(ends or ("\0",))]
        if wanted and not self.inputs:
            raise ValueError(f"input_modules: the model has no module {wanted}")

    def add(self, layer: ParallelAdapterLayer, name: str, config: ParallelAdapterConfig) -> None:
        """Put a new adapter between two modules."""
        model_config = getattr(self.model, "config", None)
        read = layer.host[0]
        if config.input_modules:
            aimed = config.target_modules
            named = set() if aimed is None or isinstance(aimed, str) else set(aimed)
            others = named - {layer.where}  # they have adapters of their own
            inputs = [n for n in self.inputs if n not in others]
            read = self.model.get_submodule(source(layer.where, inputs))
        bottleneck = self.bottleneck(
            input_width(read, model_config),
            output_width(layer.get_base_layer(), model_config),
            config,
        )
        layer.listen(name, read)
        layer.bottlenecks[name] = bottleneck


def source(target: str, inputs: list[str]) -> str:
    """Return which of the modules `inputs` the adapter of `target` reads: one of the same block.

    It is `target` itself if it is among them, else the one whose name begins as `target`'s for
    longest. Raises ValueError if there is none, or several.
    """
    if target in inputs:
        return target
    block = _BLOCK.match(target)
    if block is None:
        raise ValueError("input_modules: it lies in no numbered block")
    inside = [n for n in inputs if n.startswith(f"{block[1]}.") or n == block[1]]
    shared = {n: _shared(n.split("."), target.split(".")) for n in inside}
    nearest = [n for n in inside if shared[n] == max(shared.values())]
    if len(nearest) != 1:
        what = "none" if not nearest else f"several: {', '.join(nearest)}"
        raise ValueError(f"input_modules: of them it finds {what} in {block[1]}")
    return nearest[0]


def _shared(one: list[str], other: list[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
