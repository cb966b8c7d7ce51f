"""`bmkit prompt`: ask a model for labels by a template."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bmkit_cli import session
from bmkit_cli.commands.stages import request_of, run_stage
from bmkit_cli.options import (
    CpuOpt,
    DataOpt,
    DeviceOpt,
    ForceOpt,
    GpuOpt,
    JsonOpt,
    ModelOpt,
    OutOpt,
    PlanOpt,
    Progress,
    ProgressOpt,
    QuietOpt,
    RecipeArg,
    ReportOpt,
    SeedOpt,
    SetOpt,
    ThreadsOpt,
    VerboseOpt,
)


def prompt(
    recipe: RecipeArg,
    model: ModelOpt,
    data: DataOpt = None,
    out: OutOpt = None,
    assign: SetOpt = None,
    device: DeviceOpt = None,
    seed: SeedOpt = None,
    threads: ThreadsOpt = None,
    gpu_memory: GpuOpt = None,
    cpu_memory: CpuOpt = None,
    plan: PlanOpt = False,
    as_json: JsonOpt = False,
    report: ReportOpt = None,
    force: ForceOpt = False,
    how: ProgressOpt = Progress.auto,
    verbose: VerboseOpt = False,
    quiet: QuietOpt = False,
    examples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Show N rows wrapped and in tokens; do nothing."),
    ] = None,
) -> None:
    """Ask a model for labels by a template; keep and measure the prompt."""
    given = {**locals()}
    if examples is None:
        run_stage("prompt", given)
    else:
        show_examples(given, examples)


def show_examples(given: dict[str, Any], count: int) -> None:
    """Print what the template makes of the first rows. No weights are read."""
    reporter = session.start(given["how"], quiet=given["quiet"], loud=given["verbose"])
    from dataclasses import replace

    from bmkit import registry
    from bmkit.pipeline import stage as stages
    from bmkit_cli.output import out as stdout

    stream = stdout()
    request = stages.check(request_of("prompt", given))
    request = replace(request, model=session.model_path(given["model"]))
    prepared = stages.prepare(request, reporter)
    job = prepared.job(prepared.out, prepared.out, reporter)
    with stages.placed_errors(prepared):
        found = registry.load("bmkit.prompt.examples:examples")(job, count)
    if given["as_json"]:
        stream.json(found)
    else:
        stream.text("\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> list[str]:
    """Return examples as text: a token is followed by its role where that isn't `text`."""
    lines = [f"{found['model_kind']} model, {found['max_seq_length']} tokens at most"]
    for label, words in found["label_words"].items():
        shown = ", ".join(f"{word['text']!r} = {' '.join(word['tokens'])}" for word in words)
        lines.append(f"{label}: {shown}")
    for one in found["examples"]:
        label = f"  label {one['label']}" if "label" in one else ""
        cut = f", {one['cut']} cut ({found['truncate_method']})" if one["cut"] else ""
        which = f"template {one['template']}  " if "template" in one else ""
        count = len(one["tokens"])
        lines += ["", f"{which}{one['row']}{label}  {count} tokens{cut}", one["text"]]
        lines += _runs("", one["tokens"])
        lines += _runs("behind: ", one.get("behind", []))
        if "decoder" in one:
            said = [("[asked] " * t["asked"]) + t["token"] for t in one["decoder"]]
            lines.append(f"  decoder: {' '.join(said)}")
    return lines


def _runs(title: str, tokens: list[dict[str, Any]]) -> list[str]:
    """Return a line for each run of tokens of one role."""
    lines: list[str] = []
    last = None
    for token in tokens:
        if token["role"] != last:
            lines.append(f"  {title}{token['role']:12}")
            last = token["role"]
        lines[-1] += f" {token['token']}" + " ◀ asked" * token["asked"]
    return lines
