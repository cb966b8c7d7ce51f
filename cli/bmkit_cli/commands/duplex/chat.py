"""`bmkit duplex chat`: talk to a model on the terminal, also while it speaks."""

from __future__ import annotations

import asyncio
import sys
from contextlib import closing
from dataclasses import replace
from typing import Annotated

import typer

from bmkit_cli import session
from bmkit_cli.commands.duplex.replay import request_of
from bmkit_cli.options import (
    AdapterOpt,
    CpuOpt,
    DeviceOpt,
    GpuOpt,
    ModelOpt,
    Progress,
    ProgressOpt,
    QuantOpt,
    QuietOpt,
    SeedOpt,
    SetOpt,
    ThreadsOpt,
    VerboseOpt,
)


def chat(
    model: ModelOpt,
    recipe: Annotated[str, typer.Argument(help="A recipe file or a built-in name.")] = "talk",
    plain: Annotated[
        bool, typer.Option("--plain", help="Lines instead of lanes: what is said, then answers.")
    ] = False,
    tail: Annotated[
        int,
        typer.Option(
            "--tail",
            min=1,
            help="Slices behind the last line after which it ends, even in mid-answer; on lines.",
        ),
    ] = 64,
    adapter: AdapterOpt = None,
    quant: QuantOpt = None,
    assign: SetOpt = None,
    device: DeviceOpt = None,
    seed: SeedOpt = None,
    threads: ThreadsOpt = None,
    gpu_memory: GpuOpt = None,
    cpu_memory: CpuOpt = None,
    how: ProgressOpt = Progress.auto,
    verbose: VerboseOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Talk to a model; type while it speaks to interrupt it."""
    words = {**locals()}
    reporter = session.start(how, quiet=quiet, loud=verbose)
    from bmkit.duplex.recipe import DuplexRecipe
    from bmkit.errors import counted
    from bmkit.pipeline import stage as stages
    from bmkit.pipeline import talking
    from bmkit_cli.output import out as stdout

    lanes = not plain and sys.stdin.isatty() and sys.stdout.isatty()
    if lanes:
        _require_textual()
    stream = None if lanes else stdout()
    checked = stages.check(request_of(words))
    request = replace(checked, model=session.model_path(model))
    prepared = talking.prepare(request, reporter)
    spec = prepared.recipe
    assert isinstance(spec, DuplexRecipe)  # the registry pairs recipe and engine
    with closing(talking.open_sessions(prepared, reporter)) as opened:
        from bmkit.duplex.server.live import alone

        live = alone(opened, spec.policy.interrupt)
        if stream is None:
            from bmkit_cli.lanes import Lanes

            app = Lanes(live)
            app.run()
            if app.failed is not None:
                raise app.failed
        else:
            from bmkit_cli import lines

            linger = (spec.policy.max_wait_slices or 0) + 2
            talking_on = lines.talk(
                live,
                lambda text: stream.text(text, end=""),
                linger=linger,
                tail=tail,
                warn=reporter.warn,
            )
            if asyncio.run(talking_on):
                reporter.warn(
                    f"it was still speaking {counted(tail, 'slice', 'slices')} behind the last line"
                )


def _require_textual() -> None:
    """Raise ResourceError if the lanes can't be shown."""
    from bmkit.errors import ResourceError

    try:
        import textual  # noqa: F401 - whether it is there
    except ImportError:
        raise ResourceError(
            "the lanes need textual, which isn't installed",
            hint="pip install 'bmkit[serve]', or --plain",
        ) from None
