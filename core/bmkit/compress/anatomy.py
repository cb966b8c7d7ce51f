"""What a model's tensors are made of: which of their sides are heads, neurons, hidden width.

It is found by asking the architecture: a config with another width makes a model whose tensors
differ on the sides that have this width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from bmkit import model, plan
from bmkit.compress.layers import fewer
from bmkit.compress.widths import Widths
from bmkit.errors import InputError, LibraryRefusal
from bmkit.nn import walk
from bmkit.runtime.placed.load import build

Kind = Literal["heads", "ffn", "hidden"]
FFN_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim", "d_ff")
"""What configs call the width of a feed-forward network."""
GROUPS = "num_key_value_heads"
PROBE = 64
"""A width that is tried; 32 more if it is the model's own."""
JOINED = ("qkv_proj", "c_attn", "Wqkv", "gate_up_proj", "Wi")
"""Layers that are several, one behind the other."""


@dataclass(frozen=True)
class Side:
    """A side of a tensor that is made of units: unit u is `run` places at `offset` + u·`run`."""

    kind: Kind
    dim: int
    parts: tuple[tuple[int, int], ...]
    """`offset` and `run` of each; several where layers are joined."""

    def places(self, kept: Tensor) -> Tensor:
        """Return the places of units `kept`, ascending."""
        return torch.cat(
            [
                (kept[:, None] * run + offset + torch.arange(run)).flatten()
                for offset, run in self.parts
            ]
        )

    @property
    def run(self) -> int:
        """Return how many places a unit has, on a side that isn't joined."""
        return self.parts[0][1]


