"""A delta inside a model: the layers that hold it, and its tensors by the names it has alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from bmkit.deltas import ranks
from bmkit.deltas.tuners.beside import Beside
from bmkit.errors import counted, first_line

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules in files."""


@dataclass(frozen=True)
class Held:
    """A delta in a model."""

    owner: Any
    """What has its config: the PeftModel that it wraps the base in, or the base."""
    base: Any
    name: str
    """What PEFT calls it."""

    @property
    def config(self) -> PeftConfig:
        """Return its config."""
        return self.owner.peft_config[self.name]

    def config_alone(self) -> PeftConfig:
        """Return a copy of its config as it is when the delta is alone on the plain base."""
        config = copy.deepcopy(self.config)
        if pattern := self._pattern():
            config.rank_pattern = pattern
        return config

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by the names that they have when it is alone on the plain base."""
        found = {plain: tensor for plain, (_, tensor) in self._states().items()}
        return ranks.kept(found, self._pattern())

    def put(self, given: Mapping[str, Tensor]) -> str:
        """Copy tensors into it. Returns what doesn't fit, in words; nothing if all do."""
        wanted = {plain: here for plain, (here, _) in self._states().items()}
        if missing := sorted(set(wanted) - set(given)):
            told = counted(len(missing), "tensor is", "tensors are")
            return f"{told} missing, as {missing[0]}"
        named = {wanted.get(k, k): tensor for k, tensor in given.items()}
        try:
            if pattern := self._pattern():
                here = {k: wanted[PREFIX + k].removeprefix(PREFIX) for k in pattern}
                ranks.resize(self.base, self.name, {here[k]: v for k, v in pattern.items()})
            with self._alone():
                result = set_peft_model_state_dict(self.owner, named, self.name)
        except (RuntimeError, KeyError, ValueError) as exc:
            wide = {plain: tensor.shape for plain, (_, tensor) in self._states().items()}
            others = sorted(k for k, x in given.items() if k in wide and wide[k] != x.shape)
            if not others:
                return first_line(exc)
            name, shape = others[0].removeprefix(PREFIX), list(given[others[0]].shape)
            return f"{name} has the shape {shape}, here it is {list(wide[others[0]])}"
        strange = {key.removeprefix(PREFIX) for key in result.unexpected_keys}
        lost = sorted(k for k in set(given) - set(wanted) if k.removeprefix(PREFIX) in strange)
        told = counted(len(lost), "of its tensors has", "of its tensors have")
        return f"{told} no place in it, as {lost[0]}" if lost else ""

    def _states(self) -> dict[str, tuple[str, Tensor]]:
        """Return for the name that each tensor has alone its name here, and itself."""
        with self._alone():
            states: dict[str, Tensor] = get_peft_model_state_dict(
                self.owner, adapter_name=self.name, save_embedding_layers=False
            )
        named = {}
        for here, tensor in states.items():
            plain = here
            if self.owner is self.base or here.startswith(PREFIX):
                plain = PREFIX + self._without_others(here.removeprefix(PREFIX))
            named[plain] = (here, tensor)
        return named

    def _pattern(self) -> ranks.Pattern:
        return ranks.alone(self.config, self.name, self._without_others)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hide wrappers that it isn't in, which PEFT would ask for its tensors, and lost ranks."""
        wrappers = [m for m in self.base.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        others = [m for m in wrappers if self.name not in held_by(m)]
        for module in others:
            vars(module).update(adapter_state_dict=_nothing, adapter_state_dict_load_map=_nothing)
        try:
            with ranks.hidden(self.config):  # names as if it were alone, and a PeftModel around it
                yield
        finally:
            for module in others:
                del vars(module)["adapter_state_dict"], vars(module)["adapter_state_dict_load_map"]

    def _without_others(self, key: str) -> str:
        """Return a name without the places of other deltas' layers in it."""
        kept, module = [], self.base
        for part in key.split("."):
            layer = isinstance(module, BaseTunerLayer) and not isinstance(module, Beside)
            if not (layer and part == "base_layer" and self.name not in held_by(module)):
                kept.append(part)
            module = module._modules.get(part) or nn.Module()
        return ".".join(kept)


def switches(base: nn.Module) -> Iterator[Any]:
    """Give all layers and wrappers of PEFT in which deltas are."""
    for module in base.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield module


def held_by(module: Any) -> set[str]:
    """Return PEFT's names of the deltas that a layer or wrapper holds."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return set(module._adapters)
    return set(module._all_available_adapter_names())


def base_of(model: Any) -> Any:
    """Return the transformers model inside, which holds the deltas that need no wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_prompt(model: Any) -> bool:
    """Tell whether a model is wrapped for prompt learning."""
    return isinstance(model, PeftModel) and bool(model._is_prompt_learning)


def _nothing(*_: Any) -> dict[str, Any]:
    return {}
