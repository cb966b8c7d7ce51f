"""Activation checkpointing by budget: as many blocks compute theirs again as memory needs.

A block that does so keeps only its input for the backward pass, and runs once more there (Training
Deep Nets with Sublinear Memory Cost, arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bmkit import env
from bmkit.nn import products, walk
from bmkit.train.activations import Kept, counted

Loss = Callable[[Any, dict[str, Tensor]], tuple[Tensor, int]]
Setting = bool | Literal["auto"]

SHARE = 0.8
"""Of the free memory, what activations may take; buffers come and go in the rest."""


@dataclass(frozen=True)
class Measured:
    """What a batch's forward pass keeps."""

    blocks: list[int]
    """Bytes that each block keeps."""
    inputs: list[int]
    """Bytes that each block reads: what it keeps if it runs again."""
    rest: int
    """Bytes kept in front of the blocks and behind them."""

    def times(self, rows: int) -> Measured:
        """Return what as many such batches in one keep."""
        blocks, inputs = ([n * rows for n in sizes] for sizes in (self.blocks, self.inputs))
        return Measured(blocks, inputs, self.rest * rows)

    def peak(self, again: int) -> int:
        """Return the bytes at the end of the forward pass if the first blocks run again.

        Later on there are fewer: when a first block runs again, what later ones kept is gone. If
        all run again, the last one's are on top.
        """
        sizes = [min(pair) for pair in zip(self.blocks, self.inputs, strict=True)]
        kept = self.rest + sum(sizes[:again]) + sum(self.blocks[again:])
        return kept + (self.blocks[-1] if again == len(self.blocks) > 0 else 0)

    def fewest(self, room: int) -> int:
        """Return how many of the first blocks must run again for the rest to fit in `room` bytes.

        It is all of them if nothing fits.
        """
        counts = range(len(self.blocks) + 1)
        return next((n for n in counts if self.peak(n) <= room), len(self.blocks))


def measured(model: Any, batch: dict[str, Tensor], loss: Loss) -> Measured:
    """Run one forward pass of `loss`, and say what it would keep; nothing is kept.

    Raises InputError if it isn't clear which the model's blocks are.
    """
    blocks = blocks_of(model)
    inputs = [0] * len(blocks)

    def read(number: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            inputs[number] = hidden.numel() * hidden.element_size()

        return hook

    hooks = [
        block.register_forward_pre_hook(read(i), with_kwargs=True) for i, block in enumerate(blocks)
    ]
    kept: Kept
    try:
        with torch.enable_grad(), counted(model, tuple(blocks), drop=True) as kept:
            loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return Measured(kept.blocks, inputs, kept.rest)


def again(
    model: Any,
    setting: Setting,
    batch: Callable[[], dict[str, Tensor]],
    loss: Loss,
    *,
    rows: int,
    room: int | None = None,
) -> list[Any]:
    """Return the blocks that are to compute their activations again.

    `setting` says all (True), none (False), or as many as it takes to fit in `room` bytes (`auto`):
    `batch` then makes a batch of one row, the longest, of which a step takes `rows`. Without `room`
    it is what is free on the model's device, less gradients and AdamW's state. Raises InputError if
    it isn't clear which the model's blocks are.
    """
    if setting is False:
        return []
    blocks = blocks_of(model)
    if setting is True:
        return blocks
    found = measured(model, batch(), loss).times(rows)
    count = found.fewest(free_bytes(model) if room is None else room)
    return [b for b, size in zip(blocks[:count], found.blocks[:count], strict=True) if size]


@contextmanager
def recomputed(model: nn.Module, blocks: Sequence[Any]) -> Iterator[None]:
    """Let each of `blocks` keep only its input while it trains, and run again backwards.

    The `model` that they are in keeps no cache meanwhile: a block would find there what it has put
    there itself.
    """
    before = [vars(block).get("forward") for block in blocks]
    configs: dict[int, Any] = {
        id(c): c for m in model.modules() if (c := getattr(m, "config", None))
    }
    caching = [c for c in configs.values() if blocks and getattr(c, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    for block in blocks:
        block.forward = _twice(block, block.forward)
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True
        for block, forward in zip(blocks, before, strict=True):
            restore(block, forward)


def restore(block: Any, forward: Any) -> None:
    """Give `block` the forward that it had of its own, or None: that of its class."""
    if forward is None:
        del block.forward
    else:
        block.forward = forward


def _twice(block: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return run(*args, **kwargs)
        how: dict[str, Any] = {"use_reentrant": False, "context_fn": products.again}
        return checkpoint(run, *args, **how, **kwargs)

    return forward


def blocks_of(model: Any) -> list[Any]:
    """Return the blocks of the model, those of an encoder-decoder's two halves one after another.

    Raises InputError if it isn't clear which they are.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(chain(*(core.get_submodule(name) for name, _ in walk.stacks(core))))


def free_bytes(model: Any) -> int:
    """Return what activations may take on the model's device, before the first step of training."""
    device = model.device
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + reserved
    else:
        free = env.available_ram_bytes()
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return int(SHARE * max(free - 3 * trained, 0))
