"""`bmkit compress` and `bmkit pull`, and what all stages that write an artifact have in common."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bmkit_cli import session, stopping
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
    RecipeArg,
    ReportOpt,
    SeedOpt,
    SetOpt,
    ThreadsOpt,
    VerboseOpt,
)


def pull(
    name: Annotated[
        str, typer.Argument(help="A model's name, a directory, a .gguf file, or a hub id.")
    ],
    out: OutOpt = None,
    as_json: JsonOpt = False,
    force: ForceOpt = False,
    how: ProgressOpt = Progress.auto,
    verbose: VerboseOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Bring a model in, once."""
    reporter = session.start(how, quiet=quiet, loud=verbose)
    from bmkit.pull import run as pulls
    from bmkit_cli.output import out as stdout

    stream = stdout()
    start = time.monotonic()
    found, reused = pulls.pull(name, reporter, out=out, force=force)
    took = f" in {time.monotonic() - start:.1f} s"
    reporter.info(f"pull: {'unchanged, reused ' if reused else 'wrote '}{found.path}{took}")
    if as_json:
        assert found.manifest is not None  # pull writes one
        stream.json(
            {
                "path": str(found.path),
                "kind": found.kind,
                "digest": found.digest,
                "key": found.manifest.key,
                "reused": reused,
                "metrics": dict(found.metrics),
                "seconds": round(time.monotonic() - start, 3),
            }
        )
    else:
        stream.text(str(found.path))


def compress(
    recipe: RecipeArg,
    model: ModelOpt,
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
    """Make a checkpoint smaller."""
    run_stage("compress", {**locals()})


def request_of(stage: str, given: dict[str, Any]) -> Any:
    """Return the request that a command's options make; its model is not known yet."""
    from bmkit.errors import UsageError
    from bmkit.pipeline.stage import Request

    if given["recipe"] == "-" and given["model"] == "-":
        raise UsageError("the recipe and -m both want stdin", hint="name one of them")
    return Request(
        stage=stage,
        recipe=given["recipe"],
        model="",
        out=given["out"],
        assign=tuple(given["assign"] or ()),
        data=given.get("data"),
        device=given["device"],
        seed=given["seed"],
        threads=given["threads"],
        gpu_memory=given["gpu_memory"],
        cpu_memory=given["cpu_memory"],
        part=given.get("part", ""),
        force=given["force"],
    )


def run_stage(stage: str, given: dict[str, Any]) -> None:
    """Run a stage with the options of its command, and print what it left."""
    reporter = session.start(given["how"], quiet=given["quiet"], loud=given["verbose"])
    from dataclasses import replace

    from bmkit import place
    from bmkit.pipeline import stage as stages
    from bmkit_cli.output import out as stdout

    stream = stdout()
    place.refuse_report(given["report"])
    request = request_of(stage, given)
    checked = stages.check(request)  # a typo is told before the stage before this one is done
    request = replace(checked, model=session.model_path(given["model"]))
    if given["plan"]:
        prepared = stages.prepare(request, reporter, bring=False)
        show_plan(stages.describe_plan(prepared, reporter), as_json=given["as_json"])
        stages.check_fits(prepared, reporter)
        return
    with stopping.telling():
        result = stages.run_stage(request, reporter)
    if result.helped:
        return
    path = str(given["out"] or result.artifact.path)
    summary = describe(result, path)
    if not result.reused:
        reporter.info(f"{stage}: wrote {path} in {result.seconds:.1f} s")
    if given["report"]:
        write_report(given["report"], {**summary, **result.report, "stage": stage})
    if given["as_json"]:
        stream.json(summary)
    stages.require_gates(result)
    if not given["as_json"]:
        stream.text(path)


def describe(result: Any, path: str) -> dict[str, Any]:
    """Return what `--json` prints of a finished stage."""
    summary = {
        "path": path,
        "kind": result.artifact.kind,
        "digest": result.artifact.digest,
        "key": result.key,
        "reused": result.reused,
        "metrics": dict(result.artifact.metrics),
        "seconds": result.seconds,
    }
    if result.unmet:
        summary["unmet"] = list(result.unmet)
    return summary


def write_report(path: Path, values: dict[str, Any]) -> None:
    """Write a `--report` file, with the memory that the process took."""
    import json

    from bmkit import env, place

    values = {**values, "peak_rss_bytes": env.peak_rss_bytes()}
    place.write_text(path, json.dumps(values, indent=1) + "\n")


def show_plan(values: dict[str, Any], *, as_json: bool) -> None:
    """Print what a stage would do."""
    from bmkit.env import format_bytes
    from bmkit_cli.output import out as stdout

    if as_json:
        stdout().json(values)
        return
    lines = [f"{values['stage']} {values['recipe']}"]
    for name, entry in values["inputs"].items():
        lines.append(f"  {name:12} {entry['path']}  ({entry['kind']}, {entry['digest'][:12]}…)")
    lines += [f"  step         {step}" for step in values["steps"]]
    peak = values["peak"]
    needs = ", ".join(f"{k.removesuffix('_bytes')} {format_bytes(v)}" for k, v in peak.items())
    lines.append(f"  needs        {needs}")
    for name, rate in values.get("expected", {}).items():
        phase = name.removesuffix("_tokens_per_second")
        lines.append(f"  expected     {phase}: about {rate:.3g} tokens a second")
    lines.append(f"  key          {values['key']}")
    if values["path"] is not None:
        state = "is there already, will be reused" if values["reused"] else "will be written"
        lines.append(f"  out          {values['path']}  ({state})")
    stdout().text("\n".join(lines))
