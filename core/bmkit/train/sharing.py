"""Frozen weights that several processes share out: each keeps a part of every block.

A block's weights are gathered when it runs, forwards and backwards, and let go afterwards (PyTorch
FSDP, arXiv 2304.11277; ZeRO's third stage, arXiv 1910.02054). What is trained stays whole in each
process, and its gradients are averaged as without sharing: checkpoints and deltas are the same.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from bmkit import env
from bmkit.nn import walk


def share_out(model: Any, device: torch.device) -> int:
    """Let each process keep its part of the frozen weights in the blocks; return its bytes.

    What isn't shared (embeddings, heads, what is trained) moves to `device` whole; of the blocks,
    one is there at a time, so that a model on the CPU may be larger than the device. Joins the
    processes first, if nobody has. Peak memory on `device`: the parts, and the largest block.
    Raises InputError if it isn't clear which the model's blocks are.
    """
    core: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if not dist.is_initialized():
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    mesh = init_device_mesh(device.type, (env.process()[1],))
    whole = {p for p in model.parameters() if p.requires_grad or not p.ndim}
    for name, _ in walk.stacks(core):
        blocks = list(core.get_submodule(name).children())
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        # What holds the blocks runs in every pass, whichever way the model is called: it knows
        # their order. It has nothing to gather itself.
        holder = core.get_submodule(name.rpartition(".")[0])
        parts = set(chain(*(block.parameters() for block in blocks)))
        besides = {p for p in holder.parameters() if p not in parts} | whole
        fully_shard(holder, mesh=mesh, ignored_params=besides)
    model.to(device)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the buffers it gathers into are made for good here,
            module.unshard()  # and not in a pass that autograd knows nothing of
            module.reshard()
    return sum(
        p.to_local().numel() * p.element_size()
        for p in model.parameters()
        if isinstance(p, DTensor)
    )


def shared(model: nn.Module) -> list[str]:
    """Return the names of the parameters of which each process keeps a part."""
    return [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
