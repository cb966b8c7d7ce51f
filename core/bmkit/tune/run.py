"""The tune engine: a model, deltas beside it, rows to learn from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bmkit import artifact, env, plan
from bmkit import model as models
from bmkit.data.chat import Encoded, Example
from bmkit.data.slices.examples import weighed
from bmkit.deltas import compose
from bmkit.deltas.merge import merge
from bmkit.errors import counted
from bmkit.plan import Job, Outcome
from bmkit.runtime import experts, heads
from bmkit.runtime.opening import peak_gpu_bytes
from bmkit.train.dev import Dev
from bmkit.train.dropout import replace_dropout
from bmkit.train.fused_lora import fuse
from bmkit.train.head import prompted
from bmkit.train.preference import with_reference
from bmkit.train.ranks import Ranks
from bmkit.train.sharing import share_out
from bmkit.train.together import leave, own_device
from bmkit.train.trainer import Trained, steps_of, train
from bmkit.tune.attach import METHODS, attach
from bmkit.tune.base import Base, open_base
from bmkit.tune.duplex import finish, mixed
from bmkit.tune.lean import lean_rows
from bmkit.tune.lost import begin_with_lost
from bmkit.tune.merging import write_whole
from bmkit.tune.objectives import Batch, Objective, batches_of, objective
from bmkit.tune.own_words import own_words
from bmkit.tune.pruned import keep_pruned
from bmkit.tune.recipe import TuneRecipe
from bmkit.tune.task import figures_of
from bmkit.tune.weaker import weaken
from bmkit.tune.written import write_duplex, write_events, write_history

__all__ = ["METHODS", "run"]


def run(job: Job) -> Outcome:
    """Train the recipe's deltas, writing PEFT adapters (or the merged model) into `job.out`.

    Peak memory: the dense model in the compute dtype, and the activations of one batch; of several
    processes that share out the weights, each has its part on its GPU.
    """
    try:
        return _run(job)
    finally:
        leave()


def _run(job: Job) -> Outcome:
    recipe = job.recipe
    assert isinstance(recipe, TuneRecipe)  # the registry pairs recipe and engine
    if job.threads:
        torch.set_num_threads(job.threads)
    device = own_device(models.pick_device(recipe.device))
    tokenizer = models.load_tokenizer(job.checkpoint)
    config = models.load_config(job.checkpoint)
    goal = objective(recipe, config, job.files["data.train"], tokenizer, job.checkpoint)
    encoded = _encode(job, goal, "data.train")
    assert encoded is not None  # `train` is required
    encoded = _mixed(job, recipe, goal, encoded, tokenizer, device)
    dev = _encode(job, goal, "data.dev")
    base = open_base(job, goal, tokenizer, device)
    model, called = attach(job, recipe, goal, base, tokenizer)
    experts.attach_stored(model, job.checkpoint)
    lost: dict[str, float] = {}
    if recipe.original is not None:
        name = next(n for n, d in zip(called, recipe.deltas, strict=True) if d.type == "lora")
        left = begin_with_lost(model, name, job.models["original"].path, job.reporter)
        lost = {"lost_share_left": round(left, 6)}
    masks = keep_pruned(recipe, model)
    if env.shares_weights():
        kept = share_out(model, device)
        job.reporter.info(f"each process keeps {env.format_bytes(kept)} of the frozen weights")
    if goal.task == "preference":
        encoded, dev = _referred(recipe, goal, model, encoded, dev, device)
    size = recipe.train.per_device_eval_batch_size
    batches = [] if dev is None else batches_of(dev, goal.collate_dev, size)
    metrics = _train(job, recipe, goal, base, model, encoded, batches, device)
    base.report["peak_gpu_bytes"] = peak_gpu_bytes(device)
    metrics |= lost
    metrics |= {
        "rows": len(encoded.examples),
        "tokens": encoded.tokens,
        "labelled_tokens": encoded.labelled,
        "rows_truncated": encoded.truncated,
        "rows_dropped": encoded.dropped,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    known = None
    if goal.marks is not None:
        known, figures = finish(recipe, goal.marks.layout, getattr(goal.figures, "last", None))
        metrics |= figures
    if recipe.merge:
        whole = merge(model)
        masks.apply()
        write_whole(whole, job.checkpoint, job.out, goal.head)
        write_duplex(job.out, known, goal.marks, tokenizer)
        return Outcome("model", metrics, ("transformers",), base.report)
    base.close()
    metrics["delta_bytes"] = _write_deltas(job, goal, model, called, tokenizer)
    write_duplex(job.out, known, goal.marks, tokenizer)
    ours = any(spec.type in OURS for spec in recipe.deltas)
    loads = ("peft with bmkit.deltas.own",) if ours else ("peft",)
    return Outcome("delta", metrics, loads, base.report)


OURS = ("adapter", "parallel_adapter", "compacter", "low_rank_adapter", "bitfit")
"""Methods that PEFT doesn't have: it reads them once bmkit has registered them."""


