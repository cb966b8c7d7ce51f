"""AdaLoRA's ranks while it is trained: they go to where they are worth most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from bmkit.model import save_tensors

LEAST = 3
"""Steps below which PEFT's allocator has nothing to go by."""
FILE = "ranks-{}.safetensors"
"""With what PEFT calls the delta."""
KINDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What PEFT's allocator knows of each matrix: its sensitivity, smoothed, and how unsure that is."""


class Ranks(TrainerCallback):  # type: ignore[misc]
    """Let PEFT's allocator take ranks away after each step of an AdaLoRA `tuner`.

    They stay as they are in the first tenth of the `steps`, and don't change in the last three.
    (Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512.) What it has
    seen is kept beside each checkpoint.
    """

    def __init__(self, tuner: Any, steps: int) -> None:
        self.tuner = tuner
        self.config = tuner.peft_config[tuner.trainable_adapter_name]
        self.file = FILE.format(tuner.trainable_adapter_name)
        self.config.total_step = steps
        self.config.tinit = steps // 10
        self.config.tfinal = min(steps * 3 // 10, max(steps - steps // 10 - 1, 0))
        self.config.deltaT = 1 if steps < 200 else 10

    def penalty(self) -> Tensor:
        """Return how far the directions are from orthogonal, mean of matrices, times its weight."""
        name = self.tuner.trainable_adapter_name
        whole: list[Tensor] = []
        for key, matrix in self.tuner.named_parameters():
            if name not in key or not ("lora_A" in key or "lora_B" in key):
                continue
            products = matrix @ matrix.T if "lora_A" in key else matrix.T @ matrix
            unit = torch.eye(len(products), device=products.device, dtype=products.dtype)
            whole.append((products - unit).norm())
        weight: float = self.config.orth_reg_weight
        return weight * torch.stack(whole).mean()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take ranks away, where it is time to."""
        if self.config.total_step < LEAST:
            return
        self.tuner.update_and_allocate(state.global_step + 1)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep what the allocator knows."""
        allocator, pattern = self.tuner.rankallocator, self.config.rank_pattern or {}
        found = {f"{k}/{n}": t for k in KINDS for n, t in getattr(allocator, k).items()}
        found |= {f"pattern/{name}": torch.tensor(kept) for name, kept in pattern.items()}
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if found and folder.is_dir():
            save_tensors(folder / self.file, found)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on with what was kept beside the checkpoint that training goes on from."""
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.file
        if not state.global_step or not file.is_file():
            return
        pattern: dict[str, list[Any]] = {}
        device = next(self.tuner.parameters()).device
        for key, tensor in load_file(file).items():
            kind, _slash, name = key.partition("/")
            if kind == "pattern":
                pattern[name] = tensor.tolist()
            else:
                getattr(self.tuner.rankallocator, kind)[name] = tensor.to(device)
        self.config.rank_pattern = pattern or None