@dataclass(frozen=True)
class Anatomy:
    """A checkpoint's model, as far as it can be cut."""

    path: Path
    config: Any
    stored: Mapping[str, Any]
    """What `config.json` says."""
    names: dict[str, str]
    """What it calls `layers`, `heads`, `groups`, `ffn` and `hidden`; some may be missing."""
    now: Widths
    """`heads` is how many groups there are that share keys and values."""
    shapes: dict[str, tuple[int, ...]]
    """Of all parameters, by the names that the model gives them."""
    sides: dict[str, tuple[Side, ...]]
    stack: str
    conv1d: frozenset[str]
    """Modules whose weight is [inputs, out], as GPT-2's are."""
    head_dim: int

    def inputs(self, block: int, kind: Kind) -> str:
        """Return the linear layer of a block that all units of a kind go into.

        Raises InputError if there isn't exactly one.
        """
        prefix, found = f"{self.stack}.{block}.", []
        for name, sides in self.sides.items():
            module, _, last = name.rpartition(".")
            if name.startswith(prefix) and last == "weight":
                into = 0 if module in self.conv1d else 1
                found += [module for s in sides if (s.kind, s.dim) == (kind, into)]
        if len(found) != 1:
            what = "heads" if kind == "heads" else "neurons"
            raise InputError(
                f"{self.path}: block {block} has {len(found)} linear layers that its {what} go "
                "into; one is wanted",
                hint="cut something else, as layers",
            )
        return found[0]

    def run(self, module: str, kind: Kind) -> int:
        """Return how many inputs of a linear layer make up a unit of a kind."""
        (run,) = {s.run for s in self.sides[f"{module}.weight"] if s.kind == kind}
        return run

    def layer(self, name: str) -> int | None:
        """Return the number of the block that a parameter is in; None if it is outside of them."""
        if not name.startswith(f"{self.stack}."):
            return None
        return int(name.removeprefix(f"{self.stack}.").split(".")[0])

    def cut(self, name: str, widths: Widths) -> tuple[int, ...]:
        """Return the shape that a parameter has at other widths."""
        shape = list(self.shapes[name])
        for side in self.sides.get(name, ()):
            shape[side.dim] = getattr(widths, side.kind) * sum(run for _, run in side.parts)
        return tuple(shape)

    def size(self, widths: Widths) -> int:
        """Return how many parameters the blocks have at other widths."""
        inside = [n for n in self.shapes if self.layer(n) is not None]
        whole = sum(math.prod(self.cut(name, widths)) for name in inside)
        return whole * widths.layers // self.now.layers

    def config_at(self, widths: Widths, kept: list[int]) -> dict[str, Any]:
        """Return what `config.json` says at other widths, with only `kept` layers."""
        found = fewer(self.stored, self.names["layers"], self.now.layers, kept)
        if "ffn" in self.names and widths.ffn != self.now.ffn:
            found[self.names["ffn"]] = widths.ffn
        if widths.hidden != self.now.hidden:
            found[self.names["hidden"]] = widths.hidden
        if widths.heads != self.now.heads:
            heads = getattr(self.config, self.names["heads"])
            found[self.names["heads"]] = heads // self.now.heads * widths.heads
            if "groups" in self.names:
                found[self.names["groups"]] = widths.heads
        if (widths.heads, widths.hidden) != (self.now.heads, self.now.hidden):
            found["head_dim"] = self.head_dim  # else it would be made of the others
        return found

    def holds(self, widths: Widths) -> bool:
        """Tell whether transformers takes a config of these widths."""
        try:
            self._require(widths)
        except InputError:
            return False
        return True

    def _require(self, widths: Widths) -> Any:
        values = self.config_at(widths, list(range(widths.layers)))
        what, hint = f"{self.path}: no such model can be had", "take another number"
        try:
            with LibraryRefusal(what, hint):
                return type(self.config).from_dict(values)
        except StrictDataclassError as exc:
            raise InputError(f"{what}: {exc.__cause__ or exc}", hint=hint) from None

    def require(self, widths: Widths) -> None:
        """Raise InputError if no stock model has these widths."""
        for unit in ("heads", "ffn", "hidden"):
            there = any(s.kind == unit for sides in self.sides.values() for s in sides)
            if getattr(widths, unit) != getattr(self.now, unit) and not there:
                raise InputError(
                    f"{self.path}: a {type(self.config).__name__} can't hold {_WHAT[unit]} of "
                    "another number",
                    hint="cut something else: intermediate_size, or num_hidden_layers",
                )
        config = self._require(widths)
        with LibraryRefusal(f"{self.path}: no smaller model of its kind can be had"):
            made = build(model.auto_class(self.config), config)
        if widths.hidden != self.now.hidden:
            self._require_constants(made)
        for name, shape in _shapes(made).items():
            if shape != self.cut(name, widths):
                raise InputError(
                    f"{self.path}: at these widths {name} would have to be {list(shape)}, and "
                    f"{list(self.cut(name, widths))} is what can be cut out of it"
                )

    def _require_constants(self, made: Any) -> None:
        """Raise InputError if a model of another hidden width calculates otherwise.

        As Gemma does: it multiplies embeddings by the root of the width.
        """
        before = dict(build(model.auto_class(self.config), self.config).named_buffers())
        for name, value in made.named_buffers():
            same = value.shape != before[name].shape or torch.equal(value, before[name])
            if not same:
                raise InputError(
                    f"{self.path}: {name} depends on the hidden width, so channels can't be cut",
                    hint="cut something else, as intermediate_size",
                )


_WHAT = {"heads": "heads", "ffn": "FFN neurons", "hidden": "a hidden width"}


