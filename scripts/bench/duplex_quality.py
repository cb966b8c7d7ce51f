"""How well a duplex model takes turns on the hand-written dialogues, and what it has kept.

python scripts/bench/duplex_quality.py MODEL [--base smollm2-135m] [--data DATA] [--limit N]
    [--suites decision,replay,simulate] [--sst2 FOLDER] [--gsm8k FILE.jsonl] [--rows 300]
    [--sst2-rows 872]

Each target is said with what was measured and whether it is met. With --sst2 (a folder with
dev.tsv) labels are asked for as `bmkit prompt sentiment` does, of the base and of MODEL; with
--gsm8k (rows of `question` and `answer`) the loss on answers is measured of both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import machine

from bmkit.duplex import held_out
from bmkit.duplex.figures import CONDITIONS
from bmkit.errors import InputError
from bmkit.pipeline.stage import Request, Result, run_stage
from bmkit.report import Silent

AT_MOST = {
    "decision": {"false_takeover_rate": (0.05, 0.10)},
    "replay": {"stop_latency_p95": (1, 1)},
    "simulate": {
        "false_takeover_rate": (0.05, 0.10),
        "unanswered_rate": (0.02, 0.02),
        "stop_latency_p95": (1, 1),
    },
}
"""By suite and figure: the bounds, punctuated and not."""
AT_LEAST = {"decision": {"idle_f1": (0.95, 0.90), "lead": (0.0, 0.0)}}
KEPT = 0.02
"""The share of ordinary tasks that may be lost."""


def main() -> None:
    """Measure, print, and write results/duplex_quality.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--suites", default="decision,replay,simulate")
    parser.add_argument("--sst2", type=Path)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--rows", type=int, default=300, help="of --gsm8k")
    parser.add_argument("--sst2-rows", type=int, default=872)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    values = machine.facts()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = turns(asked, folder)
        report = json.loads((folder / "report/report.json").read_text(encoding="utf-8"))
        metrics = result.artifact.metrics
        kept = ordinary(asked, folder)
    checks = [*targets(metrics), *kept_targets(kept)]
    values |= {
        "model": report["model"],
        "trained_by": trained_by(result),
        "dialogues": report["dialogues"],
        "policy": report["policy"],
        "suites": report["suites"],
        "thresholds": report["thresholds"],
        "speed": dict(result.report),
        "ordinary": kept,
        "targets": checks,
        "met": sum(check["met"] for check in checks),
        "of": len(checks),
    }
    machine.save("duplex_quality", values, say=False)
    for check in checks:
        word = "met   " if check["met"] else "missed"
        print(f"{word}  {check['name']}: {check['value']:.4g}, wanted {check['wanted']}")
    print(f"{values['met']} of {values['of']} targets are met")


def turns(asked: argparse.Namespace, folder: Path) -> Result:
    """Evaluate the model, with the suites and dialogues that are asked for."""
    assign = [f"eval.suites=[{asked.suites}]"]
    if asked.limit:
        assign.append(f"eval.limit={asked.limit}")
    if asked.data:
        assign.append(f"eval.data={json.dumps(str(held_out.find(asked.data).absolute()))}")
    return run_stage(
        Request(
            "duplex",
            "eval",
            asked.model,
            out=folder / "report",
            assign=tuple(assign),
            part="eval",
            threads=asked.threads,
        ),
        Silent(),
    )


def trained_by(result: Result) -> dict[str, Any]:
    """Return how the model was trained, as far as its manifest says."""
    manifest = Path(result.artifact.steps[-1].inputs["model"].path or "") / "bmkit.json"
    if not manifest.is_file():
        return {}
    steps = json.loads(manifest.read_text(encoding="utf-8"))["steps"]
    tuned = [step["recipe"] for step in steps if step["stage"] == "tune"]
    names = ("train", "deltas", "scheme", "weights", "data")
    return {name: tuned[-1].get(name) for name in names} if tuned else {}


def targets(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each target of turn-taking that was measured."""
    for bounds, sign in ((AT_MOST, "≤"), (AT_LEAST, "≥")):
        for suite, figures in bounds.items():
            for figure, wanted in figures.items():
                for condition, bound in zip(CONDITIONS, wanted, strict=True):
                    name = f"{suite}_{condition}_{figure}"
                    if name in metrics:
                        yield check(name, float(metrics[name]), sign, bound)


def check(name: str, value: float, sign: str, bound: float) -> dict[str, Any]:
    """Return a target, what was measured, and whether it is met."""
    met = value <= bound if sign == "≤" else value >= bound
    return {"name": name, "value": value, "wanted": f"{sign} {bound:g}", "met": met}


def kept_targets(kept: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Yield the targets of what is kept, of those tasks that were asked for."""
    if "sst2_after" in kept:
        change = kept["sst2_after"] - kept["sst2_before"]
        yield check("sst2_accuracy_change", change, "≥", -KEPT)
    if "gsm8k_loss_after" in kept:
        change = kept["gsm8k_loss_after"] / kept["gsm8k_loss_before"] - 1
        yield check("gsm8k_loss_change", change, "≤", KEPT)


def ordinary(asked: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return figures of ordinary tasks, of the base and of the model."""
    found: dict[str, float] = {}
    if asked.sst2:
        lines = (asked.sst2 / "dev.tsv").read_text(encoding="utf-8").splitlines()
        rows = folder / "sst2.tsv"
        rows.write_text("\n".join(lines[: asked.sst2_rows]) + "\n", encoding="utf-8")
        for when, model in (("before", asked.base), ("after", asked.model)):
            found[f"sst2_{when}"] = sentiment(model, rows, folder / f"sst2-{when}", asked.threads)
    if asked.gsm8k:
        rows = folder / "gsm8k.jsonl"
        with asked.gsm8k.open(encoding="utf-8") as stream, rows.open("w", encoding="utf-8") as out:
            for _, line in zip(range(asked.rows), stream, strict=False):
                row = json.loads(line)
                pair = {"prompt": row["question"], "completion": row["answer"]}
                out.write(json.dumps(pair) + "\n")
        assign = ("eval.suites=[retain]", f"eval.chats={rows}", f"eval.before={asked.base}")
        out_folder = folder / "retain"
        request = Request(
            *("duplex", "eval", asked.model, out_folder, assign),
            part="eval",
            threads=asked.threads,
        )
        metrics = run_stage(request, Silent()).artifact.metrics
        for when in ("before", "after"):
            found[f"gsm8k_loss_{when}"] = float(metrics[f"retain_loss_{when}"])
            found[f"questions_{when}"] = float(metrics[f"retain_accuracy_{when}"])
    return found


def sentiment(model: str, rows: Path, out: Path, threads: int) -> float:
    """Return the accuracy of `bmkit prompt sentiment` on rows of SST-2."""
    data = (
        "data={columns: {text_a: 0, label: 1}, labels: {'0': negative, '1': positive}, "
        f"test: {json.dumps(str(rows))}}}"
    )
    request = Request("prompt", "sentiment", model, out, (data,), threads=threads)
    accuracy = run_stage(request, Silent()).artifact.metrics.get("accuracy")
    if accuracy is None:
        raise InputError(f"{model} has told no labels")
    return float(accuracy)


if __name__ == "__main__":
    main()
