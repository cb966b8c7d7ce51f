"""Which neurons of a dense feed-forward a token needs: a file beside the weights says it.

`attach` lets any model of transformers compute as the file says, by masks.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bmkit.artifact import EXPERTS
from bmkit.errors import InputError
from bmkit.nn import walk
from bmkit.nn.feed_forward import find

FILE = EXPERTS
DENSE = -1
"""Stands in `Experts.chosen` for a block that computes all of its neurons."""
_KEY = re.compile(r"(0|[1-9]\d*)\.router\.(?:(in|out)\.)?(weight|bias)")


@dataclass(frozen=True)
class Router:
    """Tells which experts a token needs: one linear layer, or two with a tanh between them."""

    weight: Tensor
    """float32 [experts, inputs]: of the last layer."""
    bias: Tensor
    """float32 [experts]."""
    inner_weight: Tensor | None = None
    """float32 [inner, hidden]: of the first of two layers; `inputs` is `inner` then."""
    inner_bias: Tensor | None = None
    """float32 [inner]."""

    @property
    def experts(self) -> int:
        """Return among how many experts it chooses."""
        return len(self.weight)

    @property
    def hidden(self) -> int:
        """Return the width of what goes in."""
        first = self.weight if self.inner_weight is None else self.inner_weight
        return first.shape[1]

    def scores(self, x: Tensor) -> Tensor:
        """Return the experts' scores [tokens, experts] for `x` [tokens, hidden], in float32."""
        x = x.float()
        if self.inner_weight is not None and self.inner_bias is not None:
            x = torch.tanh(x @ self.inner_weight.T + self.inner_bias)
        return x @ self.weight.T + self.bias


@dataclass(frozen=True)
class Experts:
    """How the neurons of a checkpoint's feed-forwards are divided into experts.

    An expert is a slice of `size` neurons: rows of gate and up, columns of down. In each block the
    first `shared` experts are always computed, and `chosen` of the others, by their router.
    """

    size: int
    shared: int
    chosen: tuple[int, ...]
    """For each block how many of the others a token computes; DENSE: all, there is no router."""
    routers: tuple[Router | None, ...]

    def width(self, block: int) -> int | None:
        """Return how many neurons a block has; None if it is dense, so that no one knows."""
        router = self.routers[block]
        return None if router is None else (self.shared + router.experts) * self.size

    def of(self, blocks: Sequence[int]) -> Experts:
        """Return the experts of some blocks, which are all that is left."""
        chosen = tuple(self.chosen[i] for i in blocks)
        return replace(self, chosen=chosen, routers=tuple(self.routers[i] for i in blocks))

    def active(self, block: int) -> int | None:
        """Return how many neurons a token computes in a block; None if it is dense."""
        dense = self.routers[block] is None
        return None if dense else (self.shared + self.chosen[block]) * self.size


