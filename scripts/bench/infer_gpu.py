"""A model of 7B's shape in a few GiB of GPU memory: bmkit's streaming against accelerate's offload.

python scripts/bench/infer_gpu.py [--shape 7b] [--budgets 6GiB,3GiB] [--quant int4] [--rounds 3]
python scripts/bench/infer_gpu.py --device cpu --shape tiny       # does this script work?

Checkpoints are random, Llama-shaped, in bfloat16, in a RAM disk if it is large enough (or --model:
one that is there). Each engine answers in a process of its own, in turns, bmkit through the path of
`bmkit infer`: under a budget 8 tokens of prompt and 16 of answer, resident (SmolLM2-135M's shape)
32 and 96. Seconds are those of the answers, loading and a first answer left out.

The link is what copying one block from pinned RAM reaches, between the engines' turns; the device's
own bandwidth is that of copies, bytes read and written. GPU memory is watched from the parent: what
the whole device holds more than before an engine was started, while the others are idle, so nothing
else may run there; nvidia-smi's figure for the process stands beside it where it has one.

With --quant, bmkit rounds while it loads, and accelerate runs bfloat16. On the CPU, RAM (libraries
included) takes the GPU's place and the link is a plain copy: its figures mean nothing, those of
infer_budget.py do. No round begins after --seconds, so that a time limit finds results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import machine

SHAPES = {  # vocabulary, hidden, inner, layers, heads, heads of keys and values, tied
    "tiny": (4096, 512, 1376, 16, 8, 4, False),
    "smollm2": (49152, 576, 1536, 30, 9, 3, True),
    "1b": (32000, 2048, 5632, 22, 32, 4, False),
    "7b": (32000, 4096, 11008, 32, 32, 32, False),
}
BUDGETS = {
    "cuda": {"tiny": "760MiB", "1b": "2GiB,1200MiB", "7b": "6GiB,3GiB"},
    "cpu": {"tiny": "200MiB", "1b": "1GiB", "7b": "3GiB"},
}
UNDER_BUDGET = {"prompt": 8, "tokens": 16}
RESIDENT = {"prompt": 32, "tokens": 96}
CPU_THREADS = 2
Answer = Callable[[], tuple[int, int]]
"""Answers once; returns the tokens, and the bytes of weights that were brought for them."""


def make(folder: Path, shape: str) -> None:
    """Write a checkpoint tensor by tensor; those of one shape hold the same values, rotated."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from bmkit.model import ShardWriter

    vocabulary, hidden, inner, layers, heads, kv, tied = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,  # no answer ends early
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    torch.manual_seed(0)
    drawn: dict[torch.Size, torch.Tensor] = {}
    writer = ShardWriter(folder)
    for i, (name, size) in enumerate(shapes.items()):
        if size not in drawn:
            new = torch.empty(size, dtype=torch.bfloat16)
            drawn[size] = new.normal_(0, 0.02) if len(size) > 1 else new.fill_(1)
        writer.add(name, drawn[size].roll(977 * i))
    writer.close()


def prompt(words: dict[str, Any]) -> str:
    return " ".join(str(i) for i in range(words["prompt"]))


def bmkit(words: dict[str, Any]) -> Answer:
    from bmkit.artifact import Artifact
    from bmkit.data.rows import Row
    from bmkit.infer.recipe import InferRecipe
    from bmkit.infer.run import Session
    from bmkit.plan import Job, read_headers
    from bmkit.report import Silent
    from bmkit.runtime.answered import Answered
    from bmkit.runtime.choose import choose

    path, text = Path(words["path"]), prompt(words)
    more = {"quant": words.get("quant"), "cache": words.get("cache", "auto")}
    how = {"device": words["device"], "max_new_tokens": words["tokens"], "raw": True, **more}
    on_cpu, budget = words["device"] == "cpu", words.get("budget")
    job = Job(
        InferRecipe.model_validate({"kind": "infer", **how}),
        Artifact(path, "model", ""),
        base=None,
        files={},
        out=path,  # nothing is written
        work=path,
        reporter=Silent(),
        threads=CPU_THREADS if on_cpu else None,
        rows=1,
        longest=text,
        cpu_memory=budget if on_cpu else None,
        gpu_memory=None if on_cpu else budget,
    )
    session = Session(job)
    placement = choose(job, read_headers(path)).placement
    tiers = getattr(session.engine.placed, "tiers", None)

    def answer() -> tuple[int, int]:
        copied = getattr(tiers, "copied_bytes", 0)
        (found,) = session.answer([Row(1, {"prompt": text})])
        assert isinstance(found, Answered), found
        tokens = len(found.answer.token_ids)
        if tiers is None:  # the fused decoder, on the CPU
            return tokens, tokens * (placement.streamed_bytes if placement else 0)
        return tokens, getattr(tiers, "copied_bytes", 0) - copied

    return answer


