"""spec-decode on real questions, by category, in turns with what people use instead.

python scripts/bench/specdec.py --questions spec-bench/questions.jsonl [--code HumanEval.jsonl.gz]
    [-m smollm2-135m] [-d DRAFT] [--rows 4] [--tokens 128] [--theirs] [--cpu-memory SIZE]

Each category is one run of `bmkit spec-decode --compare …`: all answer each prompt one after the
other, whoever begins changing from prompt to prompt, and all count from prompt to last token.
`cold` begins with an empty pool; `domain` with a pool of the category's other questions and their
answers, none of those that are asked; `repeated` asks the same questions a second time; `always`
guesses whether it pays or not, four tokens of the draft and all phrases: what can be accepted. With
`--cpu-memory` the target is streamed. `cost` is what a forward takes by its tokens and by those
that are in the cache. A run on a machine that does something else says `busy`, and is no result.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import machine

THREADS = 2
JOINED = {  # MT-bench's eight categories are one in Spec-Bench's tables
    name: "mt-bench"
    for name in (
        *("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem"),
        "humanities",
    )
}


def prompts(questions: Path, code: Path | None) -> dict[str, list[str]]:
    """Return the first turns of questions by category, and functions to complete."""
    found: dict[str, list[str]] = {}
    for line in questions.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name = JOINED.get(row["category"], row["category"])
        found.setdefault(name, []).append(row["turns"][0])
    if code is not None:
        with gzip.open(code, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        ask = "Complete this function:\n\n"
        found["humaneval"] = [ask + row["prompt"] for row in rows]
    return found


def cost(model: str) -> dict[str, dict[str, float]]:
    """Return the milliseconds of a forward of the fused decoder, by tokens held and tokens read."""
    import torch

    from bmkit.pull.run import find
    from bmkit.runtime.cpu.load import load_decoder
    from bmkit.runtime.speculation.targets import DecoderTarget
    from bmkit.runtime.speculation.tree import Tree

    torch.set_num_threads(THREADS)
    known = find(model)
    path = Path(model) if known is None else known.path
    target = DecoderTarget(load_decoder(path, threads=THREADS), 1)
    found: dict[str, dict[str, float]] = {}
    for held in (32, 512, 1536):
        target.begin(0, [5] * held, slots=64, adapter=None)
        times: dict[int, list[float]] = {}
        for turn in range(8):
            for size in (1, 2, 3, 4, 6, 8, 16, 32):
                tree = Tree.of(5)
                tree.add([5] * (size - 1), "", [1.0] * (size - 1))
                start = time.perf_counter()
                target.forward({0: tree})
                if turn:
                    times.setdefault(size, []).append(1e3 * (time.perf_counter() - start))
        found[str(held)] = {str(n): round(median(each), 3) for n, each in times.items()}
    return found


def run(
    arguments: argparse.Namespace, rows: list[str], pool: Path, rivals: str, *words: str
) -> dict[str, Any]:
    """Let spec-decode answer rows beside its rivals; return what it reports."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, report = Path(scratch) / "rows.jsonl", Path(scratch) / "report.json"
        asked.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
        command = [
            *(sys.executable, "-m", "bmkit_cli", "spec-decode", "-m", arguments.model),
            *("-i", str(asked), "--max-new-tokens", str(arguments.tokens)),
            *("--threads", str(THREADS), "--phrases", str(pool), "--verify-exact"),
            *("--report", str(report), "-o", str(Path(scratch) / "answers.jsonl")),
        ]
        command += ["-d", arguments.draft] if arguments.draft else []
        command += ["--compare", rivals] if rivals else []
        command += ["--cpu-memory", arguments.cpu_memory] if arguments.cpu_memory else []
        command += words
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return dict(json.loads(report.read_text()))


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of a report."""
    keys = (
        *("mean_accepted_length", "nodes_a_forward", "acceptance", "exact", "compare", "chosen"),
        *("phases", "draft_forwards", "draft_tokens"),
    )
    return {key: report[key] for key in keys if key in report}


def main() -> None:
    """Measure, and write scripts/bench/results/specdec.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--code", type=Path)
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("-d", "--draft")
    parser.add_argument("--rows", type=int, default=4, help="of a category")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--theirs", action="store_true", help="transformers' own ways as well")
    parser.add_argument("--cpu-memory", help="of the target, which is streamed then")
    parser.add_argument("--only", help="one category")
    parser.add_argument("--name", default="specdec")
    arguments = parser.parse_args()
    theirs = ["transformers", "prompt-lookup", *(["assisted"] if arguments.draft else [])]
    rivals = ",".join(["greedy", *(theirs if arguments.theirs else [])])
    result = {**machine.facts(), "threads": THREADS, "rows": arguments.rows}
    result |= {"tokens": arguments.tokens, "draft": arguments.draft, "categories": {}}
    if not arguments.cpu_memory:
        result["cost"] = cost(arguments.model)
    for name, asked in prompts(arguments.questions, arguments.code).items():
        if arguments.only not in {None, name}:
            continue
        measured = asked[: arguments.rows]
        with tempfile.TemporaryDirectory() as scratch:
            cold, domain = Path(scratch) / "cold", Path(scratch) / "domain"
            others = asked[arguments.rows : 3 * arguments.rows]
            found = {"cold": figures(run(arguments, measured, cold, rivals))}
            known = "greedy,transformers" if arguments.theirs else "greedy"
            found["repeated"] = figures(run(arguments, measured, cold, known))
            if arguments.draft and arguments.theirs:
                words = ("-s", "adaptive=false", "-s", "draft_length=4")
                always = run(arguments, measured, Path(scratch) / "always", "greedy", *words)
                found["always"] = figures(always)
            if others:
                run(arguments, others, domain, "")
                found["domain"] = figures(run(arguments, measured, domain, known))
        result["categories"][name] = found
        load = os.getloadavg()[0]
        result["busy"] = result.get("busy", False) or load > THREADS + 0.5
        for kind, values in found.items():
            print(name, kind, values["mean_accepted_length"], values["compare"], flush=True)
        machine.save(arguments.name, result)  # what is done is kept if it is stopped


if __name__ == "__main__":
    main()
