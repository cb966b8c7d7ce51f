"""`bmkit duplex serve`: sessions over a WebSocket, and a page to try them."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bmkit_cli import session, stopping
from bmkit_cli.commands.duplex.replay import request_of
from bmkit_cli.options import (
    AdapterOpt,
    CpuOpt,
    DeviceOpt,
    GpuOpt,
    JsonOpt,
    ModelOpt,
    PlanOpt,
    Progress,
    ProgressOpt,
    QuantOpt,
    QuietOpt,
    SeedOpt,
    SetOpt,
    ThreadsOpt,
    VerboseOpt,
)


def serve(
    model: ModelOpt,
    recipe: Annotated[str, typer.Argument(help="A recipe file or a built-in name.")] = "talk",
    host: Annotated[
        str | None, typer.Option("--host", help="The address to listen on.", show_default=False)
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="0 takes a free one.", show_default=False),
    ] = None,
    sessions: Annotated[
        Path | None,
        typer.Option(
            "--sessions",
            help="A folder that sessions are kept in: they go on after a crash.",
            show_default=False,
        ),
    ] = None,
    adapter: AdapterOpt = None,
    quant: QuantOpt = None,
    assign: SetOpt = None,
    device: DeviceOpt = None,
    seed: SeedOpt = None,
    threads: ThreadsOpt = None,
    gpu_memory: GpuOpt = None,
    cpu_memory: CpuOpt = None,
    plan: PlanOpt = False,
    as_json: JsonOpt = False,
    how: ProgressOpt = Progress.auto,
    verbose: VerboseOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Let browsers and programs talk to a model: its address is written once it listens."""
    said = {"serve.host": host, "serve.port": port}
    more = [f"{key}={value}" for key, value in said.items() if value is not None]
    words = {**locals(), "assign": [*(assign or ()), *more]}
    reporter = session.start(how, quiet=quiet, loud=verbose)
    from bmkit.duplex.recipe import DuplexRecipe
    from bmkit.pipeline import stage as stages
    from bmkit.pipeline import talking
    from bmkit_cli.commands.stages import show_plan
    from bmkit_cli.output import out as stdout

    stream = stdout()
    checked = stages.check(request_of(words))
    request = replace(checked, model=session.model_path(model))
    prepared = talking.prepare(request, reporter, bring=not plan)
    spec = prepared.recipe
    assert isinstance(spec, DuplexRecipe)  # the registry pairs recipe and engine
    prepared = replace(prepared, request=replace(request, rows=spec.serve.max_sessions))
    if plan:
        show_plan({**stages.describe_plan(prepared, reporter), "path": None}, as_json=as_json)
        stages.check_fits(prepared, reporter)
        return
    from bmkit.duplex.server import serving

    listening = serving.Listening(spec, sessions)  # a port that is taken is told of at once
    with closing(listening), closing(talking.open_sessions(prepared, reporter)) as opened:
        where = listening.address()
        if as_json:
            stream.json(where)
        else:
            stream.text(where["url"])
        left = "" if sessions is None else f"; sessions are kept in {sessions}"
        stopping.kept = f"clients were told{left}"
        serving.serve(listening, opened, reporter)
