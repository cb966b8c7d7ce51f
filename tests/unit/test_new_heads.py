"""What a plan and a tree say of a head that a checkpoint hasn't, against the head itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from bmkit.plan import read_headers
from bmkit.runtime import heads
from bmkit.tune.recipe import TuneRecipe
from bmkit.tune.task import new_head

FAMILIES = (
    *("llama", "qwen2", "gpt2", "gpt_neox", "opt", "qwen2_moe", "mixtral"),
    *("bert", "bert_classifier", "roberta", "electra", "distilbert", "mpnet", "modernbert", "t5"),
)
LABELS = ("a", "b", "c")
KINDS = {"sequence_classification": "label", "token_classification": "tags"}
CASES = [(family, task) for family in FAMILIES for task in KINDS]
LACKING = [("opt", "token_classification"), ("t5", "token_classification")]
CASES = [case for case in CASES if case not in LACKING]


def stored(build: Callable[..., Any], family: str, folder: Path) -> Path:
    build(family, real=True).save_pretrained(folder)
    return folder


def headed(folder: Path, task: Any) -> tuple[Any, list[str], list[str]]:
    """Return a checkpoint's model with a head, what it says is trained, and what headers say."""
    head = heads.Head(task, LABELS)
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    config = heads.config_of(folder, head, tokenizer)
    device = torch.device("cpu")
    model, trained = heads.load(folder, config, device=device, dtype="float32")
    with torch.device("meta"):
        empty = getattr(transformers, config.architectures[0])(config)
    return model, sorted(trained), sorted(heads.trained_with(folder, empty))


@pytest.mark.parametrize(("family", "task"), CASES)
def test_headers_tell_which_modules_are_new(
    family: str, task: str, architecture: Callable[..., Any], tmp_path: Path
) -> None:
    _, trained, told = headed(stored(architecture, family, tmp_path), task)
    assert told == trained and trained


@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_plan_counts_what_is_new(
    family: str, task: str, architecture: Callable[..., Any], tmp_path: Path
) -> None:
    folder = stored(architecture, family, tmp_path / "model")
    model, trained, _ = headed(folder, task)
    rows = (
        [{"tokens": ["x"] * 3, "tags": LABELS}]
        if KINDS[task] == "tags"
        else [{"text": "x", "label": label} for label in LABELS]
    )
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = TuneRecipe.model_validate(
        {"kind": "tune", "deltas": [{"type": "lora"}], "data": {"train": str(data)}}
    )
    labels, count = new_head(recipe, read_headers(folder), data)
    exact = sum(p.numel() for name in trained for p in model.get_submodule(name).parameters())
    assert labels == 3
    assert count == exact or math.isclose(count, exact, abs_tol=2 * 16 + 3), (count, exact)


@pytest.mark.parametrize("task", ["causal_lm", "preference", "auto"])
def test_a_task_without_labels_has_no_head(
    task: str, architecture: Callable[..., Any], tmp_path: Path
) -> None:
    folder = stored(architecture, "llama", tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    recipe = TuneRecipe.model_validate(
        {"kind": "tune", "task": task, "deltas": [{"type": "lora"}], "data": {"train": "x"}}
    )
    assert new_head(recipe, read_headers(folder), data) == (0, 0)
