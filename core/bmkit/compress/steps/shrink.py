"""Cut a model: fewer heads, neurons, channels and layers, in a config that transformers knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bmkit.compress import anatomy as anatomies
from bmkit.compress import shrink as cutting
from bmkit.compress.anatomy import Anatomy
from bmkit.compress.calibrate import HELD_OUT
from bmkit.compress.layerwise import TOKENS_AN_INPUT
from bmkit.compress.options.structure import Gates, Shrink
from bmkit.compress.steps.structure import require_alike
from bmkit.compress.widths import Widths, allocate
from bmkit.compress.work import Metrics, Work, write_config
from bmkit.errors import RecipeError


def run(work: Work, step: Shrink) -> Metrics:
    """Cut the model by what its parts carry on calibration text."""
    shared, source, job = work.shared, work.source, work.job
    anatomy = anatomies.read(source)
    target = wanted(anatomy, step)
    known = cutting.require_stored(source, anatomy, target)
    anatomy.require(target)
    now = anatomy.now
    layers, hidden = list(range(now.layers)), None
    norms: dict[str, tuple[float, float]] = {}
    job.reporter.info(told(now, target))
    if (target.layers, target.hidden) != (now.layers, now.hidden):
        seen = cutting.survey(
            source,
            anatomy,
            shared.rows,
            work.folder / "survey.safetensors",
            device=shared.device,
            reporter=job.reporter,
        )
        order = sorted(layers, key=lambda i: -seen.influence[i])
        layers = sorted(order[: target.layers])
        if target.hidden != now.hidden:
            hidden = seen.hidden.topk(target.hidden).indices.sort().values
            norms = seen.norms(hidden)
    files: dict[int, Path] = {}
    error = 0.0
    if (target.heads, target.ffn) != (now.heads, now.ffn):
        warn_of_few(work, now.ffn if target.ffn != now.ffn else now.hidden)
        files, error = cutting.fit(
            source,
            anatomy,
            cutting.Fitting(target, step.refit, step.damp),
            layers,
            shared.rows,
            work.folder,
            device=shared.device,
            reporter=job.reporter,
        )
    return finish(work, anatomy, target, known, cutting.Cut(layers, hidden, norms, files, error))


def warn_of_few(work: Work, inputs: int) -> None:
    """Say so if there are few tokens for layers of so many inputs."""
    fitted = work.shared.rows.numel() * (HELD_OUT - 1) // HELD_OUT
    if fitted < TOKENS_AN_INPUT * inputs:
        work.job.reporter.warn(
            f"{fitted} tokens to calibrate on are few: a layer has {inputs} inputs, and "
            f"{TOKENS_AN_INPUT} tokens for each are wanted; raise "
            "data.tokens, or name a longer text"
        )


def finish(
    work: Work, anatomy: Anatomy, target: Widths, known: dict[str, str], cut: cutting.Cut
) -> Metrics:
    """Write the checkpoint; return what was measured."""
    config = anatomy.config_at(target, cut.layers)
    write_config(work.out, config)
    require_alike(work, cut.layers)
    parameters = cutting.write(work.source, work.out, anatomy, target, known, cut)
    write_config(work.out, config)
    before = anatomy.size(anatomy.now)
    found: dict[str, float | int | str] = {
        "layers": target.layers,
        "parameters": parameters,
        "parameters_ratio": round(parameters / before, 6),
    }
    if cut.files:
        found["output_error"] = round(cut.output_error, 6)
    return found


def told(now: Widths, target: Widths) -> str:
    """Say what becomes of a model."""
    words = {"layers": "layers", "heads": "groups of heads", "ffn": "neurons", "hidden": "channels"}
    pairs = [(getattr(now, unit), getattr(target, unit), word) for unit, word in words.items()]
    return "keep " + ", ".join(f"{new} of {old} {word}" for old, new, word in pairs if new != old)


def wanted(anatomy: Anatomy, step: Shrink | Gates) -> Widths:
    """Return the widths that a recipe asks for. Raises RecipeError if there are none."""
    now = anatomy.now
    if step.parameters is not None:
        found = allocate(
            now,
            step.parameters,
            step.units,
            step.multiple_of,
            size=anatomy.size,
            holds=anatomy.holds,
        )
        if found is None or found == now:
            raise RecipeError(
                f"parameters: {step.parameters} of the blocks can't be had by cutting "
                f"{', '.join(step.units)}",
                hint="name more units, or another share",
            )
        return found
    counts = {
        "layers": step.num_hidden_layers,
        "heads": step.num_key_value_heads,
        "ffn": step.intermediate_size,
        "hidden": step.hidden_size,
    }
    asked = {unit: count for unit, count in counts.items() if count is not None}
    for unit, count in asked.items():
        if count > getattr(now, unit):
            raise RecipeError(
                f"{_KEYS[unit]}: {anatomy.path} has {getattr(now, unit)}, and {count} can't be cut "
                "out of them"
            )
    found = replace(now, **asked)
    if found == now:
        raise RecipeError(f"{anatomy.path} has these widths already")
    return found


_KEYS = {
    "layers": "num_hidden_layers",
    "heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "hidden": "hidden_size",
}
