"""Tokens per second on the CPU: transformers, bmkit, and llama.cpp where it is installed.

python scripts/bench/infer_cpu.py [--gguf SmolLM2-135M-Instruct.Q4_1.gguf] [--rounds 7]

Each engine lives in a process of its own with two threads, loaded once; they take turns, one
measurement each a round, while the others wait. Decode: 32 tokens of prompt, 96 of answer, greedy,
the end token ignored; seconds count from the prompt's tokens to the last token. Prefill: a prompt
of 512 tokens and one token of answer. bmkit runs through the path of `bmkit infer` (its Server,
tokens turned to text); llama.cpp through its C API, with numpy's argmax.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

THREADS = 2
PROMPT, ANSWER, LONG = 32, 96, 512


def hf(path: str, dtype: str) -> Callable[[list[int], int], int]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def run(ids: list[int], count: int) -> int:
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False
            )
        return int(out.shape[1]) - len(ids)

    return run


def bmkit(path: str, quant: str, rows: str = "1") -> Callable[[list[int], int], int]:
    import torch

    torch.set_num_threads(THREADS)
    from bmkit import model as models
    from bmkit.runtime.cpu import load
    from bmkit.runtime.cpu.serve import Server
    from bmkit.runtime.generate import Generation
    from bmkit.runtime.prompts import Prompt

    load.warm(THREADS)
    chosen = None if quant == "stored" else quant
    decoder = load.load_decoder(Path(path), threads=THREADS, quant=chosen)
    tokenizer = models.load_tokenizer(Path(path))

    def run(ids: list[int], count: int) -> int:
        server = Server(decoder, tokenizer, [], Generation(count), rows=int(rows))
        prompts = [Prompt(i, i, "", ids, None) for i in range(int(rows))]
        return sum(len(answer.token_ids) for _, answer in server.answer(prompts))

    run.bytes_a_token = decoder.bytes_a_token  # type: ignore[attr-defined]
    return run


def llama(path: str) -> Callable[[list[int], int], int]:
    import numpy as np
    from llama_cpp import Llama, llama_get_logits_ith

    model = Llama(path, n_ctx=1024, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def run(ids: list[int], count: int) -> int:
        model.reset()
        model.eval(ids)
        made = 0
        while True:
            logits = np.ctypeslib.as_array(
                llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),)
            )
            token = int(logits.argmax())
            made += 1
            if made == count:
                return made
            model.eval([token])

    return run


def requantise(source: Path, target: Path) -> None:
    """Write `source` as Q8_0, with llama.cpp's own quantiser."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    params.allow_requantize = True
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    assert code == 0


def worker(words: list[str]) -> None:
    """Load the engine, then measure whenever a line comes in."""
    run = {"hf": hf, "bmkit": bmkit, "llama": llama}[words[0]](*words[1:])
    base = json.loads(sys.stdin.readline())
    run(base[:8], 2)  # whatever is made on first use
    print(json.dumps({"ready": True, "bytes": getattr(run, "bytes_a_token", None)}), flush=True)
    for line in sys.stdin:
        kind = line.strip()
        ids, count = (base[:PROMPT], ANSWER) if kind == "decode" else (base[:LONG], 1)
        start = time.perf_counter()
        made = run(ids, count)
        seconds = time.perf_counter() - start
        tokens = made if kind == "decode" else LONG * made
        print(json.dumps(tokens / seconds), flush=True)


def copy_bandwidth() -> float:
    """Return bytes a second, read and written, of copying 256 MiB with numpy in two threads."""
    import threading

    import numpy as np

    parts = [(np.ones(2**27, np.uint8), np.empty(2**27, np.uint8)) for _ in range(THREADS)]
    best = 0.0
    for _ in range(5):
        jobs = [threading.Thread(target=np.copyto, args=(b, a)) for a, b in parts]
        start = time.perf_counter()
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        best = max(best, 2 * THREADS * 2**27 / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", nargs="+")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    done = subprocess.run(
        [sys.executable, "-m", "bmkit_cli", "pull", "smollm2-135m"],
        capture_output=True,
        text=True,
        check=True,
    )
    path = done.stdout.strip()
    engines = {
        "transformers generate, fp32": ["hf", path, "float32"],
        "transformers generate, bf16": ["hf", path, "bfloat16"],
        "bmkit, bf16 as stored, fp32 arithmetic": ["bmkit", path, "stored"],
        "bmkit, int8": ["bmkit", path, "int8"],
        "bmkit, int4": ["bmkit", path, "int4"],
        "bmkit, int8, 8 rows at a time": ["bmkit", path, "int8", "8"],
    }
    if options.gguf:
        q8 = Path(path).parent / "bench-q8_0.gguf"
        requantise(options.gguf, q8)
        engines["llama.cpp, Q8_0"] = ["llama", str(q8)]
        engines["llama.cpp, Q4_1"] = ["llama", str(options.gguf)]
    from transformers import AutoTokenizer

    text = Path(__file__).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(path)(text)["input_ids"][:LONG]
    bandwidth = copy_bandwidth()
    facts = machine.facts()
    env = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    running: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, words in engines.items():
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**env, "GOMP_SPINCOUNT": "3000"} if words[0] == "bmkit" else env,  # as the CLI
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(ids) + "\n")
        process.stdin.flush()
        running[name] = process
        said = json.loads(process.stdout.readline())
        found[name] = {"decode": [], "prefill": [], "bytes_a_token": said["bytes"]}
    for _ in range(options.rounds):
        for kind in ("decode", "prefill"):
            for name, process in running.items():
                process.stdin.write(kind + "\n")
                process.stdin.flush()
                found[name][kind].append(json.loads(process.stdout.readline()))
    for process in running.values():
        process.stdin.close()
        process.wait()
    rows = {}
    base = found["transformers generate, fp32"]
    for name, values in found.items():
        row: dict[str, Any] = {}
        for kind in ("decode", "prefill"):
            row[f"{kind}_tokens_per_second"] = round(statistics.median(values[kind]), 1)
            ratios = [a / b for a, b in zip(values[kind], base[kind], strict=True)]
            row[f"{kind}_times_transformers_fp32"] = round(statistics.median(ratios), 2)
        if values["bytes_a_token"] and "rows" not in name:
            read = values["bytes_a_token"] * row["decode_tokens_per_second"]
            row["bytes_a_token"] = values["bytes_a_token"]
            row["read_gigabytes_per_second"] = round(read / 1e9, 1)
        rows[name] = row
    result = {
        **facts,
        "threads": THREADS,
        "rounds": options.rounds,
        "copy_gigabytes_per_second": round(bandwidth / 1e9, 1),
        "engines": rows,
    }
    if options.gguf:
        ours, theirs = found["bmkit, int8"]["decode"], found["llama.cpp, Q8_0"]["decode"]
        q4, theirs4 = found["bmkit, int4"]["decode"], found["llama.cpp, Q4_1"]["decode"]
        result["ratios"] = {
            "int8 / llama.cpp Q8_0": round(
                statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2
            ),
            "int8 / llama.cpp Q4_1": round(
                statistics.median(a / b for a, b in zip(ours, theirs4, strict=True)), 2
            ),
            "int4 / llama.cpp Q4_1": round(
                statistics.median(a / b for a, b in zip(q4, theirs4, strict=True)), 2
            ),
        }
    machine.save("infer_cpu", result)


if __name__ == "__main__":
    main()
