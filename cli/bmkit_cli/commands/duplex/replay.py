"""`bmkit duplex replay`: a timed transcript through a model, the same on any machine's clock."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bmkit_cli import session
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


def replay(
    transcript: Annotated[
        Path, typer.Argument(help="A timed transcript: JSON lines; - is stdin.", show_default=False)
    ],
    model: ModelOpt,
    recipe: Annotated[str, typer.Argument(help="A recipe file or a built-in name.")] = "talk",
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
    """Say to a model what a transcript's user said, when it was said."""
    words = {**locals()}
    reporter = session.start(how, quiet=quiet, loud=verbose)
    from bmkit.data.slices import transcript as transcripts
    from bmkit.duplex.trained import require_scheme
    from bmkit.errors import UsageError
    from bmkit.pipeline import stage as stages
    from bmkit.pipeline import talking
    from bmkit_cli.commands.stages import show_plan
    from bmkit_cli.output import out as stdout

    stream = stdout()
    piped = str(transcript) == "-"
    if piped and "-" in (model, recipe):
        raise UsageError("only one of the transcript, the recipe and -m can be stdin")
    if piped:
        given = transcripts.of_lines(sys.stdin.buffer, "stdin", "stdin")
    else:
        given = transcripts.read(transcript)
    named = "stdin" if piped else str(transcript)
    checked = stages.check(request_of(words))
    request = replace(checked, model=session.model_path(model))
    prepared = talking.prepare(
        request,
        reporter,
        check=lambda known: require_scheme(known, given.scheme, named),
        bring=not plan,
    )
    if plan:
        show_plan({**stages.describe_plan(prepared, reporter), "path": None}, as_json=as_json)
        stages.check_fits(prepared, reporter)
        return
    with closing(talking.open_sessions(prepared, reporter)) as opened:
        from bmkit.duplex import replay as replays

        if given.slice_ms not in {None, opened.period_ms}:
            reporter.warn(
                f"{named} has slices of {given.slice_ms} ms, the model of {opened.period_ms}, "
                "which are taken"
            )
        if as_json:
            stream.json(replays.head(opened, given))
        cut = 0
        for found in replays.replay(opened.session(), given, opened.period_ms):
            cut += found.agent.cut
            if as_json:
                for row in found.rows():
                    stream.json(row)
            else:
                for line in replays.lines(found):
                    stream.text(line)
        if cut:
            reporter.warn(f"{cut} tokens of what the user said didn't fit: see kv.high")


def request_of(words: dict[str, Any], *, sessions: int = 1) -> Any:
    """Return the request that the options of a command make that opens a model to talk to."""
    from bmkit.errors import UsageError
    from bmkit.pipeline.stage import Request

    if words["recipe"] == "-" and words["model"] == "-":
        raise UsageError("the recipe and -m both want stdin", hint="name one of them")
    return Request(
        stage="duplex",
        recipe=words["recipe"],
        assign=tuple(words["assign"] or ()),
        device=words["device"],
        seed=words["seed"],
        threads=words["threads"],
        gpu_memory=words["gpu_memory"],
        cpu_memory=words["cpu_memory"],
        adapters=tuple(words["adapter"] or ()),
        flags={"quant": words["quant"]},
        rows=sessions,
    )
