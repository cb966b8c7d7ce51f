"""How many bytes autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass
class Kept:
    """What was kept while `counted` ran: each storage once, the model's own not at all."""

    total: int = 0
    """Bytes in all."""
    blocks: list[int] = field(default_factory=list)
    """Bytes first kept by each of the blocks."""

    @property
    def rest(self) -> int:
        """Return the bytes kept outside of the blocks."""
        return self.total - sum(self.blocks)


@contextmanager
def counted(
    model: nn.Module, blocks: tuple[nn.Module, ...] = (), *, drop: bool = False
) -> Iterator[Kept]:
    """Count the bytes that the forward passes of the block keep for a backward pass.

    With `drop` they are let go at once, so that counting takes no more memory than a forward pass
    without gradients; a backward pass then fails.
    """
    own = {_storage(t) for t in chain(model.parameters(), model.buffers())}
    seen: dict[int, StorageWeakRef] = {}  # while it lives, a storage's address isn't given again
    kept = Kept(blocks=[0] * len(blocks))
    inside: list[int] = []

    def pack(tensor: Tensor) -> Tensor | None:
        if _storage(tensor) not in own:
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            if reference.cdata not in seen:
                seen[reference.cdata] = reference
                size = tensor.untyped_storage().nbytes()
                kept.total += size
                if inside:
                    kept.blocks[inside[-1]] += size
        return None if drop else tensor

    def unpack(tensor: Tensor | None) -> Tensor:
        assert tensor is not None, "what was kept has been let go"
        return tensor

    def enter(number: int, block: nn.Module) -> Callable[..., None]:
        def hook(*_: object) -> None:
            inside.append(number)
            own.update(map(_storage, block.parameters()))  # those that are there while it runs

        return hook

    hooks = []
    for number, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(enter(number, block)))
        hooks.append(block.register_forward_hook(lambda *_: void(inside.pop())))
    _WATCHING.append(pack)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield kept
    finally:
        _WATCHING.remove(pack)
        for hook in hooks:
            hook.remove()


def tell(tensor: Tensor) -> Tensor | None:
    """Say that a tensor is being kept, from hooks that stand before those of `counted`.

    Returns what is to be kept in its place.
    """
    found: Tensor | None = tensor
    for pack in _WATCHING:
        found = pack(tensor)
    return found


_WATCHING: list[Callable[[Tensor], Tensor | None]] = []


def void(_: object) -> None:
    """Take a value and say nothing: a forward hook that returns one would replace the output."""


def _storage(tensor: Tensor) -> int:
    """Return what tells a storage that lives from others, wherever its bytes lie."""
    found: int = tensor.untyped_storage()._cdata
    return found
