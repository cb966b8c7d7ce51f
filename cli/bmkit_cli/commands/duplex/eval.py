"""`bmkit duplex eval`: how well a model takes turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bmkit_cli.commands.stages import run_stage
from bmkit_cli.options import (
    CpuOpt,
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
    ReportOpt,
    SeedOpt,
    SetOpt,
    ThreadsOpt,
    VerboseOpt,
)


def evaluate(
    model: ModelOpt,
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, a built-in name, or - for stdin.")
    ] = "eval",
    data: Annotated[
        str | None,
        typer.Option("--data", help="Dialogues in slices, or data that `duplex build` has made."),
    ] = None,
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
) -> None:
    """Measure how well a model takes turns, beside simple rules."""
    given = {**locals(), "data": None, "part": "eval"}
    if data is not None:
        from bmkit.duplex import held_out

        file = held_out.find(Path(data).expanduser())
        given["assign"] = [*(assign or ()), f"eval.data={json.dumps(str(file.absolute()))}"]
    run_stage("duplex", given)
