"""A delta beside a module of the model: a child of it, that hooks on what goes in and comes out.

PEFT's own layers take the place of the module that they change. Ours leave every module where it
is, so that names and keys of the base stay as they are: a block can be changed without hiding what
is inside it from other tuners, and one tuner's weights are called the same alone and among others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bmkit.deltas.tuners.width import bare

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class BesideConfig(PeftConfig):  # type: ignore[misc]
    """What bmkit's methods have in common."""

    kind: ClassVar[str]
    """The method's name in PeftType."""

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names, or ends of names, of the modules to change; a string: a regex."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out, named as in target_modules."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train whole, and to save with the delta."}
    )

    def __post_init__(self) -> None:
        """Give the config its place in PeftType."""
        super().__post_init__()
        from bmkit.deltas import own

        own.register()
        self.peft_type = PeftType(self.kind)
        if not self.target_modules:
            raise ValueError("target_modules: name the modules to change")


class Beside(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """The deltas of one method on one module, by the names of adapters.

    Subclasses hold them in a ModuleDict or ParameterDict, and say in `changed` what they do.
    """

    attribute: ClassVar[str]
    """Under which name it is a child of its module; it doesn't hold the tuner's prefix."""

    # What the class has of BaseTunerLayer, which mypy doesn't see.
    adapter_layer_names: tuple[str, ...]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    unmerge: Callable[[], None]
    _get_available_adapters: Callable[[], set[str]]

    def __init__(self, host: nn.Module, where: str) -> None:
        super().__init__()
        if isinstance(host, CONTAINERS):
            raise ValueError("it holds modules and is no layer: name those inside it")
        self.where = where
        self.host = (host,)  # not a child: the host has this module as one
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        host.add_module(self.attribute, self)
        self.handles: list[RemovableHandle] = [
            host.register_forward_hook(self._after, with_kwargs=True)
        ]

    def get_base_layer(self) -> nn.Module:
        """Return the module of the model that is changed."""
        return bare(self.host[0])

    def working(self) -> list[str]:
        """Return the adapters that change what the module gives, in the order of their work."""
        if self.disable_adapters:
            return []
        held = self._get_available_adapters()
        return [n for n in self.active_adapters if n in held and n not in self.merged_adapters]

    def changed(self, names: list[str], args: Any, kwargs: Any, h: Tensor) -> Tensor:
        """Return what the module shall give, of the first tensor `h` [..., width] that it gives."""
        raise NotImplementedError

    def look(self) -> None:
        """Raise ValueError if what works here can't be merged into the module's weights."""

    def remove(self) -> None:
        """Take this off its module, which is then as it was before."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        del self.host[0]._modules[self.attribute]

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; merged ones are taken out when they are switched off."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def _after(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not (names := self.working()):
            return None
        return with_first(output, self.changed(names, args, kwargs, first(output)))

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to where its module is; its dtype stays."""
        device = device or device_of(self.host[0])
        if device is None or device.type == "meta":
            return
        for held in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in held and not _on_meta(held[adapter_name]):
                held[adapter_name] = held[adapter_name].to(device)


class BesideTuner(BaseTuner):  # type: ignore[misc]
    """Puts deltas beside modules, and takes them off again."""

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, Beside):
            return  # a loose pattern has found a delta
        layer: Any = target._modules.get(self.tuner_layer_cls.attribute)
        try:
            if layer is None:
                self.check(target, current_key)
                layer = self.tuner_layer_cls(target, current_key)
            self.add(layer, adapter_name, peft_config)
        except ValueError as exc:
            self.drop(adapter_name)
            raise ValueError(f"{current_key}: {exc}") from None
        layer.train(target.training)
        where = device_of(target) or device_of(self.model)
        layer._move_adapter_to_device_of_base_layer(adapter_name, where)

    def check(self, target: nn.Module, where: str) -> None:
        """Raise ValueError if the module can't have a delta of this method."""

    def drop(self, name: str) -> None:
        """Take an adapter off all modules, and layers without adapters with it."""
        for layer in self.layers():
            layer.delete_adapter(name)
            if not layer._get_available_adapters():
                layer.remove()

    def add(self, layer: Any, name: str, config: Any) -> None:
        """Put a new adapter into `layer`."""
        raise NotImplementedError

    def layers(self) -> list[Any]:
        """Return this method's layers."""
        return [m for m in self.model.modules() if isinstance(m, self.tuner_layer_cls)]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge_allowed()
        for layer in self.layers():
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer.remove()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        setattr(parent, child_name, new_module)  # what PEFT has wrapped: modules_to_save


def first(output: Any) -> Tensor:
    """Return the first tensor of what a module gives: a tensor, a tuple, or a ModelOutput."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return found


def with_first(output: Any, h: Tensor) -> Any:
    """Return what a module gives with its first tensor replaced by `h`."""
    if isinstance(output, Tensor):
        return h
    if isinstance(output, dict):
        return type(output)(**{**output, next(iter(output)): h})
    if hasattr(output, "_fields"):
        return output._replace(**{output._fields[0]: h})
    return type(output)((h, *output[1:]))


def input_of(args: Any, kwargs: Any) -> Tensor:
    """Return the tensor that a module reads: its first, by position or else by name."""
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    named = kwargs.get("hidden_states")
    if not args and isinstance(named, Tensor):
        return named
    found = next(tensors, None)
    if found is None:
        raise ValueError("a module that an adapter reads was called without a tensor")
    return found


def device_of(module: nn.Module) -> torch.device | None:
    """Return where a module's weights are; None if it holds none that are tensors of torch."""
    held: Tensor | None = next(module.parameters(), None)
    if held is None:
        held = next(module.buffers(), None)
    return None if held is None else held.device


def _on_meta(held: Any) -> bool:
    tensors = [held] if isinstance(held, Tensor) else list(held.parameters())
    return any(t.device.type == "meta" for t in tensors)