def _encode(job: Job, goal: Objective, which: str) -> Encoded | None:
    path: Path | None = job.files.get(which)
    if path is None:
        return None
    return _said(job, goal, path, goal.encode(path))


def _said(job: Job, goal: Objective, path: Path, encoded: Encoded) -> Encoded:
    """Warn of rows that were cut or dropped; return all."""
    if encoded.truncated or encoded.dropped:
        job.reporter.warn(
            f"{path.name}: {counted(encoded.truncated, 'row', 'rows')} cut at "
            f"{goal.max_length} tokens, "
            f"{encoded.dropped} dropped"
        )
    return encoded


def _mixed(
    job: Job,
    recipe: TuneRecipe,
    goal: Objective,
    encoded: Encoded,
    tokenizer: Any,
    device: torch.device,
) -> Encoded:
    """Return dialogues with rows of `data.mix` and the model's own words among them, if asked."""
    path, data = job.files.get("data.mix"), recipe.data
    others: list[Example] = []
    if not data.mix_share or goal.task != "duplex":
        return encoded
    if path is not None and goal.encode_mix is not None:
        others += _said(job, goal, path, goal.encode_mix(path)).examples
    if tokens := recipe.own_words(env.process()[1]):
        how: dict[str, Any] = {"max_length": goal.max_length, "dtype": recipe.dtype}
        said = own_words(job, tokens, tokenizer, device=device, **how)
        others += weighed(said).examples
    return mixed(encoded, others, data.mix_share, recipe.seed) if others else encoded


def _referred(
    recipe: TuneRecipe,
    goal: Objective,
    model: Any,
    encoded: Encoded,
    dev: Encoded | None,
    device: torch.device,
) -> tuple[Encoded, Encoded | None]:
    """Return the pairs, each with what the model says of both answers before it is trained."""
    size = recipe.train.per_device_eval_batch_size
    pairs: Any = goal.collate
    # Deltas change nothing yet, but for those in front; some have taken a part of the weights.
    with compose.active(model, ()) if prompted(model) else nullcontext():
        found = [
            None
            if part is None
            else replace(part, examples=with_reference(model, part.examples, pairs, size, device))
            for part in (encoded, dev)
        ]
    assert found[0] is not None  # there are rows to train on
    return found[0], found[1]


