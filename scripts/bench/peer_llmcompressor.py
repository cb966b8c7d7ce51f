"""Compress with llm-compressor: the other side of compress.py, run by an environment of its own.

llm-compressor wants another transformers than bmkit, so it gets a virtual environment
(`python -m venv PEER; PEER/bin/pip install torch==2.13.0 llmcompressor`), and nothing here may
import bmkit. Its defaults, but for what has to be equal: tokens, groups, zero-points, and float32
arithmetic, which is its fastest on a CPU.

PEER/bin/python peer_llmcompressor.py MODEL OUT ROWS.json RECIPE.json    prints JSON: seconds
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def groups(bits: int, size: int | None, *, symmetric: bool) -> dict[str, Any]:
    """Return config groups: all linears rounded to groups of `size` weights, or to rows."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def modifiers(recipe: dict[str, Any]) -> list[Any]:
    """Return what llm-compressor is to do."""
    kind = recipe["kind"]
    common: dict[str, Any] = {"ignore": ["lm_head"]}
    if kind in {"sparsegpt", "wanda"}:
        # Its `ignore` doesn't keep it from a head that is tied to the embedding: name the others.
        made = SparseGPTModifier if kind == "sparsegpt" else WandaPruningModifier
        pattern = recipe.get("pattern", "0:0")
        return [made(sparsity=0.5, mask_structure=pattern, targets=[r"re:.*_proj$"], **common)]
    if kind in {"w8a8", "smoothquant"}:
        round_all = QuantizationModifier(targets=["Linear"], scheme="W8A8", **common)
        smooth = [SmoothQuantModifier(smoothing_strength=0.5)] if kind == "smoothquant" else []
        return [*smooth, round_all]
    wanted = groups(recipe["bits"], recipe.get("group_size"), symmetric=recipe["symmetric"])
    if kind == "gptq":
        return [GPTQModifier(config_groups=wanted, **common)]
    scaled = [AWQModifier()] if kind == "awq" else []
    return [*scaled, QuantizationModifier(config_groups=wanted, **common)]


def main() -> None:
    """Compress and save in bfloat16."""
    source, out, rows_path, recipe_path = sys.argv[1:]
    with open(rows_path) as rows_file, open(recipe_path) as recipe_file:
        rows, recipe = json.load(rows_file), json.load(recipe_file)
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
    start = time.monotonic()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=modifiers(recipe),
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    seconds = time.monotonic() - start
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(json.dumps({"seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
