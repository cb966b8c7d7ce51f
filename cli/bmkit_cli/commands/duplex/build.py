"""`bmkit duplex build`: chats to dialogues in slices of time."""

from __future__ import annotations

from typing import Annotated

import typer

from bmkit_cli.commands.stages import run_stage
from bmkit_cli.options import (
    ForceOpt,
    JsonOpt,
    OutOpt,
    PlanOpt,
    Progress,
    ProgressOpt,
    QuietOpt,
    ReportOpt,
    SeedOpt,
    SetOpt,
    VerboseOpt,
)


def build(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, a built-in name, or - for stdin.")
    ] = "starter",
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="CHAT.jsonl", help="Chats, in the place of `sources`."),
    ] = None,
    out: OutOpt = None,
    assign: SetOpt = None,
    seed: SeedOpt = None,
    plan: PlanOpt = False,
    as_json: JsonOpt = False,
    report: ReportOpt = None,
    force: ForceOpt = False,
    how: ProgressOpt = Progress.auto,
    verbose: VerboseOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Make dialogues in slices of time of ordinary chats."""
    given = {**locals()}
    unused = dict.fromkeys(("device", "threads", "gpu_memory", "cpu_memory"))
    run_stage("duplex", {**given, **unused, "model": ""})
