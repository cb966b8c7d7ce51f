"""int8 and int4 against the checkpoint they were made of: bytes on disk, and perplexity.

python scripts/bench/int8.py --text FILE     (plain text, or JSON lines with `turns` or `text`)
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import machine
import torch
from safetensors import safe_open

from bmkit import model as models

WINDOW = 512


def text_of(path: Path, category: str | None) -> str:
    """Return the fixed text: the whole file, or the chosen rows of a JSON lines file."""
    if path.suffix != ".jsonl":
        return path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chosen = [r for r in rows if category is None or r.get("category") == category]
    return "\n\n".join(r["turns"][0] if "turns" in r else r["text"] for r in chosen)


@torch.inference_mode()
def perplexity(path: Path, ids: torch.Tensor) -> float:
    """Return exp of the mean next-token loss over windows of 512 tokens, in float32."""
    model = models.load_model(path, device=torch.device("cpu"), dtype="float32")
    total = count = 0.0
    for window in ids.split(WINDOW):
        if len(window) < 2:
            continue
        logits = model(window[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    return math.exp(total / count)


def linear_bytes(path: Path) -> tuple[int, int]:
    """Return the bytes of quantised layers as stored, and what they were in float32."""
    stored = dense = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - not a dict
                tensor = stream.get_tensor(name)
                if ".weight_" in name:
                    stored += tensor.numel() * tensor.element_size()
                if name.endswith("weight_shape"):
                    dense += 4 * math.prod(tensor.tolist())
    return stored, dense


def main() -> None:
    """Compress, measure, write results/int8.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--category", default=None)
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    torch.set_num_threads(2)
    facts = machine.facts()

    def bmkit(*words: str) -> Path:
        command = [sys.executable, "-m", "bmkit_cli", *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return Path(done.stdout.strip())

    base = bmkit("pull", "smollm2-135m")
    tokenizer = models.load_tokenizer(base)
    ids = torch.tensor(tokenizer(text_of(given.text, given.category))["input_ids"][: given.tokens])
    reference = perplexity(base, ids)
    results = {}
    for recipe in ("int8", "int4"):
        path = bmkit("compress", recipe, "-m", str(base))
        stored, dense = linear_bytes(path)
        found = perplexity(path, ids)
        results[recipe] = {
            "linear_bytes": stored,
            "linear_bytes_fp32": dense,
            "linear_ratio": round(stored / dense, 5),
            "file_bytes": sum(f.stat().st_size for f in path.glob("*.safetensors")),
            "perplexity": round(found, 4),
            "perplexity_ratio": round(found / reference, 5),
        }
    machine.save(
        "int8",
        {
            **facts,
            "text": {"file": given.text.name, "category": given.category, "tokens": len(ids)},
            "window": WINDOW,
            "fp32": {
                "perplexity": round(reference, 4),
                "file_bytes_stored_bf16": sum(f.stat().st_size for f in base.glob("*.safetensors")),
            },
            **results,
        },
    )


if __name__ == "__main__":
    main()