def transformers(words: dict[str, Any]) -> Answer:
    """transformers' `generate`, not compiled; under a budget with accelerate's offload."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bmkit import env
    from bmkit.runtime.budget import GPU_BYTES

    path, device, budget = words["path"], torch.device(words["device"]), words.get("budget")
    options: dict[str, Any] = {"device_map": {"": device}}
    if budget:  # it bounds weights only: CUDA's own part is taken off, as bmkit does
        gpu = {device.index or 0: budget - GPU_BYTES, "cpu": env.available_ram_bytes()}
        most = {"cpu": budget // 3} if device.type == "cpu" else gpu
        options = {"device_map": "auto", "max_memory": most, "offload_folder": words["scratch"]}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options).eval()
    given = AutoTokenizer.from_pretrained(path)(prompt(words), return_tensors="pt")
    given = {key: given[key].to(device) for key in ("input_ids", "attention_mask")}
    count = {"max_new_tokens": words["tokens"], "min_new_tokens": words["tokens"]}

    def answer() -> tuple[int, int]:
        with torch.inference_mode():
            out = model.generate(**given, **count, do_sample=False)
        return len(out[0].tolist()) - given["input_ids"].shape[1], 0

    return answer


def worker(words: dict[str, Any]) -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    answer = {"bmkit": bmkit, "transformers": transformers}[words["engine"]](words)
    answer()  # whatever is made on first use
    print(json.dumps("ready"), file=out, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        tokens, brought = answer()
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, tokens, brought]), file=out, flush=True)


class Engine:
    """A worker, and the most memory that it was seen with; one that ends says why, once."""

    def __init__(self, device: str, words: dict[str, Any]) -> None:
        self.device = device
        self.answers: list[tuple[float, int, int]] = []
        self.error: str | None = None
        self.held = self.peak = self.smi = 0
        self.process: subprocess.Popen[str] | None = None
        self.scratch = tempfile.TemporaryDirectory()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        words = {**words, "device": device, "scratch": self.scratch.name}
        threads = {"OMP_NUM_THREADS": str(CPU_THREADS), "GOMP_SPINCOUNT": "3000"}
        with self._watched():
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker", json.dumps(words)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
                env={**os.environ, **(threads if device == "cpu" else {})},
            )
            self._read()

    def ask(self) -> None:
        """Let it answer once."""
        if self.error is None:
            with self._watched():
                assert self.process is not None
                assert self.process.stdin is not None
                with suppress(BrokenPipeError):  # `_read` finds out
                    self.process.stdin.write("go\n")
                    self.process.stdin.flush()
                if found := self._read():
                    self.answers.append(found)

    def _read(self) -> Any:
        assert self.process is not None
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.log.seek(0)
        said = self.log.read().strip().splitlines() or ["nothing was said"]
        self.error = f"exit code {self.process.wait()}: {said[-1]}"
        return None

    @contextmanager
    def _watched(self) -> Iterator[None]:
        before = self._used()
        seen = [before]
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.01):
                seen.append(self._used())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            after = self._used()
            self.peak = max(self.peak, self.held + max(*seen, after) - before)
            self.held += after - before
            self.smi = max(self.smi, smi_bytes(self.process.pid) if self.process else 0)

    def _used(self) -> int:
        if self.device != "cpu":
            import torch

            free, total = torch.cuda.mem_get_info(self.device)
            return int(total - free)
        import psutil

        try:
            return int(psutil.Process(self.process.pid).memory_info().rss) if self.process else 0
        except psutil.Error:  # it has ended
            return 0

    def end(self) -> dict[str, Any]:
        """Stop it, and return its figures."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.scratch.cleanup()
        found: dict[str, Any] = {} if self.error is None else {"error": self.error}
        if self.answers:
            rate = statistics.median(t / s for s, t, _ in self.answers)
            found["tokens_per_second"] = round(rate, 3)
            found["rounds"] = len(self.answers)
            brought = statistics.median(b / t for _, t, b in self.answers)
            found["brought_bytes_a_token"] = round(brought)
        return {**found, "peak_bytes": self.peak, "nvidia_smi_bytes": self.smi or None}

    def times(self, other: Engine) -> float | None:
        """Return how many times as fast as `other` it was, the median over the rounds."""
        pairs = zip(self.answers, other.answers, strict=False)
        found = [(a[1] / a[0]) / (b[1] / b[0]) for a, b in pairs]
        return round(statistics.median(found), 2) if found else None


