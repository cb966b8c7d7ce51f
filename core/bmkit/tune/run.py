"""The tune engine: a frozen model, a delta beside it, rows to learn from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bmkit import env, plan
from bmkit import model as models
from bmkit.data.batch import Padding
from bmkit.data.chat import Encoded, encode_file
from bmkit.deltas import address, lora
from bmkit.deltas.modules import modules_of_model
from bmkit.errors import InputError
from bmkit.plan import Job, Outcome
from bmkit.runtime import experts
from bmkit.runtime.budget import room_in_ram
from bmkit.train.loss import mean_loss
from bmkit.train.trainer import train
from bmkit.tune.plan import placement
from bmkit.tune.recipe import TuneRecipe

METHODS: dict[str, Callable[[Any, Sequence[str]], Any]] = {"lora": lora.config}


def run(job: Job) -> Outcome:
    """Train the recipe's delta, writing a PEFT adapter (or the merged model) into `job.out`.

    Peak memory: the dense model in the compute dtype, and the activations of one batch.
    """
    recipe = job.recipe
    assert isinstance(recipe, TuneRecipe)  # the registry pairs recipe and engine
    if job.threads:
        torch.set_num_threads(job.threads)
    device = models.pick_device(recipe.device)
    tokenizer = models.load_tokenizer(job.checkpoint)
    encoded = _encode(job, recipe, tokenizer, "data.train")
    assert encoded is not None  # `train` is required
    dev = _encode(job, recipe, tokenizer, "data.dev")
    from peft import get_peft_model

    report: dict[str, Any] = {"budget_bytes": {"cpu": job.cpu_memory, "gpu": job.gpu_memory}}
    placed = _placed(job, recipe, device, report)
    base = (
        placed.model
        if placed
        else models.load_model(job.checkpoint, device=device, dtype=recipe.dtype)
    )
    delta = recipe.deltas[0]
    modules = address.matched(
        modules_of_model(base),
        delta.target_modules,
        delta.exclude_modules,
        delta.layers,
        kinds=lora.KINDS,
        method=delta.type,
    )
    torch.manual_seed(recipe.seed)
    config = METHODS[delta.type](delta, modules)
    peft_model = get_peft_model(base, config)
    experts.attach_stored(peft_model, job.checkpoint)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    collate = Padding(pad)
    batches = _batches(dev, collate, recipe.train.per_device_eval_batch_size)
    metrics: dict[str, float | int | str] = {}
    if batches:
        metrics["dev_loss_before"] = round(mean_loss(peft_model, batches, device), 6)
    trained = train(
        peft_model,
        encoded.examples,
        collate,
        recipe.train.model_copy(update={"gradient_checkpointing": False})  # blocks do that
        if placed
        else recipe.train,
        seed=recipe.seed,
        work=job.work,
        device=device,
        reporter=job.reporter,
    )
    metrics["train_loss"] = round(trained.loss, 6)
    if batches:
        metrics["dev_loss"] = round(mean_loss(peft_model, batches, device), 6)
        before, after = metrics["dev_loss_before"], metrics["dev_loss"]
        job.reporter.info(f"held-out loss: {before:.3f} before, {after:.3f} after")
    metrics |= {
        "steps": trained.steps,
        "rows": len(encoded.examples),
        "tokens": encoded.tokens,
        "labelled_tokens": encoded.labelled,
        "rows_truncated": encoded.truncated,
        "rows_dropped": encoded.dropped,
        "trainable_parameters": sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
    }
    if recipe.merge:
        models.save(peft_model.merge_and_unload(), job.checkpoint, job.out)
        return Outcome("model", metrics, ("transformers",), report)
    if placed:
        placed.close()
    peft_model.save_pretrained(job.out, safe_serialization=True)
    (job.out / "README.md").unlink(missing_ok=True)  # a template with nothing filled in
    _put_in_order(job.out / "adapter_config.json", job.checkpoint.absolute())
    return Outcome("delta", metrics, ("peft",), report)


def _placed(job: Job, recipe: TuneRecipe, device: torch.device, report: dict[str, Any]) -> Any:
    """Return the frozen base on placed weights, where there is a budget; else None.

    `report` gets the resident memory just before the model is opened.
    """
    found = placement(job)
    if found is None:
        report["rss_before_bytes"] = env.rss_bytes()
        return None
    from bmkit.runtime.placed import load
    from bmkit.runtime.placed.model import Room, place_model

    model = load.empty(job.checkpoint)
    dtype = models.compute_dtype(recipe.dtype, models.stored_dtype(model.config), device)
    on_cpu = device.type == "cpu"
    if on_cpu:
        load.warm()
    env.forget_peak_rss()
    report["rss_before_bytes"] = env.rss_bytes()
    limit = job.cpu_memory if on_cpu else job.gpu_memory
    assert limit is not None  # else there is no placement
    weights = limit - found.fixed_bytes + found.rest_bytes
    job.reporter.info(
        f"{len(found.resident)} of {len(found.units)} units resident, "
        f"{env.format_bytes(found.streamed_bytes)} streamed there and back each step"
    )
    return place_model(
        job.checkpoint,
        model,
        device=device,
        dtype=dtype,
        room=Room(weights, None if on_cpu else room_in_ram(job.cpu_memory)),
        checkpoint=True,
    )


def _encode(job: Job, recipe: TuneRecipe, tokenizer: Any, which: str) -> Encoded | None:
    path: Path | None = job.files.get(which)
    if path is None:
        return None
    if recipe.data.format == "chat" and tokenizer.chat_template is None:
        raise InputError(
            f"{job.checkpoint} has no chat template", hint="set data.format to raw or auto"
        )
    encoded = encode_file(
        path,
        tokenizer,
        max_length=recipe.data.max_length,
        raw=recipe.data.format == "raw",
    )
    if encoded.truncated or encoded.dropped:
        job.reporter.warn(
            f"{path.name}: {encoded.truncated} rows cut at {recipe.data.max_length} tokens, "
            f"{encoded.dropped} dropped"
        )
    return encoded


def _batches(dev: Encoded | None, collate: Padding, size: int) -> list[dict[str, torch.Tensor]]:
    if dev is None:
        return []
    rows = sorted(dev.examples, key=lambda e: len(e["input_ids"]))
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def _put_in_order(file: Path, base: Path) -> None:
    """Sort what PEFT keeps as sets, so that the same training gives the same bytes.

    The base is named by its absolute path, which `peft` loads from anywhere on this machine.
    """
    values = plan.read_json(file)
    values["base_model_name_or_path"] = str(base)
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])
    file.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
