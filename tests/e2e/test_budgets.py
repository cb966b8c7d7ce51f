"""A budget is kept, whatever the model: what the smallest one that is named comes to."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
MIB = 2**20


def llama(**more: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 400}
    return LlamaConfig(**{**sizes, "max_position_embeddings": 4096, "eos_token_id": 2, **more})


def gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(vocab_size=40_000, n_embd=256, n_layer=3, n_head=4, n_positions=4096)


def gemma3() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=60_000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=64,
        eos_token_id=2,
    )


def bloom() -> Any:
    from transformers import BloomConfig

    return BloomConfig(vocab_size=400, hidden_size=256, n_layer=3, n_head=16)


def t5() -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=400,
        d_model=128,
        d_kv=16,
        d_ff=256,
        num_layers=3,
        num_heads=16,
        decoder_start_token_id=0,
    )


def deepseek() -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=400,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=64,
        qk_rope_head_dim=16,
        v_head_dim=64,
        first_k_dense_replace=1,
        eos_token_id=2,
    )


CASES: dict[str, tuple[Callable[[], Any], list[str], list[int]]] = {
    "a large vocabulary, fused": (lambda: llama(vocab_size=60_000), [], [20]),
    "a large vocabulary, int8, fused": (
        lambda: llama(vocab_size=120_000),
        ["--quant", "int8"],
        [20],
    ),
    "a large vocabulary, scored": (lambda: llama(vocab_size=120_000), ["--score"], [300]),
    "rows of many lengths": (
        lambda: llama(hidden_size=1024, num_attention_heads=16, intermediate_size=2816),
        [],
        list(range(1, 60, 2)),
    ),
    "a large vocabulary, placed": (gpt2, [], [20]),
    "a large vocabulary, int8, placed": (gpt2, ["--quant", "int8"], [20]),
    "a large vocabulary, int4, placed": (gemma3, ["--quant", "int4"], [20]),
    "scores of every head": (bloom, [], [2000]),
    "an encoder's scores": (t5, [], [1500]),
    "keys of two parts": (deepseek, [], [2000]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_smallest_budget_that_is_named_is_kept(
    fresh: Run, tiny: Path, tmp_path: Path, rows: Callable[..., Path], name: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    make, words, lengths = CASES[name]
    torch.manual_seed(0)
    config = make()
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    path = tmp_path / "model"
    shutil.copytree(tiny, path)
    (path / "model.safetensors").unlink()
    kind.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    file = rows("rows.jsonl", *({"prompt": "x" * n} for n in lengths))
    asks = ("infer", "-m", "model", "-i", file, "--json", "--raw", *words)
    asks += () if "--score" in words else ("--max-new-tokens", "8")
    least = fresh(*asks, "--cpu-memory", "1MiB")
    assert least.returncode == 4, least.stderr
    found = re.search(r"smallest that works is --cpu-memory (\d+)MiB", least.stderr)
    assert found, least.stderr
    size = f"{found[1]}MiB"
    kept = fresh(*asks, "--cpu-memory", size, "--report", "r.json")
    assert kept.returncode == 0, kept.stderr
    assert len(kept.stdout.splitlines()) == len(lengths)
    report = json.loads((tmp_path / "r.json").read_text())
    took = report["peak_rss_bytes"] - report["rss_before_bytes"]
    assert took <= report["budget_bytes"]["cpu"], (took / MIB, size)
    assert took > 2 * MIB


def test_adapters_count(fresh: Run, tmp_path: Path, tiny: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = llama(hidden_size=1024, num_attention_heads=16, intermediate_size=2048)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "model"
    )
    words = []
    for i in range(4):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        delta = get_peft_model(base, lora)
        delta.to(torch.bfloat16).save_pretrained(tmp_path / f"d{i}")
        words += ["--adapter", f"d{i}"]
    asks = ("infer", "-m", "model", "-p", "Hi", "--json", "--max-new-tokens", "4", *words)
    least = fresh(*asks, "--cpu-memory", "1MiB")
    found = re.search(r"--cpu-memory (\d+)MiB", least.stderr)
    assert least.returncode == 4 and found, least.stderr
    kept = fresh(*asks, "--cpu-memory", f"{found[1]}MiB", "--report", "r.json")
    assert kept.returncode == 0, kept.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    took = report["peak_rss_bytes"] - report["rss_before_bytes"]
    assert took <= report["budget_bytes"]["cpu"], (took / MIB, found[1])


@pytest.mark.parametrize("quant", ["int8", "int4", "null"])
def test_a_draft_counts_as_it_is_kept(fresh: Run, tmp_path: Path, tiny: Path, quant: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = llama(hidden_size=1024, num_attention_heads=16, intermediate_size=8192)
    config.num_hidden_layers = 6
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "model"
    )
    weights = (tmp_path / "model" / "model.safetensors").stat().st_size
    asks = ("spec-decode", "-m", "model", "-p", "Hi", "--json", "--max-new-tokens", "12")
    asks = (*asks, "-s", "adaptive=false")
    alone = fresh(*asks, "--cpu-memory", "1MiB")
    asks = (*asks, "-d", "self", "-s", f"draft_quant={quant}")
    least = fresh(*asks, "--cpu-memory", "1MiB")
    needed = []
    for refused in (alone, least):
        found = re.search(r"--cpu-memory (\d+)MiB", refused.stderr)
        assert refused.returncode == 4 and found, refused.stderr
        needed.append(int(found[1]) * MIB)
    share = {"int8": 0.6, "int4": 0.4, "null": 1.1}[quant]  # of bfloat16, with scales
    assert needed[1] - needed[0] < share * weights + 96 * MIB  # what reading a prompt works in
    kept = fresh(*asks, "--cpu-memory", f"{needed[1] // MIB}MiB", "--report", "r.json")
    assert kept.returncode == 0, kept.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["draft_forwards"] > 0
    took = report["peak_rss_bytes"] - report["rss_before_bytes"]
    assert took <= needed[1], (took / MIB, needed[1] / MIB)
