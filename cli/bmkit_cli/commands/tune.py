"""`bmkit tune` and `bmkit merge`: train deltas, look at where they go, put them into weights."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bmkit_cli import session, stopping
from bmkit_cli.commands.stages import describe, request_of, run_stage, write_report
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


def tune(
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
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Show the model, and what of it would be trained.")
    ] = False,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=V1,V2", help="Run with each value; repeatable."),
    ] = None,
) -> None:
    """Train a delta on a frozen model."""
    given = {**locals()}
    if inspect and grid:
        from bmkit.errors import UsageError

        raise UsageError("--inspect shows one run: it goes without --grid")
    if inspect:
        show_tree(given)
    elif grid:
        sweep(given)
    else:
        run_stage("tune", given)


def merge(
    model: ModelOpt,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="DELTA", help="A delta; repeatable.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,…", help="Leave a LoRA delta: the weighted sum of them all."),
    ] = None,
    out: OutOpt = None,
    as_json: JsonOpt = False,
    force: ForceOpt = False,
    how: ProgressOpt = Progress.auto,
    verbose: VerboseOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Put deltas, or a prompt, into their base's weights."""
    reporter = session.start(how, quiet=quiet, loud=verbose)
    import math
    import time

    from bmkit.errors import UsageError
    from bmkit.pipeline import merging
    from bmkit_cli.output import out as stdout

    stream = stdout()
    start = time.monotonic()
    try:
        shares = None if weights is None else [float(word) for word in weights.split(",")]
        if not all(map(math.isfinite, shares or ())):
            raise ValueError
    except ValueError:
        raise UsageError(f"--weights {weights}: it takes numbers, as 1,-0.5") from None
    path = session.model_path(model)
    found, reused = merging.merge(path, adapters or (), shares, reporter, out=out, force=force)
    assert found.manifest is not None  # it was just written
    reporter.info(f"merge: {'unchanged, reused ' if reused else 'wrote '}{out or found.path}")
    if as_json:
        stream.json(
            {
                "path": str(out or found.path),
                "kind": found.kind,
                "digest": found.digest,
                "key": found.manifest.key,
                "reused": reused,
                "metrics": {},
                "seconds": round(time.monotonic() - start, 3),
            }
        )
    else:
        stream.text(str(out or found.path))


def show_tree(given: dict[str, Any]) -> None:
    """Print the model as a tree, with the recipe's deltas in it. No weights are read."""
    reporter = session.start(given["how"], quiet=given["quiet"], loud=given["verbose"])
    from dataclasses import replace

    from bmkit import registry
    from bmkit.deltas import view
    from bmkit.pipeline import stage as stages
    from bmkit_cli import tree
    from bmkit_cli.output import out as stdout

    stream = stdout()
    request = stages.check(request_of("tune", given))
    request = replace(request, model=session.model_path(given["model"]))
    prepared = stages.prepare(request, reporter)
    stages.estimate(prepared, reporter)  # what it refuses can't be looked at either
    job = prepared.job(prepared.out, prepared.out, reporter)
    found = registry.load("bmkit.tune.inspect:tree")(job)
    if given["as_json"]:
        stream.json(view.to_json(found))
    else:
        stream.text(tree.text(found, colours=stream.terminal), end="")


def sweep(given: dict[str, Any]) -> None:
    """Run the stage with each combination of `--grid`, and say which was best."""
    reporter = session.start(given["how"], quiet=given["quiet"], loud=given["verbose"])
    from dataclasses import replace

    from bmkit import place
    from bmkit.errors import DivergedError, GateError, UsageError
    from bmkit.pipeline import grid
    from bmkit.pipeline import stage as stages
    from bmkit_cli.output import out as stdout

    stream = stdout()
    if given["plan"]:
        raise UsageError("--plan shows one run: it goes without --grid")
    place.refuse_report(given["report"])
    grid.out_is_free(given["out"])
    checked = stages.check(request_of("tune", given))
    grid.requests(checked, given["grid"])  # a typo is told before the model is waited for
    request = replace(checked, model=session.model_path(given["model"]))
    asked = grid.requests(request, given["grid"])
    grid.check(asked)
    with stopping.telling():
        done = list(grid.run(asked, reporter))
    if not done:
        raise DivergedError("no run of the sweep has reached its end")
    metric = stages.load_recipe(request)[1].model_dump()["train"]["metric_for_best_model"]
    chosen, by = grid.best([dict(result.artifact.metrics) for *_, result in done], metric)
    for line in grid.table([(n, dict(r.artifact.metrics)) for n, _, r in done], chosen):
        reporter.info(line)
    reporter.info(f"best by {by}: {done[chosen][0]}")
    runs = [
        {"name": name, **describe(result, str(one.out or result.artifact.path))}
        for name, one, result in done
    ]
    summary = {"path": runs[chosen]["path"], "best": runs[chosen]["name"], "by": by, "runs": runs}
    if given["report"]:
        write_report(given["report"], {**summary, "stage": "tune"})
    if given["as_json"]:
        stream.json(summary)
    if unmet := [f"{name}: {'; '.join(r.unmet)}" for name, _, r in done if r.unmet]:
        raise GateError(f"all runs are built, but {' | '.join(unmet)}")
    if not given["as_json"]:
        stream.text(str(runs[chosen]["path"]))
