"""`bmkit compress` with `drop_layers`: what is left is a model that transformers loads."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
)

Run = Callable[..., subprocess.CompletedProcess[str]]
SIZES = {"vocab_size": 360, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
GROUPED: dict[str, Any] = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
PLAIN = {k: v for k, v in GROUPED.items() if k not in {"num_key_value_heads", "head_dim"}}
CONFIGS = [
    GPT2Config(**SIZES, n_embd=32, n_layer=4, n_head=2),
    GPTNeoXConfig(**PLAIN),
    Qwen3Config(**GROUPED, max_window_layers=4),
    Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.model_type))
def test_layers_that_stay_are_those_of_the_model(
    config: Any, tiny_checkpoint: Path, bmkit: Run, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    whole.save_pretrained(tmp_path / "whole")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_checkpoint / file, tmp_path / "whole" / file)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("kind: compress\nsteps:\n  - method: drop_layers\n    keep: [1, 2]\n")
    done = bmkit("compress", recipe, "-m", "whole", "-o", "less")
    assert done.returncode == 0, done.stderr
    less = AutoModelForCausalLM.from_pretrained(tmp_path / "less", dtype=torch.float32).eval()
    body, left = (getattr(m, m.base_model_prefix) for m in (whole, less))
    name = "layers" if hasattr(body, "layers") else "h"
    assert len(getattr(left, name)) == 2
    for i, layer in enumerate(getattr(left, name)):
        wanted = getattr(body, name)[i + 1].state_dict()
        assert wanted and all(torch.equal(v, wanted[k]) for k, v in layer.state_dict().items())
    assert less.config.num_hidden_layers == 2
    if config.model_type == "qwen2":
        assert less.config.layer_types == ["full_attention", "sliding_attention"]


MIXED = Qwen2MoeConfig(
    **GROUPED,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=32,
    num_experts=4,
    num_experts_per_tok=2,
    mlp_only_layers=[0],
)
POSITIONS = T5Config(vocab_size=360, d_model=32, d_kv=16, d_ff=48, num_layers=4, num_heads=2)


@pytest.mark.parametrize(
    ("config", "keep", "said"),
    [
        (MIXED, "[1, 2]", "block 1 can't stand at place 0"),  # the first has no experts
        (POSITIONS, "[1, 2]", "relative_attention_bias"),  # that only the first has
        (CONFIGS[1], "5", "has 4 layers"),
        (CONFIGS[1], "[0, 4]", "has 4 layers"),
    ],
    ids=["experts", "positions", "too many", "beyond the last"],
)
def test_layers_that_can_not_stay_alone_are_refused(
    config: Any, keep: str, said: str, tiny_checkpoint: Path, bmkit: Run, tmp_path: Path
) -> None:
    kind: Any = T5EncoderModel if config is POSITIONS else None
    whole = kind(config) if kind else AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(tmp_path / "whole")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_checkpoint / file, tmp_path / "whole" / file)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"kind: compress\nsteps:\n  - method: drop_layers\n    keep: {keep}\n")
    done = bmkit("compress", recipe, "-m", "whole", "-o", "less")
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (tmp_path / "less").exists()