def smi(*query: str) -> list[list[str]]:
    """Return what nvidia-smi answers, by lines and columns; nothing where there is none."""
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[x.strip() for x in line.split(",")] for line in done.stdout.splitlines() if line]


def smi_bytes(pid: int) -> int:
    rows = smi("--query-compute-apps=pid,used_memory")
    return 2**20 * sum(int(r[1]) for r in rows if r[0] == str(pid) and r[1].isdigit())


def bandwidth(device: str, size: int, *, pinned: bool) -> float:
    """Return bytes a second of copying `size` bytes: from pinned RAM, or on the device itself."""
    import torch

    times = 8
    target = torch.empty(size, dtype=torch.uint8, device=device)
    source = torch.ones(size, dtype=torch.uint8, device="cpu" if pinned else device)
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(times):
            target.copy_(source)
        return times * size / (time.perf_counter() - start)
    source = source.pin_memory() if pinned else source
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        target.copy_(source)
        begin.record()
        for _ in range(times):
            target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        seconds = float(begin.elapsed_time(end)) / 1000
        del target, source
        torch.cuda.empty_cache()
    return times * size / seconds


def measure(
    device: str,
    words: dict[str, dict[str, Any]],
    rounds: int,
    until: float,
    between: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Engine], dict[str, dict[str, Any]]]:
    """Let engines answer in turns, a new round beginning before `until`; return their figures."""
    engines = {name: Engine(device, more) for name, more in words.items()}
    for number in range(rounds):
        if number == 0 or time.monotonic() < until:
            between()
            for engine in engines.values():
                engine.ask()
    found = {name: engine.end() for name, engine in engines.items()}
    print(json.dumps(found), file=sys.stderr, flush=True)
    return engines, found


def resident(device: str, path: Path, rounds: int, until: float) -> dict[str, Any]:
    """Measure a model that is on the device as a whole."""
    from bmkit.plan import read_headers

    given = {"path": str(path), **RESIDENT}
    words = {
        "transformers": {"engine": "transformers", **given},
        "bmkit": {"engine": "bmkit", **given},
        "bmkit, cache=static": {"engine": "bmkit", "cache": "static", **given},
    }
    if device == "cpu":
        del words["bmkit, cache=static"]
    engines, found = measure(device, words, rounds, until)
    headers = read_headers(path)
    unread = "" if headers.config["tie_word_embeddings"] else "model.embed_tokens.weight"
    size = sum(t.bytes for t in headers.tensors if t.name != unread)
    speed = max(2 * bandwidth(device, 2**29, pinned=False) for _ in range(3))
    for name, figures in found.items():
        figures["times_transformers"] = engines[name].times(engines["transformers"])
        rate = figures.get("tokens_per_second", 0) * size / speed
        figures["fraction_of_device_bandwidth"] = round(rate, 3)
    copies = round(speed / 1e9, 1)
    return {"bytes_a_token": size, "device_gigabytes_per_second": copies, "engines": found}


