"""What each way of compressing SmolLM2 costs and gives: perplexity, bytes, speed, wall time.

python scripts/bench/compress.py                     the methods by themselves
python scripts/bench/compress.py --peer PYTHON       and llm-compressor beside them, line by line
python scripts/bench/compress.py --cook              a combined recipe, and tasks tuned behind it
python scripts/bench/compress.py --healed            what training makes good again

Calibrated on one kind of text (RAG prompts of Spec-Bench), judged on another (its articles to be
summarised), which no method has seen. Speeds of all results are taken in turns, one round after the
other, in one process. Single runs: quality is exact, wall times are for an idea.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import torch

from bmkit.compress import account, perplexity
from bmkit.compress.calibrate import pack_rows
from bmkit.report import Silent
from bmkit.runtime.voice import Voice

DATA = machine.ROOT.parent / "shared" / "data"
RESULT = "compress"
RECIPES: dict[str, tuple[str, ...]] = {
    "int8": (),
    "int4": (),
    "int4, 64": ("steps.0.group_size=64",),
    "int4, asymmetric": ("steps.0.symmetric=false",),
    "gptq": (),
    "gptq, 64, symmetric": ("steps.0.group_size=64", "steps.0.symmetric=true"),
    "gptq, 3 bits": ("steps.0.bits=3",),
    "quanto": (),
    "quanto, int4": ("steps.0.weights=int4",),
    "quanto, int4, hqq": ("steps.0.weights=int4", "steps.0.optimizer=hqq"),
    "quanto, int8 activations": ("steps.0.weights=int8", "steps.0.activations=int8"),
    "quanto, float8 activations": ("steps.0.activations=float8",),
    "awq": (),
    "w8a8": (),
    "smoothquant": (),
    "magnitude, 2:4": ("steps.0.pattern=2:4",),
    "wanda, 2:4": ("steps.0.pattern=2:4",),
    "wanda": (),
    "sparsegpt": ("steps.0.pattern=unstructured", "steps.0.sparsity=0.5"),
    "sparsegpt, 2:4": ("steps.0.pattern=2:4",),
    "moefy": ("data.tokens=32768",),
    "shrink": (),
}
FOUR: dict[str, Any] = {"bits": 4, "group_size": 32, "symmetric": False}
PEERS: dict[str, dict[str, Any]] = {
    "int8": {"kind": "round", "bits": 8, "symmetric": True},
    "int4": {"kind": "round", "bits": 4, "group_size": 32, "symmetric": True},
    "int4, 64": {"kind": "round", "bits": 4, "group_size": 64, "symmetric": True},
    "int4, asymmetric": {"kind": "round", **FOUR},
    "gptq": {"kind": "gptq", **FOUR},
    "gptq, 64, symmetric": {"kind": "gptq", "bits": 4, "group_size": 64, "symmetric": True},
    "awq": {"kind": "awq", **FOUR},
    "w8a8": {"kind": "w8a8"},
    "smoothquant": {"kind": "smoothquant"},
    "wanda, 2:4": {"kind": "wanda", "pattern": "2:4"},
    "wanda": {"kind": "wanda"},
    "sparsegpt": {"kind": "sparsegpt"},
    "sparsegpt, 2:4": {"kind": "sparsegpt", "pattern": "2:4"},
}
"""What llm-compressor is asked for where it has the same."""
PEER_SECONDS = 900
NEEDS_TEXT = {"gptq", "awq", "smoothquant", "wanda", "sparsegpt", "moefy", "shrink", "quanto"}


def texts(category: str) -> str:
    """Return Spec-Bench's questions of a kind, one after the other."""
    rows = [json.loads(x) for x in (DATA / "spec-bench" / "questions.jsonl").open()]
    return "\n\n".join(r["turns"][0] for r in rows if r["category"] == category)


