"""Open the model that a prompt asks: whole, or placed within a budget, with its deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bmkit import model as models
from bmkit.deltas import plugged
from bmkit.errors import InputError
from bmkit.plan import Job, read_json
from bmkit.prompt.ask import Asker
from bmkit.prompt.kinds import HEADS
from bmkit.prompt.plan import placement
from bmkit.prompting.encode import Kind
from bmkit.runtime import budget, experts
from bmkit.runtime.adapters import adapters_of
from bmkit.runtime.opening import begin, cap_gpu


@dataclass
class Opened:
    """A model that is ready to be asked."""

    asker: Asker
    device: torch.device
    rss_before_bytes: int
    """Resident memory just before the model was opened."""
    placed: Any = None

    def close(self) -> None:
        """Stop reading weights ahead."""
        if self.placed is not None:
            self.placed.close()


def context(config: Any, job: Job, own: Sequence[Path] = ()) -> int | None:
    """Return how many tokens a prompt can have, less those that a delta puts in front."""
    most = models.context(config)
    if most is None:
        return None
    folders = [*job.adapter_paths, *own]
    configs = [read_json(folder / "adapter_config.json") for folder in folders]
    return most - sum(int(config.get("num_virtual_tokens") or 0) for config in configs)


def open_model(
    job: Job, kind: Kind, tokenizer: Any, size: int, most: int, own: Sequence[Path] = ()
) -> Opened:
    """Load the job's model with its deltas; `size` rows of `most` tokens are asked together.

    `own` are a prompt's adapters, which go on it last.

    Raises InputError for a checkpoint that can't be used, ResourceError for a budget that can't
    work. Peak memory: the dense model in the compute dtype, or the budget.
    """
    device = models.pick_device(job.recipe.device)
    placed = None
    found = placement(job, size, most)
    if found is None:
        before = begin(device, forget=False)
        config = head_config(job.checkpoint, kind)
        try:
            model = models.load_model(
                job.checkpoint, device=device, dtype=job.recipe.dtype, config=config
            )
        except InputError as exc:
            hint = "does the checkpoint have a head that says words?" if config else exc.hint
            raise InputError(str(exc), hint=hint) from None
    else:
        before, placed = _placed(job, kind, found, device)
        model = placed.model
    asked_for = adapters_of(job)
    folders = {**asked_for.folders, **{f"prompt-{n}": path for n, path in enumerate(own)}}
    model = plugged.load(model, folders, asked_for.wholes)
    experts.attach_stored(model, job.checkpoint)
    rows = size if found is None else found.rows
    asker = Asker(model.eval(), kind, tokenizer.mask_token_id, rows * most)
    return Opened(asker, device, before, placed)


def head_config(checkpoint: Path, kind: Kind) -> Any:
    """Return the config with the head that says words at masks; None where it is the model's own.

    Raises InputError if transformers has none.
    """
    if kind != "masked":
        return None
    import transformers

    config = models.load_config(checkpoint)
    try:
        found = getattr(transformers, HEADS[kind])._model_mapping[type(config)]
    except KeyError:
        raise InputError(
            f"{checkpoint}: transformers has no {config.model_type} that fills in masks"
        ) from None
    config.architectures = [found.__name__]
    return config


def _placed(job: Job, kind: Kind, found: budget.Placement, device: torch.device) -> tuple[int, Any]:
    """Return what was resident just before, and the model on placed weights."""
    from bmkit.runtime.placed import load
    from bmkit.runtime.placed.model import Room, place_model

    model = load.empty(job.checkpoint) if kind != "masked" else _empty(job)
    dtype = models.compute_dtype(job.recipe.dtype, models.stored_dtype(model.config), device)
    on_cpu = device.type == "cpu"
    if on_cpu:
        load.warm()
    before = begin(device)
    limit = job.cpu_memory if on_cpu else job.gpu_memory
    if limit is not None and not on_cpu:
        cap_gpu(device, limit)
    weights = None if limit is None else limit - found.fixed_bytes + found.rest_bytes
    quant = getattr(job.recipe, "quant", None)
    placed = place_model(
        job.checkpoint,
        model,
        device=device,
        dtype=dtype,
        quant="int8" if quant == "w8a8" else quant,
        room=Room(weights, None if on_cpu else budget.room_in_ram(job.cpu_memory)),
    )
    return before, placed


def _empty(job: Job) -> Any:
    """Build a model that fills in masks, with parameters on the meta device."""
    from transformers import AutoModelForMaskedLM

    from bmkit.runtime.placed import load

    config = models.load_config(job.checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return load.build(AutoModelForMaskedLM, config)
