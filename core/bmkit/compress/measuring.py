"""Measure the checkpoints of a run: all on the same rows, in the memory that there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bmkit import env, model, plan
from bmkit.compress import account, calibrate, perplexity
from bmkit.compress.plan import opened
from bmkit.compress.work import Metrics, Shared
from bmkit.errors import InputError, ResourceError
from bmkit.report import task
from bmkit.runtime.voice import Voice

EVALUATED = 32
"""Rows that perplexity is measured on, at most."""


def accounts(shared: Shared, made: Sequence[tuple[str, Path]]) -> list[Metrics]:
    """Measure the checkpoints that steps have made, each on the same rows.

    One that doesn't fit into memory, or the job's budget, is streamed, and isn't timed then.
    """
    job, rows = shared.job, _held_out(shared)
    shared.forget()
    timed = shared.recipe.measure_speed and shared.generates and _has_tokenizer(job.checkpoint)
    vocabulary = model.load_config(job.checkpoint).get_text_config().vocab_size
    lines: list[Metrics] = []
    with task(job.reporter, "measure", len(made), "models") as bar:
        for name, path in made:
            found: dict[str, float] = {}
            room = _room(shared, path)
            voice = _opened(shared, path, room) if rows or (timed and room is None) else None
            if voice is not None and rows:
                found["perplexity"] = perplexity.of(voice, rows)
            if voice is not None and timed and room is None:
                ids = rows[0] if rows else [i % min(vocabulary, 97) for i in range(account.PROMPT)]
                found["decode"], found["prefill"] = account.speed(voice, ids)
            del voice
            size, weights, nonzeros = account.size(path)
            flops = account.flops_per_token(path)
            lines.append(account.Account(name, size, weights, nonzeros, flops, **found).row())
            bar.advance()
    return lines


def _room(shared: Shared, path: Path) -> int | None:
    """Return the memory for a checkpoint that can't be opened whole; None if it can."""
    job = shared.job
    if shared.device.type == "cuda":
        free, limit = torch.cuda.mem_get_info(shared.device)[0], job.gpu_memory
    else:
        free, limit = env.available_ram_bytes(), job.cpu_memory
    room = min(free * 9 // 10, limit or free)
    need = opened(plan.read_headers(path), shared.recipe.data.sequence_length)
    return None if need <= room else room


def _opened(shared: Shared, path: Path, room: int | None) -> Voice | None:
    """Open a checkpoint; None, with a warning, if there is no room even to stream it."""
    reporter = shared.job.reporter
    if room is not None:
        reporter.info(f"measured in {env.format_bytes(room)}: streamed, so no speed is told")
    try:
        return Voice(
            path,
            device=shared.device,
            dtype=shared.recipe.dtype,
            rows=1,
            reporter=reporter,
            memory=room,
        )
    except ResourceError as exc:
        reporter.warn(f"perplexity isn't measured: {exc}")
        return None


def _has_tokenizer(path: Path) -> bool:
    """Tell whether a checkpoint can be opened as one that speaks."""
    try:
        model.load_tokenizer(path)
    except InputError:
        return False
    return True


def _held_out(shared: Shared) -> list[list[int]]:
    """Return rows of given text that nothing was fitted to; none if there is no such text."""
    kinds = {step.method for step in shared.recipe.steps}
    if not shared.judges or "frequent_tokens" in kinds:
        return []
    if kinds & {"distill", "gates"}:
        given = "data.calibration" in shared.job.files or "moefy" in kinds
        texts = shared.texts if given else []
        return [texts[i].ids for i in calibrate.dev_of(len(texts))]
    if not shared.has_rows:
        return []
    rows = shared.rows
    held = sorted(calibrate.held_out(len(rows)))
    looks = any(getattr(s, "activations", None) == "static" for s in shared.recipe.steps)
    if not held and not looks and kinds <= {"quantize", "magnitude", "drop_layers"}:
        held = [0]  # that nothing looks at
    return [rows[i].tolist() for i in held[:EVALUATED]]
