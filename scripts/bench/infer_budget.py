"""A checkpoint of 1 GB under a quarter of its size: bmkit's streaming against accelerate's offload.

python scripts/bench/infer_budget.py [--rounds 3]

The checkpoint is random, Llama-shaped, in bfloat16, written to a temporary folder; files are in the
page cache (warm), then, for one pass over all weights, not (cold). Each engine answers in a process
of its own, in turns: 8 tokens of prompt, 16 of answer. Seconds are those of the answers, loading
left out. Memory is watched from outside: the largest resident size while it runs, minus that just
before the model is opened.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

THREADS = 2
PROMPT, ANSWER = 8, 16


def make(folder: Path) -> int:
    """Write the checkpoint, and return its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=46,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def bmkit(path: str, budget: int) -> Any:
    import torch

    torch.set_num_threads(THREADS)
    from bmkit import model as models
    from bmkit import plan
    from bmkit.runtime import budget as budgets
    from bmkit.runtime.cpu import load

    load.warm(THREADS)
    yield
    headers = plan.read_headers(Path(path))
    placement = budgets.place(headers, rows=1, tokens=64, budget=budget)
    decoder = load.load_decoder(Path(path), threads=THREADS, placement=placement)
    assert load.tiny_difference(models.load_config(Path(path))) < load.TOLERANCE
    answer = yield
    while True:
        cache = decoder.cache(1, 64)
        start = time.perf_counter()
        logits = decoder.chain(cache, 0, list(range(PROMPT)))
        for _ in range(answer - 1):
            logits = decoder.step(cache, [int(logits[0].argmax())])
            cache.done[0] += 1
        answer = yield time.perf_counter() - start, placement.streamed_bytes


def accelerate(path: str, budget: int) -> Any:
    import torch

    torch.set_num_threads(THREADS)
    from transformers import AutoModelForCausalLM

    yield
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.bfloat16,
            device_map="auto",
            max_memory={"cpu": budget // 3},  # it keeps this much of weights; copies come on top
            offload_folder=folder,
        )
        answer = yield
        while True:
            ids = torch.arange(PROMPT)[None]
            start = time.perf_counter()
            with torch.inference_mode():
                model.generate(ids, max_new_tokens=answer, min_new_tokens=answer, do_sample=False)
            answer = yield time.perf_counter() - start, 0


def worker(name: str, path: str, budget: int) -> None:
    run = {"bmkit": bmkit, "accelerate": accelerate}[name](path, budget)
    next(run)
    print(json.dumps("before"), flush=True)
    sys.stdin.readline()
    next(run)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(run.send(int(line))), flush=True)


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bandwidth(path: Path, *, cold: bool = False) -> float:
    """Return bytes a second of reading the file into one buffer of 32 MiB."""
    import numpy as np

    buffer = np.empty(2**25, np.uint8)
    best = 0.0
    for _ in range(3 if cold else 4):
        if cold:
            forget(path)
        with path.open("rb", buffering=0) as file:
            start, count = time.perf_counter(), 0
            while got := file.readinto(buffer):
                count += got
        best = max(best, count / (time.perf_counter() - start))
    return best


class Watched:
    """A worker, and the largest resident memory that it was seen with."""

    def __init__(self, name: str, path: Path, budget: int) -> None:
        command = [sys.executable, __file__, "--worker", name, str(path), str(budget)]
        env = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "GOMP_SPINCOUNT": "3000"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        assert json.loads(self.process.stdout.readline()) == "before"  # type: ignore[union-attr]
        self.before = self._kib("VmRSS")
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # the peak begins anew
        assert self.ask() == "ready"

    def ask(self, answer: int = ANSWER) -> Any:
        self.process.stdin.write(f"{answer}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return json.loads(self.process.stdout.readline())  # type: ignore[union-attr]

    def peak(self) -> int:
        return (self._kib("VmHWM") - self.before) * 1024

    def _kib(self, what: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(x for x in status.splitlines() if x.startswith(what)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=3)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker[0], options.worker[1], int(options.worker[2]))
        return
    facts = machine.facts()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        size = make(path)
        budget = size // 4
        bandwidth = read_bandwidth(next(path.glob("*.safetensors")))
        engines = {name: Watched(name, path, budget) for name in ("bmkit", "accelerate")}
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        streamed = 0
        for _ in range(options.rounds):
            for name, engine in engines.items():
                took, read = engine.ask()
                seconds[name].append(took)
                streamed = read or streamed
        cold: dict[str, list[float]] = {name: [] for name in engines}
        file = next(path.glob("*.safetensors"))
        for _ in range(options.rounds):  # one pass over all weights, which are on disk only
            for name, engine in engines.items():
                forget(file)
                cold[name].append(engine.ask(1)[0])
        cold_bandwidth = read_bandwidth(file, cold=True)
        peaks = {name: engine.peak() for name, engine in engines.items()}
        for engine in engines.values():
            engine.process.kill()
    rate = {name: ANSWER / statistics.median(s) for name, s in seconds.items()}
    pairs = zip(seconds["accelerate"], seconds["bmkit"], strict=True)
    machine.save(
        "infer_budget",
        {
            **facts,
            "threads": THREADS,
            "rounds": options.rounds,
            "checkpoint_bytes": size,
            "budget_bytes": budget,
            "peak_bytes": peaks,
            "tokens_per_second": {name: round(r, 2) for name, r in rate.items()},
            "times_accelerate": round(statistics.median(a / b for a, b in pairs), 2),
            "streamed_bytes_a_token": streamed,
            "read_gigabytes_per_second": round(bandwidth / 1e9, 2),
            "fraction_of_read_bandwidth": round(rate["bmkit"] * streamed / bandwidth, 3),
            "cold": {
                "seconds_a_pass": {n: round(statistics.median(s), 3) for n, s in cold.items()},
                "read_gigabytes_per_second": round(cold_bandwidth / 1e9, 2),
                "fraction_of_read_bandwidth": round(
                    streamed / statistics.median(cold["bmkit"]) / cold_bandwidth, 3
                ),
            },
        },
    )


if __name__ == "__main__":
    main()
