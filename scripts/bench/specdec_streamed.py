"""spec-decode of a target that is streamed from disk, beside the same target without guesses.

python scripts/bench/specdec_streamed.py --questions spec-bench/questions.jsonl
    [-m smollm2-135m] [--times 4] [--budget 800MiB] [--tokens 64] [--rows 1]

The target is a real model, each of whose blocks is followed by blocks that add nothing: it says
what the real one says, at the cost of a model `--times` as deep. It guesses for itself, rounded to
int8 and kept in memory (`-d self`). Its file is driven out of the page cache all the while, as that
of a model that is larger than memory would be. Each category's first questions are answered in
turns; seconds are those from the prompt to the last token.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import machine
from specdec import prompts

THREADS = 2
TOO_SMALL = 4
"""The exit code of a budget in which a prompt has no room."""


def deepen(source: Path, folder: Path, times: int) -> int:
    """Write a checkpoint with each block followed by blocks of zero outputs; return its bytes."""
    from safetensors.torch import load_file, save_file

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    shutil.copy(source / "generation_config.json", folder)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] *= times
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    deep: dict[str, Any] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.startswith("model.layers."):
            deep[name] = tensor
            continue
        _, _, number, rest = name.split(".", 3)
        for copy in range(times):
            silent = copy > 0 and rest in {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
            own = tensor.new_zeros(tensor.shape) if silent else tensor.clone()
            deep[f"model.layers.{int(number) * times + copy}.{rest}"] = own
    save_file(deep, folder / "model.safetensors", metadata={"format": "pt"})
    return (folder / "model.safetensors").stat().st_size


class Evicted:
    """A file whose pages are driven out of the page cache, again and again, within `with`."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self.stop.wait(0.05):
            os.posix_fadvise(self.handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> None:
        os.fsync(self.handle)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        os.close(self.handle)


def main() -> None:
    """Measure, and write scripts/bench/results/specdec_streamed.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--code", type=Path)
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--budget", default="800MiB")
    parser.add_argument("--rows", type=int, default=1, help="of a category")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    from bmkit.pull.run import find

    known = find(arguments.model)
    result = {**machine.facts(), "threads": THREADS, "times": arguments.times}
    result |= {"budget": arguments.budget, "tokens": arguments.tokens, "categories": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "deep"
        folder.mkdir()
        source = Path(arguments.model) if known is None else known.path
        result["checkpoint_bytes"] = deepen(source, folder, arguments.times)
        for name, asked in prompts(arguments.questions, arguments.code).items():
            file, report = Path(scratch) / "rows.jsonl", Path(scratch) / "report.json"
            rows = [json.dumps({"prompt": row}) for row in asked[: arguments.rows]]
            file.write_text("\n".join(rows) + "\n", encoding="utf-8")
            command = [
                *(sys.executable, "-m", "bmkit_cli", "spec-decode", "-m", str(folder)),
                *("-d", "self", "-i", str(file), "--cpu-memory", arguments.budget),
                *("--max-new-tokens", str(arguments.tokens), "--threads", str(THREADS)),
                *("--compare", "greedy", "--report", str(report)),
                *("-o", str(Path(scratch) / f"{name}.jsonl")),
            ]
            with Evicted(folder / "model.safetensors"):
                done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
            if done.returncode == TOO_SMALL:
                result["categories"][name] = "its prompt needs a larger budget"
                continue
            done.check_returncode()
            found = json.loads(report.read_text(encoding="utf-8"))
            kept = ("mean_accepted_length", "acceptance", "phases", "chosen", "compare", "cost")
            figures = {key: found[key] for key in (*kept, "draft_cost")}
            figures["peak_bytes"] = found["peak_rss_bytes"] - found["rss_before_bytes"]
            result["categories"][name] = figures
            load = os.getloadavg()[0]
            result["busy"] = result.get("busy", False) or load > THREADS + 0.5
            print(name, figures["mean_accepted_length"], figures["compare"], flush=True)
            machine.save("specdec_streamed", result)
    measured = [f for f in result["categories"].values() if not isinstance(f, str)]
    ratios = [f["compare"]["greedy"]["ratio"] for f in measured]
    result["mean_ratio"] = round(sum(ratios) / len(ratios), 3) if ratios else None
    machine.save("specdec_streamed", result)


if __name__ == "__main__":
    main()
