"""`bmkit merge` of a prompt: a plain checkpoint that says the same at the mask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

Run = Callable[..., Any]
WORDS = {"negative": "<!>b", "positive": "<!>g"}
SOFT = '{"soft": "It", "soft_id": 1} {"placeholder": "text_a"}, {"soft_id": 1}{"soft"} {"mask"}'
IT = "<soft_0><soft_1>"
"""Of two bytes."""
PLAIN = '{"placeholder": "text_a"} {"mask"}'
ROWS = [{"text": t, "label": label} for t in ("a film", "so it is") for label in WORDS]
LORA = {"mode": "delta", "deltas": [{"type": "lora"}], "learning_rate": 0.05}


def recipe(folder: Path, **more: Any) -> Path:
    """Write a recipe, JSON being YAML, and its rows beside it."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    columns = {"text_a": "text", "label": "label"}
    values: dict[str, Any] = {
        "kind": "prompt",
        "data": {"train": "rows.jsonl", "columns": columns, "labels": list(WORDS)},
        "template": {"text": SOFT},
        "verbalizer": {"label_words": WORDS},
        "tune": LORA,
        "learning_setting": {"type": "full"},
        "train": {"max_steps": 3, "learning_rate": 0.01},
        **more,
    }
    path = folder / f"recipe-{len(list(folder.glob('recipe-*')))}.yaml"
    path.write_text(json.dumps(values, indent=1))
    return path


def told(done: Any) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(params=["llama", "bert"])
def model(request: pytest.FixtureRequest, tiny: Path) -> Path:
    """A model in float32: one that goes on with a text, or one that fills in masks."""
    path: Path = tiny
    if request.param == "bert":
        path = request.getfixturevalue("bert")
    else:
        plain = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        plain.save_pretrained(path)
    return path


def test_a_merged_prompt_says_the_same_at_the_mask_in_plain_transformers(
    bmkit: Run, model: Path, tmp_path: Path
) -> None:
    assert bmkit("prompt", recipe(tmp_path), "-m", model, "-o", "p").returncode == 0
    wanted = told(bmkit("infer", "-m", "p", "-i", "rows.jsonl", "--json"))
    (made,) = told(bmkit("merge", "-m", "p", "-o", "whole", "--json"))
    assert made["kind"] == "model"
    kind = json.loads((model / "config.json").read_text())["model_type"]
    auto = "AutoModelForMaskedLM" if kind == "bert" else "AutoModelForCausalLM"
    plain, info = getattr(transformers, auto).from_pretrained(
        tmp_path / "whole", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    known = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole")
    for row, own in zip(wanted, ROWS, strict=True):
        mask = known.mask_token if kind == "bert" else ""
        text = f"{IT} {own['text']},{IT}<soft_2>{mask}"
        ids = known(text, return_tensors="pt")["input_ids"]
        assert known.convert_tokens_to_ids("<soft_0>") in ids
        at = int((ids[0] == known.mask_token_id).nonzero()) if kind == "bert" else -1
        with torch.no_grad():
            logits = plain.eval()(input_ids=ids).logits[0, at]
        words = [known.convert_tokens_to_ids(word) for word in ("b", "g")]
        shares = logits[words].softmax(-1).tolist()
        assert list(row["probabilities"].values()) == pytest.approx(shares, abs=2e-5)


def test_the_template_of_a_merged_prompt_tells_the_same_without_training(
    bmkit: Run, model: Path, tmp_path: Path
) -> None:
    assert bmkit("prompt", recipe(tmp_path), "-m", model, "-o", "p").returncode == 0
    assert bmkit("merge", "-m", "p", "-o", "whole").returncode == 0
    bare = recipe(
        tmp_path,
        template={"file_path": "whole/template.txt"},
        tune={},
        learning_setting={},
        data={"columns": {"text_a": "text"}, "test": "rows.jsonl", "labels": list(WORDS)},
    )
    assert bmkit("prompt", bare, "-m", "whole", "-o", "q").returncode == 0
    both = [told(bmkit("infer", "-m", p, "-i", "rows.jsonl", "--json")) for p in ("p", "q")]
    for one, two in zip(*both, strict=True):
        assert one["probabilities"] == pytest.approx(two["probabilities"], abs=2e-5)


def test_a_prompt_on_a_delta_is_merged_with_it_and_one_with_its_own_model_too(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    plain.save_pretrained(tiny)
    (tmp_path / "say.jsonl").write_text('{"text": "so it is"}\n{"text": "a film"}\n')
    tune = {"kind": "tune", "deltas": [{"type": "lora"}], "data": {"train": "say.jsonl"}}
    (tmp_path / "tune.yaml").write_text(json.dumps({**tune, "train": {"learning_rate": 0.05}}))
    assert bmkit("tune", "tune.yaml", "-m", tiny, "-o", "d").returncode == 0
    full = recipe(tmp_path, tune={"mode": "full"})
    for base, file, out in (("d", recipe(tmp_path), "p"), (tiny, full, "f")):
        assert bmkit("prompt", file, "-m", base, "-o", out).returncode == 0
        wanted = told(bmkit("infer", "-m", out, "-i", "rows.jsonl", "--json"))
        assert bmkit("merge", "-m", out, "-o", f"{out}-whole").returncode == 0
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{out}-whole")
        known = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{out}-whole")
        for row, own in zip(wanted, ROWS, strict=True):
            ids = known(f"{IT} {own['text']},{IT}<soft_2>", return_tensors="pt")
            with torch.no_grad():
                logits = model.eval()(input_ids=ids["input_ids"]).logits[0, -1]
            words = [known.convert_tokens_to_ids(word) for word in ("b", "g")]
            shares = logits[words].softmax(-1).tolist()
            assert list(row["probabilities"].values()) == pytest.approx(shares, abs=2e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"verbalizer": {"type": "soft", "label_words": WORDS}}, "has a soft verbalizer"),
        ({"verbalizer": {"type": "prototypical"}}, "has a prototypical verbalizer"),
        ({"tune": {"mode": "delta", "deltas": [{"type": "prefix"}]}}, "no place in the weights"),
        ({"ensemble": {"members": [{"template": {"text": PLAIN}}]}}, "is an ensemble"),
    ],
)
def test_what_has_no_place_in_weights_is_refused(
    bmkit: Run, tiny: Path, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    assert bmkit("prompt", recipe(tmp_path, **more), "-m", tiny, "-o", "p").returncode == 0
    done = bmkit("merge", "-m", "p", "-o", "whole")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "whole").exists()
