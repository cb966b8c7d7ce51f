"""The compress engine: step by step, each from one checkpoint to the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmkit import model, plan
from bmkit.compress import calibrate, corpus, distill, frequent, layers, layerwise, pack, perplexity
from bmkit.compress.calibrate import pack_rows
from bmkit.compress.corpus import Text
from bmkit.compress.recipe import (
    ROUNDING,
    CompressRecipe,
    Distill,
    DropLayers,
    FrequentTokens,
    Gptq,
    Magnitude,
    Quantize,
)
from bmkit.errors import InputError, RecipeError, did_you_mean
from bmkit.nn import walk
from bmkit.nn.rounding import dequantize, quantize
from bmkit.plan import Headers, Job, Outcome
from bmkit.report import task
from bmkit.runtime.frequent import read as read_frequent
from bmkit.runtime.frequent import write as write_frequent
from bmkit.runtime.voice import Voice

EVALUATED = 32
"""Rows that perplexity is measured on, at most."""
Metrics = Mapping[str, float | int | str]


@dataclass
class Shared:
    """What several steps need of the model that the recipe begins with, made when it is asked."""

    job: Job
    recipe: CompressRecipe
    device: torch.device
    _texts: list[Text] | None = None
    _rows: Tensor | None = None
    _voice: Voice | None = None

    @property
    def voice(self) -> Voice:
        """Return the model as one that speaks and judges."""
        if self._voice is None:
            self._voice = Voice(
                self.job.checkpoint,
                device=self.device,
                dtype=self.recipe.dtype,
                rows=8,
                reporter=self.job.reporter,
            )
        return self._voice

    @property
    def texts(self) -> list[Text]:
        """Return what is learned from."""
        if self._texts is None:
            counts = [s.likeliest for s in self.recipe.steps if isinstance(s, Distill)]
            self._texts = corpus.gather(
                self.voice,
                self.recipe.data,
                self.job.files.get("data.calibration"),
                self.job.work / "texts",
                likeliest=max(counts, default=None),
                seed=self.recipe.seed,
                reporter=self.job.reporter,
            )
        return self._texts

    @property
    def generates(self) -> bool:
        """Tell whether the model is one that says a next token."""
        config = model.load_config(self.job.checkpoint)
        return model.task(config) == "generate" and not config.is_encoder_decoder

    @property
    def has_rows(self) -> bool:
        """Tell whether there are rows of text without letting the model speak for it."""
        return self._rows is not None or "data.calibration" in self.job.files

    @property
    def rows(self) -> Tensor:
        """Return the texts one after the other, prompts too, as rows of token ids."""
        if self._rows is None:
            data, file = self.recipe.data, self.job.files.get("data.calibration")
            if self.generates:
                ids = [t.ids for t in self.texts]
            elif file is not None:
                tokenizer = model.load_tokenizer(self.job.checkpoint)
                ids = corpus.plain(tokenizer, file)
            else:
                raise InputError(
                    f"{self.job.checkpoint} makes up no text to calibrate on",
                    hint="name some: -s data.calibration=texts.txt",
                )
            self._rows = pack_rows(ids, data.sequence_length, 2 * data.tokens)
            self.forget()
        return self._rows

    def forget(self) -> None:
        """Give the memory back that the model takes."""
        self._voice = None


@dataclass(frozen=True)
class Work:
    """One step: from the checkpoint at `source` to the one at `out`."""

    source: Path
    out: Path
    folder: Path
    """What a stopped run goes on from."""
    shared: Shared = field(repr=False)

    @property
    def job(self) -> Job:
        """Return the whole job."""
        return self.shared.job


def run(job: Job) -> Outcome:
    """Apply the recipe's steps to the model, writing the last one's result into `job.out`.

    Results of earlier steps lie in `job.work`, and a stopped run goes on behind the last whole one.
    Peak memory of rounding: one output shard and four float32 copies of the largest layer.
    """
    recipe = job.recipe
    assert isinstance(recipe, CompressRecipe)  # the registry pairs recipe and engine
    if job.threads:
        torch.set_num_threads(job.threads)
    headers = plan.read_headers(job.checkpoint)
    if headers.config.get("quantization_config"):
        raise InputError(
            f"{job.checkpoint} is quantised already", hint="compress the model it was made from"
        )
    shared = Shared(job, recipe, model.pick_device(recipe.device))
    source = job.checkpoint
    metrics: dict[str, float | int | str] = {}
    for i, step in enumerate(recipe.steps):
        last = i == len(recipe.steps) - 1
        out, note = job.work / f"step-{i}", job.work / f"step-{i}.json"
        if last:
            out = job.out
        elif note.is_file():
            job.reporter.info(f"{step.method}: done by an earlier run")
        if last or not note.is_file():
            if not last:
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir(parents=True)
            folder = job.work / f"part-{i}"
            found = METHODS[step.method](Work(source, out, folder, shared), step)
            if not last:
                note.write_text(json.dumps(found), encoding="utf-8")
        else:
            found = plan.read_json(note)
        metrics |= found
        source = out
    kinds = {step.method for step in recipe.steps}
    if shared.has_rows and shared.generates and "distill" not in kinds:
        metrics |= _perplexities(shared, job.out)
    loads = "transformers + compressed-tensors" if kinds & set(ROUNDING) else "transformers"
    return Outcome("model", metrics, (loads,))


def _perplexities(shared: Shared, out: Path) -> Metrics:
    """Measure perplexity on the rows that nothing was fitted to, of the model before and after."""
    rows = shared.rows
    held = sorted(calibrate.held_out(len(rows))) or [len(rows) - 1]
    chosen = [rows[i].tolist() for i in held[:EVALUATED]]
    before, after = (
        perplexity.of(
            Voice(
                path,
                device=shared.device,
                dtype=shared.recipe.dtype,
                rows=1,
                reporter=shared.job.reporter,
            ),
            chosen,
        )
        for path in (shared.job.checkpoint, out)
    )
    shared.job.reporter.info(f"perplexity on rows held out: {before:.3f} before, {after:.3f} after")
    return {
        "perplexity_before": round(before, 4),
        "perplexity": round(after, 4),
        "perplexity_ratio": round(after / before, 4),
    }


def _quantize(work: Work, step: Quantize) -> Metrics:
    job, source = work.job, work.source
    headers, skeleton, linears, left, chosen = _scope(source, step.exclude_modules)
    group = _group_size(step, [m.in_features for n, m in linears.items() if n not in left])
    device = work.shared.device
    writer = model.ShardWriter(work.out)
    count = before = after = 0
    error = energy = 0.0
    with task(
        job.reporter, f"quantize to {step.bits} bits", len(headers.tensors), "tensors"
    ) as bar:
        for name, tensor in model.tensors(headers):
            if name not in chosen:
                writer.add(name, tensor)
                bar.advance()
                continue
            weight = tensor.to(device)
            try:
                values, scale = quantize(weight, step.bits, group, scale_search=step.scale_search)
            except ValueError as exc:
                raise InputError(f"{source}: layer {name}: {exc}") from None
            difference = dequantize(values, scale) - weight.float()
            error += float(difference.square().sum())
            energy += float(weight.float().square().sum())
            count += 1
            before += weight.numel() * 4
            for suffix, part in pack.pack(values, scale, step.bits).items():
                after += part.numel() * part.element_size()
                writer.add(f"{name.removesuffix('weight')}{suffix}", part.cpu())
            bar.advance()
    writer.close()
    model.copy_side_files(source, work.out)
    ignore = sorted({*walk.output_heads(skeleton), *left})
    config = dict(headers.config)
    config["quantization_config"] = pack.config(step.bits, group, ignore)
    _write_config(work.out, config)
    return {
        "layers": count,
        "bytes_before": before,
        "bytes_after": after,
        "bytes_ratio": round(after / before, 6),
        "weight_error": round((error / max(energy, 1e-30)) ** 0.5, 6),
    }


def _magnitude(work: Work, step: Magnitude) -> Metrics:
    job, source = work.job, work.source
    headers, *_, chosen = _scope(source, step.exclude_modules)
    writer = model.ShardWriter(work.out)
    zeros = total = 0
    with task(job.reporter, step.method, len(headers.tensors), "tensors") as bar:
        for name, tensor in model.tensors(headers):
            if name in chosen:
                try:
                    tensor = layerwise.smallest_gone(step, tensor.to(work.shared.device)).cpu()
                except ValueError as exc:
                    raise InputError(f"{source}: layer {name}: {exc}") from None
                zeros += int((tensor == 0).sum())
                total += tensor.numel()
            writer.add(name, tensor)
            bar.advance()
    writer.close()
    model.copy_side_files(source, work.out)
    return {"layers": len(chosen), "sparsity": round(zeros / total, 6)}


def _layerwise(work: Work, step: layerwise.Layerwise) -> Metrics:
    shared, source, reporter = work.shared, work.source, work.job.reporter
    headers, skeleton, linears, left, _ = _scope(source, step.exclude_modules)
    widths = [m.in_features for n, m in linears.items() if n not in left]
    group = _group_size(step, widths) if isinstance(step, Gptq) else None
    fitted = shared.rows.numel() * (calibrate.HELD_OUT - 1) // calibrate.HELD_OUT
    if fitted < layerwise.TOKENS_AN_INPUT * max(widths):
        reporter.warn(
            f"{fitted} tokens to calibrate on are few: a layer has {max(widths)} inputs, and "
            f"{layerwise.TOKENS_AN_INPUT} tokens for each are wanted; raise data.tokens"
        )
    where, found = layerwise.walk_blocks(
        source,
        step,
        shared.rows,
        left,
        group,
        work.folder,
        device=shared.device,
        reporter=reporter,
    )
    writer = model.ShardWriter(work.out)
    before = after = 0
    for name, tensor in model.tensors(headers):
        if name not in where:
            writer.add(name, tensor)
            continue
        parts = layerwise.read(where[name], name)
        before += 4 * tensor.numel()
        if isinstance(step, Gptq):
            parts = pack.pack(parts["values"], parts["scale"], step.bits)
        for suffix, part in parts.items():
            after += part.numel() * part.element_size()
            writer.add(f"{name.removesuffix('weight')}{suffix}", part)
    writer.close()
    model.copy_side_files(source, work.out)
    metrics: dict[str, float | int | str] = {
        "layers": found.layers,
        "output_error": round(found.output_error, 6),
    }
    if not isinstance(step, Gptq):
        return {**metrics, "sparsity": round(found.sparsity, 6)}
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    written = {name.removeprefix(prefix) for name in where}
    outside = [n for n in linears if f"{n.removeprefix(prefix)}.weight" not in written]
    ignore = sorted({*walk.output_heads(skeleton), *left, *outside})
    config = dict(headers.config)
    config["quantization_config"] = pack.config(step.bits, group, ignore)
    _write_config(work.out, config)
    if found.fallbacks:
        reporter.info(f"{found.fallbacks} of {found.layers} layers: plain rounding is better")
    return {
        **metrics,
        "fallbacks": found.fallbacks,
        "bytes_before": before,
        "bytes_after": after,
        "bytes_ratio": round(after / before, 6),
    }


def _scope(
    source: Path, patterns: list[str]
) -> tuple[Headers, nn.Module, dict[str, nn.Linear], list[str], set[str]]:
    """Return what a step that compresses linear layers works on.

    The checkpoint's headers, its model on the meta device, all linear layers by name, those that
    `patterns` exclude, and the stored names of the others' weights.
    """
    headers = plan.read_headers(source)
    skeleton = model.empty_model(source)
    linears = walk.linears(skeleton)
    left = _excluded(linears, patterns)
    chosen = _to_round(source, headers, skeleton, {n for n in linears if n not in left})
    return headers, skeleton, linears, left, chosen


def _excluded(linears: Mapping[str, nn.Module], patterns: list[str]) -> list[str]:
    """Return the linear layers that `patterns` name by their ends."""
    for pattern in patterns:
        if not any(_ends(n, pattern) for n in linears):
            close = did_you_mean(pattern, {n.rpartition(".")[2] for n in linears})
            raise RecipeError(
                f"exclude_modules: no linear layer's name ends in `{pattern}`", hint=close or None
            )
    return [n for n in linears if any(_ends(n, e) for e in patterns)]


def _to_round(source: Path, headers: Headers, skeleton: nn.Module, modules: set[str]) -> set[str]:
    """Return the stored names of the weights of `modules`."""
    chosen = {f"{n}.weight" for n in modules}
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    stored = {t.name for t in headers.tensors}
    if not chosen & stored and prefix != ".":
        chosen = {n.removeprefix(prefix) for n in chosen}
    if not chosen & stored:
        raise InputError(
            f"{source} has no linear layers that can be quantised",
            hint="models whose layers are Conv1D (GPT-2) are not covered",
        )
    if absent := sorted(chosen - stored):
        raise InputError(
            f"{source}: {len(absent)} linear layers have no weight of their own in the "
            f"checkpoint, as {absent[0]}",
            hint="name them in exclude_modules, to leave them as they are",
        )
    return chosen


def _write_config(out: Path, config: Mapping[str, Any]) -> None:
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _ends(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _group_size(step: Quantize | Gptq, widths: list[int]) -> int | None:
    if step.group_size == "channel":
        return None
    sizes = (128, 64, 32) if step.group_size == "auto" else (step.group_size,)
    fits = [size for size in sizes if not any(width % size for width in widths)]
    if not fits:
        odd = next(w for w in widths if w % min(sizes))
        raise RecipeError(
            f"group_size {step.group_size} does not divide a layer with {odd} inputs",
            hint="write group_size: auto, or channel",
        )
    return fits[0]


def _drop_layers(work: Work, step: DropLayers) -> Metrics:
    headers = plan.read_headers(work.source)
    skeleton = model.empty_model(work.source)
    stack, count = walk.stack(skeleton)
    kept = layers.spread(count, step.keep) if isinstance(step.keep, int) else step.keep
    if len(kept) > count or kept[-1] >= count:
        raise RecipeError(f"keep: {work.source} has {count} layers")
    names = model.load_config(work.source).attribute_map
    key = names.get("num_hidden_layers", "num_hidden_layers")
    if headers.config.get(key) != count:
        raise InputError(f"{work.source}/config.json says no `{key}: {count}`, as the model has it")
    config = {**headers.config, key: len(kept)}
    for key in ("layer_types", "no_rope_layers"):
        if isinstance(config.get(key), list) and len(config[key]) == count:
            config[key] = [config[key][i] for i in kept]
    if isinstance(config.get("max_window_layers"), int):
        config["max_window_layers"] = sum(i < config["max_window_layers"] for i in kept)
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    stored = {t.name for t in headers.tensors}
    if not any(name.startswith(f"{stack}.") for name in stored):
        stack = stack.removeprefix(prefix)
    writer = model.ShardWriter(work.out)
    parameters = 0
    for name, tensor in model.tensors(headers):
        new = layers.renamed(name, stack, kept)
        if new is not None:
            writer.add(new, tensor)
            parameters += tensor.numel()
    writer.close()
    model.copy_side_files(work.source, work.out)
    _write_config(work.out, config)
    return {"layers": len(kept), "parameters": parameters}


def _frequent_tokens(work: Work, step: FrequentTokens) -> Metrics:
    config = model.load_config(work.source).get_text_config()
    texts = work.shared.texts
    said = [t.ids[t.first :] for t in texts]
    tokens = frequent.ranked(said, min(step.tokens, config.vocab_size), config.vocab_size)
    _copy(work.source, work.out)
    write_frequent(work.out, tokens)
    return {"covered": round(frequent.covered(said, tokens), 6)}


def _copy(source: Path, out: Path) -> None:
    """Take a checkpoint over as it is."""
    for file in {t.file for t in plan.read_headers(source).tensors}:
        shutil.copyfile(file, out / file.name)
    index = source / "model.safetensors.index.json"
    if index.is_file():
        shutil.copyfile(index, out / index.name)
    model.copy_side_files(source, out)


def _distill(work: Work, step: Distill) -> Metrics:
    shared, config = work.shared, model.load_config(work.source)
    tokens = read_frequent(work.source, config.get_text_config().vocab_size)
    taught = distill.lessons(
        shared.voice,
        shared.texts,
        step.likeliest,
        tokens,
        work.folder / "lessons",
        reporter=work.job.reporter,
    )
    shared.forget()
    student, metrics = distill.train_student(
        work.source,
        taught,
        step,
        rows=tokens,
        seed=shared.recipe.seed,
        work=work.folder / "training",
        device=shared.device,
        reporter=work.job.reporter,
    )
    model.save(student, work.source, work.out)
    return metrics


METHODS: dict[str, Callable[[Work, Any], Metrics]] = {
    "quantize": _quantize,
    "gptq": _layerwise,
    "magnitude": _magnitude,
    "wanda": _layerwise,
    "sparsegpt": _layerwise,
    "drop_layers": _drop_layers,
    "frequent_tokens": _frequent_tokens,
    "distill": _distill,
}