def best(scores: Tensor, count: int) -> Tensor:
    """Return where the `count` highest scores of each row are: bool, as `scores`.

    Of equal scores the one with the lower number is taken.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def chosen_mask(router: Router, x: Tensor, *, chosen: int, shared: int, size: int) -> Tensor:
    """Return which neurons of a block are computed: bool [tokens, neurons].

    `x` [tokens, hidden] is what goes into the feed-forward, behind the norm.
    """
    picked = best(router.scores(x), chosen)
    always = picked.new_ones(len(picked), shared)
    return torch.cat((always, picked), 1).repeat_interleave(size, 1)


def read(path: Path) -> Experts | None:
    """Return how the checkpoint at `path` is divided into experts; None if it isn't.

    Raises InputError if the file is damaged.
    """
    file = path / FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stream:
            said = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
        return _experts(said, tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as exc:
        said_of = f"it has no {exc}" if isinstance(exc, KeyError) else str(exc)
        raise InputError(
            f"{file} is damaged: {said_of}",
            hint="build it again; without the file the checkpoint is an ordinary dense one",
        ) from None


def write(path: Path, experts: Experts) -> None:
    """Write the file for the checkpoint at `path`: equal experts give equal bytes."""
    tensors: dict[str, Tensor] = {}
    for block, router in enumerate(experts.routers):
        if router is None:
            continue
        two = router.inner_weight is not None and router.inner_bias is not None
        last = f"{block}.router.out" if two else f"{block}.router"
        tensors[f"{last}.weight"], tensors[f"{last}.bias"] = router.weight, router.bias
        if router.inner_weight is not None and router.inner_bias is not None:
            tensors[f"{block}.router.in.weight"] = router.inner_weight
            tensors[f"{block}.router.in.bias"] = router.inner_bias
    whole = {key: t.detach().float().cpu().contiguous() for key, t in tensors.items()}
    said = {
        "size": str(experts.size),
        "shared": str(experts.shared),
        "chosen": json.dumps(list(experts.chosen)),
    }
    (path / FILE).write_bytes(_ordered(save(whole, said)))


def _ordered(data: bytes) -> bytes:
    """Return a safetensors file with its header in order, which the library leaves to chance."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":"))
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _experts(said: Mapping[str, str], tensors: dict[str, Tensor]) -> Experts:
    """Raise ValueError or KeyError for what makes no experts."""
    size, shared = int(said["size"]), int(said["shared"])
    found = json.loads(said["chosen"])
    if size < 1 or shared < 0:
        raise ValueError(f"size {size} and shared {shared} are out of range")
    if not isinstance(found, list) or any(type(n) is not int or n < DENSE for n in found):
        raise ValueError("`chosen` is no list of numbers of experts")
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"nothing is called {key}")
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds no finite float32 numbers")
        name = ".".join(part for part in match.group(2, 3) if part)
        parts.setdefault(int(match[1]), {})[name] = tensor
    if strange := sorted(set(parts) - {i for i, n in enumerate(found) if n != DENSE}):
        raise ValueError(f"there is a router of block {strange[0]}, which `chosen` says is dense")
    routers = [None if n == DENSE else _router(i, parts.get(i, {})) for i, n in enumerate(found)]
    for i, router in enumerate(routers):
        if router is not None and not 0 < shared + found[i] <= shared + router.experts:
            raise ValueError(
                f"block {i} has {shared} shared and {router.experts} other experts, and `chosen` "
                f"says {found[i]}"
            )
    return Experts(size, shared, tuple(found), tuple(routers))


def _router(block: int, parts: Mapping[str, Tensor]) -> Router:
    two = {"in.weight", "in.bias", "out.weight", "out.bias"}
    if set(parts) == {"weight", "bias"}:
        router = Router(parts["weight"], parts["bias"])
    elif set(parts) == two:
        router = Router(
            *(parts[f"{k}"] for k in ("out.weight", "out.bias", "in.weight", "in.bias"))
        )
    else:
        held = ", ".join(sorted(parts)) or "nothing"
        raise ValueError(f"the router of block {block} is made of {held}")
    pairs = [(router.weight, router.bias)]
    if router.inner_weight is not None and router.inner_bias is not None:
        pairs.append((router.inner_weight, router.inner_bias))
    fit = all(w.ndim == 2 and b.shape == w.shape[:1] and w.numel() for w, b in pairs)
    if not fit or (len(pairs) == 2 and pairs[0][0].shape[1] != len(pairs[1][0])):
        raise ValueError(f"the shapes of the router of block {block} don't fit")
    return router


