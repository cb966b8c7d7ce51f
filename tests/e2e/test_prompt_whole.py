"""`tune.mode: full`: the whole model is trained with its prompt, and is kept in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

WORDS = {"negative": "<!>b", "positive": "<!>g"}
SOFT = '{"soft": "It"}{"placeholder": "text_a"} {"mask"}'
ENDS = {"negative": "dull", "positive": "fun"}
ROWS = [{"text": f"film {i} {ENDS[label]}", "label": label} for i in range(16) for label in WORDS]


def recipe(folder: Path, **more: Any) -> Path:
    """Write a recipe, JSON being YAML, and its rows beside it."""
    for name, part in (("train", ROWS[:20]), ("test", ROWS[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    values: dict[str, Any] = {
        "kind": "prompt",
        "data": {
            "train": "train.jsonl",
            "test": "test.jsonl",
            "columns": {"text_a": "text", "label": "label"},
            "labels": list(WORDS),
        },
        "template": {"text": SOFT},
        "verbalizer": {"label_words": WORDS},
        "tune": {"mode": "full", "learning_rate": 0.02},
        "learning_setting": {"type": "full"},
        "train": {"max_steps": 12, "learning_rate": 2e-3, "per_device_train_batch_size": 8},
        **more,
    }
    path = folder / f"recipe-{len(list(folder.glob('recipe-*')))}.yaml"
    path.write_text(json.dumps(values, indent=1))
    return path


def told(done: Any) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def directly(model: Path, soft: Path | None, text: str) -> list[float]:
    """Return the probabilities of both labels by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = known(text, return_tensors="pt")["input_ids"]
    given = plain.get_input_embeddings()(ids)
    if soft is not None:
        rows = load_file(soft / "soft_rows.safetensors")["rows"]
        given = torch.cat((rows[None], given), 1)
    with torch.no_grad():
        logits = plain(inputs_embeds=given).logits[0, -1]
    at = [known(word)["input_ids"][0] for word in ("b", "g")]
    return [float(share) for share in logits[at].softmax(-1)]


def test_the_whole_model_is_trained_kept_and_asked_without_its_base(
    bmkit: Callable[..., Any], fresh: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    (made,) = told(bmkit("prompt", recipe(tmp_path), "-m", tiny, "-o", "p", "--json"))
    weights = sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    assert made["metrics"]["trainable_parameters"] == weights + 2 * 32  # and two soft tokens
    assert made["metrics"]["accuracy"] == 1.0
    before = [directly(tiny, None, row["text"]) for row in ROWS[20:]]
    shutil.rmtree(tiny)  # nothing of it is needed any more
    said = told(fresh("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    right = [row["label"] == own["label"] for row, own in zip(said, ROWS[20:], strict=True)]
    assert sum(right) / len(right) == pytest.approx(made["metrics"]["accuracy"], abs=1e-6)
    moved = 0.0
    for row, own, was in zip(said, ROWS[20:], before, strict=True):
        wanted = directly(tmp_path / "p" / "model", tmp_path / "p" / "soft", own["text"])
        assert list(row["probabilities"].values()) == pytest.approx(wanted, abs=2e-5)
        moved = max(moved, abs(wanted[0] - was[0]))
    assert moved > 0.1


def test_a_trained_verbalizer_and_seeds_go_with_whole_models_in_an_ensemble(
    bmkit: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    more = {
        "verbalizer": {"type": "soft", "label_words": WORDS, "learning_rate": 0.05},
        "learning_setting": {"type": "few_shot", "num_examples_per_label": 4, "seeds": [1, 2]},
        "train": {"max_steps": 3, "learning_rate": 1e-3},
    }
    (made,) = told(
        bmkit("prompt", recipe(tmp_path, ensemble={}, **more), "-m", tiny, "-o", "e", "--json")
    )
    alone = []
    for seed in (1, 2):
        setting = {**more["learning_setting"], "seeds": [seed]}
        file = recipe(tmp_path, **{**more, "learning_setting": setting})
        assert bmkit("prompt", file, "-m", tiny, "-o", f"p{seed}").returncode == 0
        alone.append(told(bmkit("infer", "-m", f"p{seed}", "-i", "test.jsonl", "--json")))
    shutil.rmtree(tiny)
    said = told(bmkit("infer", "-m", "e", "-i", "test.jsonl", "--json"))
    for row, one, two in zip(said, *alone, strict=True):
        for label in WORDS:
            both = one["probabilities"][label], two["probabilities"][label]
            assert row["probabilities"][label] == pytest.approx(sum(both) / 2, abs=2e-5)
    right = [row["label"] == own["label"] for row, own in zip(said, ROWS[20:], strict=True)]
    assert sum(right) / len(right) == pytest.approx(made["metrics"]["accuracy"], abs=1e-6)


def test_a_prompt_with_a_model_of_its_own_goes_on_no_other(
    bmkit: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    file = recipe(tmp_path, train={"max_steps": 1})
    assert bmkit("prompt", file, "-m", tiny, "-o", "p").returncode == 0
    done = bmkit("infer", "-m", tiny, "--adapter", "p", "-p", "x")
    assert done.returncode == 3
    assert "has a model of its own" in done.stderr
    (tmp_path / "tune.yaml").write_text(
        json.dumps({"kind": "tune", "deltas": [{"type": "lora"}], "data": {"train": "say.jsonl"}})
    )
    (tmp_path / "say.jsonl").write_text('{"text": "so it is"}\n')
    assert bmkit("tune", "tune.yaml", "-m", tiny, "-o", "d").returncode == 0
    done = bmkit("prompt", file, "-m", "d", "-o", "q")
    assert done.returncode == 2
    assert "merge it first" in done.stderr


def test_pruned_weights_stay_zero(bmkit: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    assert bmkit("compress", "magnitude", "-m", tiny, "-o", "thin").returncode == 0
    file = recipe(tmp_path, train={"max_steps": 2, "learning_rate": 1e-2})
    assert bmkit("prompt", file, "-m", "thin", "-o", "p").returncode == 0
    thin, kept = (load_file(tmp_path / f / "model.safetensors") for f in ("thin", "p/model"))
    name = next(n for n in thin if n.endswith("down_proj.weight"))
    assert (thin[name] == 0).float().mean() > 0.3
    assert not (kept[name][thin[name] == 0]).any()
    assert not torch.equal(kept[name], thin[name])
