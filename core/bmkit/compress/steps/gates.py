"""Let gates learn what of a model stays, then cut it."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from bmkit.compress import anatomy as anatomies
from bmkit.compress import distill as teaching
from bmkit.compress import gating
from bmkit.compress import shrink as cutting
from bmkit.compress.norms import norms_of_zeros
from bmkit.compress.options.structure import Gates
from bmkit.compress.steps.shrink import finish, told, wanted, warn_of_few
from bmkit.compress.work import Metrics, Work
from bmkit.errors import InputError
from bmkit.model import save_tensors


def run(work: Work, step: Gates) -> Metrics:
    """Train gates on what the model at the beginning says, and cut what they have closed."""
    shared, source, job = work.shared, work.source, work.job
    if not shared.generates:
        raise InputError(
            f"{job.checkpoint} doesn't say a next token, which gates learn from",
            hint="shrink takes any text",
        )
    anatomy = anatomies.read(source)
    target = wanted(anatomy, step)
    known = cutting.require_stored(source, anatomy, target)
    anatomy.require(target)
    job.reporter.info(told(anatomy.now, target))
    gates = gating.make(anatomy, target, 0)
    file = work.folder / "gates.safetensors"
    if not file.is_file():
        taught = teaching.lessons(
            shared.voice,
            shared.texts,
            step.likeliest,
            None,
            work.folder / "lessons",
            reporter=job.reporter,
        )
        shared.forget()
        gates = gating.learn(
            source,
            anatomy,
            target,
            taught,
            step,
            seed=shared.recipe.seed,
            work=work.folder / "training",
            device=shared.device,
            reporter=job.reporter,
        )
        save_tensors(file, gates.state_dict())
    gates.load_state_dict(load_file(file))
    gates.to("cpu")
    layers, kept, values = gating.decide(gates, target, anatomy.now.layers)
    files: dict[int, Path] = {}
    error = 0.0
    if (target.heads, target.ffn) != (anatomy.now.heads, anatomy.now.ffn):
        if step.refit:
            warn_of_few(work, anatomy.now.ffn if target.ffn != anatomy.now.ffn else target.hidden)
        files, error = cutting.fit(
            source,
            anatomy,
            cutting.Fitting(target, step.refit, step.damp, chosen=kept, scales=values),
            layers,
            shared.rows,
            work.folder,
            device=shared.device,
            reporter=job.reporter,
        )
    hidden = gating.channels(gates, target)
    norms = {} if hidden is None else norms_of_zeros(source, anatomy, hidden)
    cut = cutting.Cut(layers, hidden, norms, files, error)
    found = finish(work, anatomy, target, known, cut)
    return {**found, "expected_ratio": round(gating.expected(anatomy, gates), 6)}
