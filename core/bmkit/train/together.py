"""Several processes that train one model: `accelerate launch` or `torchrun` has started them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bmkit import env
from bmkit.errors import ResourceError
from bmkit.train.sharing import shared

Loss = Callable[[Any, dict[str, Tensor]], tuple[Tensor, int]]


class Learner(nn.Module):
    """A model whose forward is its loss, so that what wraps it sees all that is computed."""

    def __init__(self, model: Any, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        # What is shared out has no gradients to average, and no process has it to send.
        self._ddp_params_and_buffers_to_ignore = [f"model.{name}" for name in shared(model)]

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the summed loss of a batch, and what it is divided by."""
        found, count = self.loss(self.model, batch)
        return found, torch.tensor(count, device=found.device)


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process: with several on GPUs, each has its own.

    Raises ResourceError if there are fewer GPUs than processes.
    """
    if env.process()[1] == 1 or device.type != "cuda":
        return device
    own, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= there:
        raise ResourceError(
            f"there is no GPU for process {own + 1} of this machine: it has {there}",
            hint="start as many processes as there are GPUs, or take --device cpu",
        )
    return torch.device("cuda", own)


def leave() -> None:
    """Part from the other processes, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