class Routed(nn.Module):
    """A router at work: hooks on a feed-forward set the neurons to zero that aren't computed.

    With `learns` the router gets gradients: straight through, as if an expert counted by how far
    its score is above the bar. The neurons that are computed get theirs in any case.
    """

    def __init__(
        self, router: Router, chosen: int, shared: int, size: int, *, learns: bool = False
    ) -> None:
        super().__init__()
        self.chosen, self.shared, self.size, self.learns = chosen, shared, size, learns
        self.weight, self.bias = (nn.Parameter(t, learns) for t in (router.weight, router.bias))
        inner = (router.inner_weight, router.inner_bias)
        first, first_bias = (None if t is None else nn.Parameter(t, learns) for t in inner)
        self.register_parameter("inner_weight", first)
        self.register_parameter("inner_bias", first_bias)
        self._mask: Tensor | None = None
        self._handles: list[Any] = []

    @property
    def router(self) -> Router:
        """Return what it is by now."""
        inner = self._parameters
        return Router(self.weight, self.bias, inner["inner_weight"], inner["inner_bias"])

    def forward(self, x: Tensor) -> Tensor:
        """Return which neurons of the tokens `x` [..., hidden] count: 0 or 1, [..., neurons]."""
        scores = self.router.scores(x)
        mask = best(scores, self.chosen).to(x.dtype)
        if self.learns and torch.is_grad_enabled() and 0 < self.chosen < scores.shape[-1]:
            bar = scores.topk(self.chosen + 1).values[..., -2:].mean(-1, keepdim=True)
            soft = torch.sigmoid(scores - bar).to(x.dtype)
            mask = mask + soft - soft.detach()
        always = mask.new_ones(*mask.shape[:-1], self.shared)
        return torch.cat((always, mask), -1).repeat_interleave(self.size, -1)

    def hook(self, up: nn.Module, down: nn.Module) -> None:
        """Begin to mask what goes into `down`, by what goes into `up`."""

        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.weight.device != args[0].device:
                self.to(args[0].device)
            self._mask = self(args[0])

        def drop(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            mask, self._mask = self._mask, None
            assert mask is not None  # up comes before down
            return (args[0] * mask, *args[1:])

        self._handles += [up.register_forward_pre_hook(look), down.register_forward_pre_hook(drop)]

    def unhook(self) -> None:
        """Compute all neurons again."""
        while self._handles:
            self._handles.pop().remove()


def attach(model: Any, experts: Experts, *, learns: bool = False) -> Attached:
    """Let `model` compute of each block the neurons that `experts` say, the others count as zero.

    All are computed and masked: it tells what comes out, and saves nothing. With `learns` the
    routers become parameters of the model. Raises InputError if the experts don't fit it.
    """
    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, count = walk.stack(body)
    if count != len(experts.chosen):
        raise InputError(f"{FILE} is of {len(experts.chosen)} blocks, the model has {count}")
    routed: dict[str, Routed] = {}
    for i, router in enumerate(experts.routers):
        if router is None:
            continue
        block = body.get_submodule(f"{name}.{i}")
        found = find(block)
        if found is None or (found.width, found.hidden) != (experts.width(i), router.hidden):
            raise InputError(f"{FILE} doesn't fit the feed-forward of block {i}")
        one = Routed(router, experts.chosen[i], experts.shared, experts.size, learns=learns)
        one.hook(block.get_submodule(found.up), block.get_submodule(found.down))
        routed[str(i)] = one
    if learns:
        body.bmkit_routers = nn.ModuleDict(routed)
    return Attached(body, experts, routed)


@dataclass(frozen=True)
class Attached:
    """A model that computes by experts."""

    model: Any
    experts: Experts
    routed: Mapping[str, Routed]

    def detach(self) -> Experts:
        """Make the model dense again; return the experts, with their routers as they are by now."""
        routers = list(self.experts.routers)
        for block, one in self.routed.items():
            one.unhook()
            routers[int(block)] = one.router
        if hasattr(self.model, "bmkit_routers"):
            del self.model.bmkit_routers
        return replace(self.experts, routers=tuple(routers))


def attach_stored(model: Any, path: Path) -> None:
    """Let a model that was loaded from `path` compute by the experts that lie there, if any do."""
    experts = read(path)
    if experts is not None:
        attach(model, experts)