def _train(
    job: Job,
    recipe: TuneRecipe,
    goal: Objective,
    base: Base,
    model: Any,
    encoded: Encoded,
    batches: list[Batch],
    device: torch.device,
) -> dict[str, float | int | str]:
    """Train, measuring before, meanwhile and after; return the figures."""
    metrics: dict[str, float | int | str] = {}
    spec = recipe.train
    if batches:
        before = goal.figures(model.eval(), batches, device)
        metrics |= {f"{name}_before": round(value, 6) for name, value in before.items()}
    replace_dropout(model)
    fuse(model)
    rows = lean_rows(job, recipe, goal, model, encoded.examples)
    steps = steps_of(spec, len(rows.examples))
    ranks = [Ranks(tuner, steps) for tuner in compose.tuners(model)]

    def penalised(model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
        found, count = rows.loss(model, batch)
        for each in ranks:
            found = found + count * each.penalty()
        return found, count

    meanwhile: dict[str, float] = {}
    trained = train(
        model,
        rows.examples,
        rows.collate,
        spec.model_copy(update={"gradient_checkpointing": False})  # blocks do that
        if base.placed
        else spec,
        seed=recipe.seed,
        work=job.work,
        device=device,
        reporter=job.reporter,
        loss=penalised if ranks else rows.loss,
        dev=_dev(recipe, goal, model, batches, device, meanwhile),
        callbacks=ranks,
        replay=not base.placed,  # blocks that come and go compute all of theirs again
    )
    rows.close()
    metrics["train_loss"] = round(trained.loss, 6)
    metrics["steps"] = trained.steps
    if trained.best_step is not None:
        metrics["best_step"] = trained.best_step
    if recipe.strength < 1:
        weaken(model, recipe.strength)
        meanwhile.clear()  # that was measured with all of it
    if batches:
        model.eval()
        after = meanwhile if _measured_last(trained) and not ranks else {}
        after = after or goal.figures(model, batches, device)
        metrics |= {name: round(value, 6) for name, value in after.items()}
        shown = [name for name in figures_of(goal.task) if name in after]
        told = [f"{n} {before[n]:.3f} before, {after[n]:.3f} after" for n in shown]
        job.reporter.info("held out: " + "; ".join(told).replace("dev_", ""))
    write_history(job.out, trained.history)
    if spec.tensorboard:
        write_events(job.out, trained.history)
    return metrics


def _measured_last(trained: Trained) -> bool:
    """Tell whether the last measurement was of the weights that are there now."""
    if trained.best_step not in (None, trained.steps):
        return False
    return any("loss" not in e and e["step"] == trained.steps for e in trained.history)


def _dev(
    recipe: TuneRecipe,
    goal: Objective,
    model: Any,
    batches: Sequence[Batch],
    device: torch.device,
    last: dict[str, float],
) -> Dev | None:
    """Return what is measured while training; None without held-out rows, or if nobody asked.

    `last` gets all figures of the last measurement.
    """
    spec = recipe.train
    best = spec.load_best_model_at_end or spec.early_stopping_patience is not None
    if not batches or not (best or spec.eval_steps):
        return None
    name = spec.metric_for_best_model or "dev_loss"
    shown = figures_of(goal.task)

    def measure() -> dict[str, float]:
        found = goal.figures(model, batches, device)
        last.clear()
        last.update(found)
        return {name: value for name, value in found.items() if name in shown}

    return Dev(
        measure,
        spec.eval_steps,
        name if best else None,
        greater_is_better=name != "dev_loss",
        patience=spec.early_stopping_patience,
    )


def _write_deltas(
    job: Job, goal: Objective, model: Any, called: Sequence[str], tokenizer: Any
) -> int:
    """Write each delta as a PEFT directory of its own; return the bytes of their weights.

    A single one lies in `job.out` itself.
    """
    folders = [job.out] if len(called) == 1 else [job.out / artifact.DELTAS / n for n in called]
    size = 0
    for name, folder in zip(called, folders, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        compose.save(model, name, folder)
        _name_base(folder / "adapter_config.json", job.checkpoint.absolute())
        size += (folder / "adapter_model.safetensors").stat().st_size
        if goal.marks is not None and goal.marks.added:
            tokenizer.save_pretrained(folder)  # by which PEFT knows how many rows there are
    if len(called) > 1:
        artifact.write_order(job.out, called)
    if goal.head is not None:
        heads.write(folders[0], goal.head)
    return size


def _name_base(file: Path, base: Path) -> None:
    """Name the base by its absolute path, which `peft` loads from anywhere on this machine."""
    values = plan.read_json(file) | {"base_model_name_or_path": str(base)}
    file.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