def bmkit(*words: object) -> dict[str, Any]:
    """Run a command and return what it says as JSON."""
    done = subprocess.run(
        ["bmkit", *(str(w) for w in words), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"bmkit {words[0]} {words[1]}: exit {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def judge(path: Path, rows: list[list[int]]) -> dict[str, float]:
    """Return perplexity, bytes and weights of a checkpoint."""
    cpu = torch.device("cpu")
    voice = Voice(path, device=cpu, dtype="auto", rows=1, reporter=Silent())
    size, weights, nonzeros = account.size(path)
    return {
        "perplexity": round(perplexity.of(voice, rows), 4),
        "bytes": size,
        "weights": weights,
        "nonzeros": nonzeros,
        "flops_per_token": account.flops_per_token(path),
    }


def judged(path: Path, rows: list[list[int]], first: dict[str, float]) -> dict[str, float]:
    """Return what `judge` does, and the ratio of perplexities to the `first`'s."""
    found = judge(path, rows)
    return {**found, "perplexity_ratio": round(found["perplexity"] / first["perplexity"], 4)}


def line_of(found: dict[str, Any]) -> str:
    """Return a line for eyes."""
    size, ratio = found["bytes"] / 1e6, found["perplexity_ratio"]
    return f" x {ratio:8.3f} {size:7.1f} MB {found['seconds']:6.0f} s"


def speeds(paths: dict[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """Time all checkpoints in turns: medians, and their ratio to the first's."""
    cpu = torch.device("cpu")
    ids = list(range(100, 100 + account.PROMPT))
    voices = {
        name: Voice(path, device=cpu, dtype="auto", rows=1, reporter=Silent())
        for name, path in paths.items()
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, voice in voices.items():
            found[name].append(account.speed(voice, ids))
    medians = {
        name: [statistics.median(kind) for kind in zip(*times, strict=True)]
        for name, times in found.items()
    }
    first = next(iter(medians.values()))
    return {
        name: {
            "decode": round(decode, 2),
            "decode_ratio": round(decode / first[0], 3),
            "prefill": round(prefill, 1),
            "prefill_ratio": round(prefill / first[1], 3),
        }
        for name, (decode, prefill) in medians.items()
    }


def theirs(
    python: str, model: Path, name: str, tokens: list[list[int]], work: Path
) -> dict[str, Any]:
    """Let llm-compressor do the same; return how long the whole command took, and its heart."""
    out, rows, recipe = work / "theirs", work / "rows.json", work / "recipe.json"
    rows.write_text(json.dumps(tokens))
    recipe.write_text(json.dumps(PEERS[name]))
    script = Path(__file__).with_name("peer_llmcompressor.py")
    start = time.monotonic()
    try:
        done = subprocess.run(
            [python, "-E", script, model, out, rows, recipe],
            capture_output=True,
            text=True,
            check=False,
            timeout=PEER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {PEER_SECONDS} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    heart = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return {"seconds": round(time.monotonic() - start, 1), "oneshot_seconds": heart}


def methods(
    model: Path, work: Path, facts: dict[str, Any], only: list[str] | None, peer: str | None
) -> None:
    """Run the built-in recipes, and the peer's; keep a line for each as soon as it is known."""
    text = work / "rag.txt"
    text.write_text(texts("rag"))
    cpu = torch.device("cpu")
    tokenizer = Voice(model, device=cpu, dtype="auto", rows=1, reporter=Silent()).tokenizer
    ids = tokenizer(texts("summarization"))["input_ids"]
    rows = pack_rows([ids], 512, 24 * 512).tolist()
    calibration = pack_rows([tokenizer(text.read_text())["input_ids"]], 512, 28000).tolist()
    lines = known_lines() if only is not None else {}
    lines["original"] = lines.get("original", {}) | judge(model, rows)
    for name, assign in RECIPES.items():
        if only is not None and name not in only:
            continue
        recipe = name.partition(",")[0]
        words: list[object] = [part for pair in assign for part in ("-s", pair)]
        if recipe in NEEDS_TEXT:
            words += ["-s", f"data.calibration={text}", "-s", "data.tokens=28000"]
        if recipe == "moefy":
            words += ["-s", "steps.0.max_loss=100"]
        out = place_of(work, name)
        start = time.monotonic()
        bmkit(
            *("compress", recipe, "-m", model, "-o", out, "-s", "measure_speed=false"),
            *(*words, "--force"),
        )
        seconds = round(time.monotonic() - start, 1)
        lines[name] = {"commit": facts["commit"], "seconds": seconds}
        lines[name] |= judged(out, rows, lines["original"])
        said = [line_of(lines[name])]
        if peer and name in PEERS:
            other = theirs(peer, model, name, calibration, work)
            if "failed" not in other:
                other |= judged(work / "theirs", rows, lines["original"])
            lines[name]["llm-compressor"] = other
            said.append(other.get("failed") or line_of(other))
        print(f"{name:22}", "   theirs".join(said), flush=True)
        machine.save(RESULT, {**facts, "methods": lines}, say=False)
    if only is None:
        timed(model, work, facts)


def timed(model: Path, work: Path, facts: dict[str, Any]) -> None:
    """Time all that `methods` has left in `work`, in turns; keep it beside what is known."""
    lines = known_lines()
    paths = {"original": model}
    paths |= {name: path for name in lines if (path := place_of(work, name)).is_dir()}
    for name, found in speeds(paths, rounds=3).items():
        lines[name] |= found
    machine.save(RESULT, {**facts, "methods": lines})


def known_lines() -> dict[str, Any]:
    """Return the lines of earlier runs."""
    file = machine.ROOT / "scripts" / "bench" / "results" / f"{RESULT}.json"
    found: dict[str, Any] = json.loads(file.read_text())["methods"] if file.is_file() else {}
    return found


def place_of(work: Path, name: str) -> Path:
    """Return where the result of a line lies."""
    return work / name.replace(",", "").replace(" ", "-").replace(":", "")


def sst2(split: str, count: int) -> Iterator[dict[str, str]]:
    """Yield reviews and what they are, both kinds in turns."""
    kinds = {"0": "negative", "1": "positive"}
    with (DATA / "sst2" / f"{split}.tsv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    for label, word in kinds.items():
        for row in [r for r in rows if r[-1] == label][: count // 2]:
            yield {"prompt": f"Is this review positive or negative? {row[0]}", "completion": word}


def snips(split: str, count: int) -> Iterator[dict[str, str]]:
    """Yield requests and what they ask for, seven kinds."""
    files = sorted((DATA / "snips").glob(f"{split}_*.json"))
    names = [f.stem.partition("_")[2] for f in files]
    for file, name in zip(files, names, strict=True):
        found = json.loads(file.read_text(encoding="utf-8", errors="replace"))[name]
        for row in found[: count // len(files)]:
            said = "".join(part["text"] for part in row["data"])
            yield {"prompt": f"What is asked for? {said}", "completion": name}


def choices(count: int) -> dict[str, list[tuple[str, list[str], int]]]:
    """Return questions with what may follow, and which of it is right: no tuning is needed.

    Reviews are good or bad; a worked solution of GSM8K has one of four numbers behind it, the
    others being those of other questions.
    """
    words = [" negative", " positive"]
    reviews = [
        (row["prompt"] + "\nAnswer:", words, words.index(f" {row['completion']}"))
        for row in sst2("dev", count)
    ]
    rows = [json.loads(x) for x in (DATA / "gsm8k" / "test.jsonl").open(encoding="utf-8")]
    finals = [row["answer"].rpartition("#### ")[2] for row in rows]
    sums = []
    for i, row in enumerate(rows[:count]):
        worked = re.sub("<<.*?>>", "", row["answer"].rpartition("####")[0])
        others = list(dict.fromkeys(f" {n}" for n in finals[i + 1 :] if n != finals[i]))[:3]
        said = [f" {finals[i]}", *others]
        at = i % len(said)  # where the right one stands doesn't matter; it is no constant though
        said[0], said[at] = said[at], said[0]
        sums.append((f"Question: {row['question']}\nAnswer: {worked}So the answer is", said, at))
    return {"sst2": reviews, "gsm8k": sums}


def chosen(path: Path, tasks: dict[str, list[tuple[str, list[str], int]]]) -> dict[str, float]:
    """Return the share of questions where the right continuation is the most likely, by task."""
    cpu = torch.device("cpu")
    voice = Voice(path, device=cpu, dtype="auto", rows=1, reporter=Silent())
    found = {}
    for task, rows in tasks.items():
        right = 0
        for text, said, at in rows:
            start = voice.tokenizer(text)["input_ids"]
            scores = []
            for one in said:
                ids = start + voice.tokenizer(one, add_special_tokens=False)["input_ids"]
                logits = torch.cat(list(voice.logits(ids[:-1], len(start) - 1))).float()
                wanted = torch.tensor(ids[len(start) :])[:, None]
                scores.append(float(logits.log_softmax(-1).gather(-1, wanted).sum()))
            right += scores.index(max(scores)) == at
        found[task] = round(right / len(rows), 4)
    return found


HEALED: dict[str, list[dict[str, Any]]] = {
    "2:4, distilled": [
        {"method": "sparsegpt", "pattern": "2:4"},
        {"method": "distill", "likeliest": 64, "train": {"num_train_epochs": 2}},
    ],
    "70 % of the blocks' weights, distilled": [
        {"method": "shrink", "parameters": 0.7, "units": ["ffn"]},
        {"method": "distill", "likeliest": 64, "train": {"num_train_epochs": 2}},
    ],
    "int4 trained for": [
        {"method": "distill", "qat": True, "likeliest": 64, "train": {"num_train_epochs": 1}},
        {"method": "quantize", "bits": 4, "group_size": 32},
    ],
    "75 % of the neurons a token, distilled": [
        {"method": "moefy", "size": 16, "shared": 0.125, "active": 0.75, "max_loss": 100.0},
        {"method": "distill", "likeliest": 64, "train": {"num_train_epochs": 1}},
    ],
}


def healed(model: Path, work: Path, count: int) -> dict[str, Any]:
    """Compress and train; return perplexity and choices of each before and behind its training."""
    text = work / "rag.txt"
    text.write_text(texts("rag"))
    cpu = torch.device("cpu")
    tokenizer = Voice(model, device=cpu, dtype="auto", rows=1, reporter=Silent()).tokenizer
    ids = tokenizer(texts("summarization"))["input_ids"]
    rows, tasks = pack_rows([ids], 512, 24 * 512).tolist(), choices(count)
    lines: dict[str, Any] = {"original": judge(model, rows) | chosen(model, tasks)}
    for number, (name, steps) in enumerate(HEALED.items()):
        for step in steps:
            if "train" in step:
                step["train"] |= {"learning_rate": 1e-4, "lr_scheduler_type": "cosine"}
                step["train"] |= {"per_device_train_batch_size": 4}
        data = {"calibration": str(text), "tokens": 28000, "sequence_length": 256}
        recipe = {"kind": "compress", "data": data, "measure_speed": False, "steps": steps}
        file, out = work / f"healed-{number}.json", work / f"healed-{number}"
        file.with_suffix(".yaml").write_text(json.dumps(recipe))
        start = time.monotonic()
        bmkit("compress", file.with_suffix(".yaml"), "-m", model, "-o", out, "--force")
        seconds = round(time.monotonic() - start, 1)
        lines[name] = {"seconds": seconds, **judged(out, rows, lines["original"])}
        lines[name] |= chosen(out, tasks) | {"table": table_of(out)}
        print(f"{name:40}{line_of(lines[name])}", flush=True)
    return lines


def table_of(path: Path) -> list[dict[str, Any]]:
    """Return what `compress` measured behind each step."""
    found: list[dict[str, Any]] = json.loads((path / "bmkit.json").read_text())["table"]
    return found


def tuned(model: Path, name: str, work: Path, rows: int) -> dict[str, float]:
    """Tune an adapter on the frozen model for each task; return the share that it gets right."""
    found = {}
    for task, make, splits in (
        ("sst2", sst2, ("train", "dev")),
        ("snips", snips, ("train", "validate")),
    ):
        train, test = work / f"{task}-train.jsonl", work / f"{task}-test.jsonl"
        train.write_text("".join(json.dumps(r) + "\n" for r in make(splits[0], rows)))
        wanted = list(make(splits[1], 210))
        test.write_text("".join(json.dumps({"prompt": r["prompt"]}) + "\n" for r in wanted))
        out = work / f"{name}-{task}"
        bmkit(
            *("tune", "lora", "-m", model, "--data", train, "-o", out, "--force"),
            *("-s", "train.per_device_train_batch_size=8", "-s", "train.learning_rate=2e-3"),
            *("-s", "train.num_train_epochs=2", "-s", "data.dev=null"),
        )
        done = subprocess.run(
            ["bmkit", "infer", "-m", out, "-i", test, "--json", "--max-new-tokens", "8"],
            capture_output=True,
            text=True,
            check=True,
        )
        said = [json.loads(line)["text"] for line in done.stdout.splitlines()]
        right = [s.strip() == r["completion"] for s, r in zip(said, wanted, strict=True)]
        found[task] = round(sum(right) / len(right), 4)
        print(f"{name} {task}: {found[task]:.3f}", flush=True)
    return found


COOKED = {
    "cook": ("cook", 2 * 8),  # by BMCook's accounting 2:4 counts as 2, 4 of 32 bits as 8
    "int4": ("gptq", 8),
}


def cooked(model: Path, work: Path, facts: dict[str, Any], rows: int, count: int) -> None:
    """Run combined recipes; compare the model and what comes out, tuned on tasks and untuned."""
    text = work / "rag.txt"
    text.write_text(texts("rag"))
    paths, found = {"original": model}, dict[str, Any]()
    for name, (recipe, factor) in COOKED.items():
        paths[name] = work / f"cooked-{name}"
        start = time.monotonic()
        more = () if recipe == "cook" else ("-s", "steps.0.embeddings=8")
        bmkit(
            *("compress", recipe, "-m", model, "-o", paths[name], *more, "--force"),
            *("-s", f"data.calibration={text}", "-s", "data.tokens=28000"),
        )
        table = table_of(paths[name])
        found[name] = {
            "seconds": round(time.monotonic() - start, 1),
            "table": table,
            "bytes_ratio": round(table[0]["bytes"] / table[-1]["bytes"], 3),
            "bytes_ratio_to_float32": round(4 * table[0]["parameters"] / table[-1]["bytes"], 3),
            "bmcook_accounting": factor,
        }
        print(f"{name}: {found[name]}", flush=True)
    times, tasks = speeds(paths, rounds=5), choices(count)
    print(times, flush=True)
    for name, path in paths.items():
        scores = tuned(path, name, work, rows)
        line = found.setdefault(name, {})
        line |= {"speed": times[name], "tuned": scores, "untuned": chosen(path, tasks)}
        line["tuned_mean"] = round(sum(scores.values()) / len(scores), 4)
        line["tuned_kept"] = round(line["tuned_mean"] / found["original"]["tuned_mean"], 4)
        machine.save("compress_cook", {**facts, "recipes": found}, say=False)


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cook", action="store_true")
    parser.add_argument("--healed", action="store_true")
    parser.add_argument("--only", nargs="*", help="lines to make anew; the others stay")
    parser.add_argument("--speeds", action="store_true", help="time what lies in --work")
    parser.add_argument("--peer", help="the python of an environment that has llm-compressor")
    parser.add_argument("--rows", type=int, default=700)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    facts = machine.facts()
    model = Path(bmkit("pull", "smollm2-135m")["path"])
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        if given.speeds:
            timed(model, work, facts)
        elif given.healed:
            found = healed(model, work, given.questions)
            machine.save("compress_healed", {**facts, "methods": found})
        elif given.cook:
            cooked(model, work, facts, given.rows, given.questions)
        else:
            methods(model, work, facts, given.only, given.peer)


if __name__ == "__main__":
    main()