def streamed(
    device: str, path: Path, rounds: int, until: float, budget: int, quant: str | None
) -> dict[str, Any]:
    """Measure a model that is larger than its budget."""
    from bmkit.plan import read_headers

    headers = read_headers(path)
    block = headers.bytes // int(headers.config["num_hidden_layers"])
    given = {"path": str(path), "budget": budget, **UNDER_BUDGET}
    words = {
        "bmkit": {"engine": "bmkit", "quant": quant, **given},
        "accelerate": {"engine": "transformers", **given},
    }
    link: list[float] = []
    engines, found = measure(
        device, words, rounds, until, lambda: link.append(bandwidth(device, block, pinned=True))
    )
    ours = found["bmkit"]
    brought = ours.get("brought_bytes_a_token", 0) * ours.get("tokens_per_second", 0)
    return {
        "budget_bytes": budget,
        "link_gigabytes_per_second": round(max(link) / 1e9, 2),
        "fraction_of_link_bandwidth": round(brought / max(link), 3) if brought else None,
        "times_accelerate": engines["bmkit"].times(engines["accelerate"]),
        "peak_within_budget": ours["peak_bytes"] <= budget if device != "cpu" else None,
        "engines": found,
    }


def ram_disk(shape: str) -> str | None:
    """Return one with room for a checkpoint, if memory for the engines is left beside it."""
    from bmkit import env

    vocabulary, hidden, inner, layers, *_ = SHAPES[shape]
    size = 2 * (2 * vocabulary * hidden + layers * (4 * hidden * hidden + 3 * hidden * inner))
    disk = Path("/dev/shm")
    room = disk.is_dir() and env.free_disk_bytes(disk) > 1.2 * size + 2**30
    return str(disk) if room and env.available_ram_bytes() > 4 * size else None


def facts(device: str) -> dict[str, Any]:
    import torch

    try:
        found = machine.facts()
    except (PackageNotFoundError, OSError) as exc:  # a GPU machine that lacks what isn't run here
        found = {"not_known": str(exc), "versions": {"torch": torch.__version__}}
    if device != "cpu":
        free, total = torch.cuda.mem_get_info(device)
        name, driver = torch.cuda.get_device_name(device), smi("--query-gpu=driver_version")
        found["gpu"] = {"name": name, "bytes": total, "free_bytes": free, "driver": driver[:1]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=["tiny", "1b", "7b"], default="7b")
    parser.add_argument("--model", type=Path, help="a checkpoint or artifact, instead of --shape")
    parser.add_argument("--budgets", help="as 6GiB,3GiB")
    parser.add_argument("--quant", choices=["int8", "int4", "w8a8"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--write", action="store_true", help="also on the CPU, or another shape")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    from bmkit import env
    from bmkit.errors import BmkitError
    from bmkit.model import pick_device

    device, shape, begun = options.device, options.shape, time.monotonic()
    try:
        kind = pick_device(device).type
        if kind not in BUDGETS:
            parser.error(f"--device {device}: this is for {' and '.join(BUDGETS)}")
        told = options.budgets or BUDGETS[kind][shape]
        budgets = {text: env.parse_bytes(text) for text in told.split(",")}
    except BmkitError as exc:
        print(f"infer_gpu: {exc}\n{exc.hint or ''}", file=sys.stderr)
        raise SystemExit(exc.exit_code) from None
    result = {**facts(device), "shape": shape, "model": options.model and str(options.model)}

    def until(parts: int) -> float:  # the time that is left, shared by the parts that are left
        now = time.monotonic()
        return now + (begun + float(options.seconds) - now) / parts

    with tempfile.TemporaryDirectory(dir=ram_disk(shape)) as folder:
        small = "tiny" if shape == "tiny" else "smollm2"
        for name in {small} if options.model else {small, shape}:
            (Path(folder) / name).mkdir()
            make(Path(folder) / name, name)
        result["seconds_of_making"] = round(time.monotonic() - begun, 1)
        path, rounds = Path(folder) / small, options.rounds
        found = resident(device, path, rounds, until(len(budgets) + 1))
        result["resident"] = {"shape": small, **found}
        path = options.model or Path(folder) / shape
        result["quant"], result["streamed"] = options.quant, {}
        for i, (text, budget) in enumerate(budgets.items()):
            end = until(len(budgets) - i)
            found = streamed(device, path, rounds, end, budget, options.quant)
            result["streamed"][text] = found
    result["seconds"] = round(time.monotonic() - begun, 1)
    if options.write or (device != "cpu" and shape == "7b" and not options.model):
        machine.save("infer_gpu" + (f"_{options.quant}" if options.quant else ""), result)
    else:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