def read(path: Path) -> Anatomy:
    """Find out how the model at `path` can be cut. Only shapes are made, no weights read.

    Raises InputError for a model without one stack of blocks.
    """
    config = model.load_config(path)
    kind = model.auto_class(config)
    whole = build(kind, config)
    stack, count = walk.stack(whole)
    shapes = _shapes(whole)
    conv1d = frozenset(n for n, m in whole.named_modules() if type(m).__name__ == "Conv1D")
    names = config_names(config)
    stored = plan.read_headers(path).config
    sides: dict[str, list[Side]] = {}
    if stored.get(names["layers"]) != count:
        raise InputError(
            f"{path}/config.json says no `{names['layers']}: {count}`, as the model has it"
        )

    def probe(**values: int) -> dict[str, tuple[int, ...]]:
        other = copy.deepcopy(config)
        try:
            for name, value in values.items():
                setattr(other, names[name], value)
            if "ffn" not in values:
                other.head_dim = head_dim  # where it isn't read, heads can't be cut
            return _shapes(build(kind, other))
        except (ValueError, TypeError, RuntimeError, AttributeError):  # it can't be had
            return {}

    heads = getattr(config, names["heads"])
    groups = getattr(config, names["groups"]) if "groups" in names else heads
    hidden = getattr(config, names["hidden"])
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    ffn = _ffn(sides, shapes, probe, names, config)
    if heads % groups == 0:
        twice = {"heads": 2 * heads} | ({"groups": 2 * groups} if "groups" in names else {})
        for name, dim, _ in _changed(shapes, probe(**twice)):
            parts = _head_parts(name, shapes[name][dim], heads, groups)
            sides.setdefault(name, []).append(Side("heads", dim, parts))
        if sides_of(sides, "heads"):  # else the hidden width is that of the heads together
            for name, dim, _ in _changed(shapes, probe(hidden=2 * hidden)):
                sides.setdefault(name, []).append(Side("hidden", dim, ((0, 1),)))
    return Anatomy(
        path,
        config,
        stored,
        names,
        Widths(count, groups, ffn, hidden),
        shapes,
        {name: tuple(found) for name, found in sides.items()},
        stack,
        conv1d,
        head_dim,
    )


def config_names(config: Any) -> dict[str, str]:
    """Return what a config calls the numbers that make a model's size, by optimum's tables."""
    from optimum.utils import NormalizedConfigManager, NormalizedTextConfig

    try:
        normal = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError:
        normal = NormalizedTextConfig(config)
    known = {
        "layers": getattr(normal, "NUM_LAYERS", "num_hidden_layers"),
        "heads": getattr(normal, "NUM_ATTENTION_HEADS", "num_attention_heads"),
        "groups": getattr(normal, "NUM_KEY_VALUE_HEADS", GROUPS),
        "hidden": getattr(normal, "HIDDEN_SIZE", "hidden_size"),
    }
    mapped = {unit: config.attribute_map.get(name, name) for unit, name in known.items()}
    found = {unit: name for unit, name in mapped.items() if isinstance(_get(config, name), int)}
    if missing := {"layers", "heads", "hidden"} - found.keys():
        raise InputError(
            f"a {type(config).__name__} doesn't say its {', '.join(sorted(missing))} by a name "
            "that is known"
        )
    return found


def _get(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def sides_of(sides: Mapping[str, list[Side]], kind: Kind) -> bool:
    """Tell whether any tensor has a side of a kind."""
    return any(s.kind == kind for found in sides.values() for s in found)


def _ffn(
    sides: dict[str, list[Side]],
    shapes: Mapping[str, tuple[int, ...]],
    probe: Callable[..., dict[str, tuple[int, ...]]],
    names: dict[str, str],
    config: Any,
) -> int:
    """Find the sides that are neurons, and how many there are; 0 if that can't be changed."""
    for key in FFN_KEYS:
        if not hasattr(config, key):
            continue
        names["ffn"] = key
        for wanted in (PROBE, PROBE + 32):
            changed = _changed(shapes, probe(ffn=wanted))
            width = 0
            for name, dim, new in changed:
                count, joined = new // wanted, name.rpartition(".")[0].endswith(JOINED)
                if new % wanted or (count > 1 and not joined):
                    raise InputError(f"how the neurons lie in {name} isn't known")
                width = shapes[name][dim] // count
                parts = tuple((i * width, 1) for i in range(count))
                sides.setdefault(name, []).append(Side("ffn", dim, parts))
            if changed:
                return width
    names.pop("ffn", None)
    return 0


def _head_parts(name: str, size: int, heads: int, groups: int) -> tuple[tuple[int, int], ...]:
    if not name.rpartition(".")[0].endswith(JOINED):
        return ((0, size // groups),)
    dim, share = size // (heads + 2 * groups), heads // groups
    return (0, share * dim), (heads * dim, dim), ((heads + groups) * dim, dim)


def _shapes(whole: Any) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in whole.named_parameters(remove_duplicate=False)}


def _changed(
    before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, int, int]]:
    """Return where tensors differ: name, side, and how long it is after."""
    return [
        (name, dim, new)
        for name, shape in after.items()
        for dim, (old, new) in enumerate(zip(before[name], shape, strict=True))
        if old != new
    ]
