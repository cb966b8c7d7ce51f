"""Features of `bmkit prompt` together: ensembles of relations and of searches, whole models."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
Make = Callable[[str], Path]
SEEN = {"parent": "born", "child": "is", "lives": "near", "none": "visits"}
"""The word of a text that tells its label."""
PTR = '{"placeholder": "text"} the {"mask"} {"meta": "head"} {"mask"} the {"mask"} {"meta": "tail"}'
RULES = {
    "parent": ["person", "parent", "person"],
    "child": ["person", "child", "person"],
    "lives": ["person", "lives", "city"],
    "none": ["person", "nothing", "place"],
}
ONE = '{"placeholder": "text"} {"meta": "head"} {"meta": "tail"} is {"mask"}'
WORDS = {label: [own[1]] for label, own in RULES.items()}
LORA = {"mode": "delta", "deltas": [{"type": "lora"}]}
SHORT = {"max_steps": 4, "learning_rate": 0.01, "per_device_train_batch_size": 4}


def rows(count: int) -> list[dict[str, str]]:
    """Two entities in a text of which a word tells their relation."""
    draw = random.Random(count)
    found = []
    for at in range(count):
        label = list(SEEN)[at % 4]
        head, tail = draw.choice(["Ann", "Bob"]), draw.choice(["Rome", "Oslo"])
        first, last = draw.choice(["it", "x", "the", "was"]), draw.choice([".", ","])
        text = f"{first} {head} {SEEN[label]} {tail} {last}"
        found.append({"text": text, "head": head, "tail": tail, "label": label})
    return found


def written(folder: Path, values: dict[str, Any]) -> Path:
    """Write a recipe, JSON being YAML, and its rows beside it."""
    for split, count in (("train", 40), ("dev", 12), ("test", 24)):
        text = "".join(json.dumps(row) + "\n" for row in rows(count))
        (folder / f"{split}.jsonl").write_text(text)
    plain = "".join(json.dumps({"text": row["text"]}) + "\n" for row in rows(10))
    (folder / "plain.jsonl").write_text(plain)
    data = {"labels": list(SEEN), "test": "test.jsonl"}
    values = {**values, "kind": "prompt", "data": {**data, **values.get("data", {})}}
    path = folder / f"recipe-{len(list(folder.glob('recipe-*')))}.yaml"
    path.write_text(json.dumps(values, indent=1))
    return path


def told(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def make(bmkit: Run, folder: Path, values: dict[str, Any], model: Path, out: str) -> Any:
    (found,) = told(bmkit("prompt", written(folder, values), "-m", model, "-o", out, "--json"))
    return found["metrics"]


def ask(bmkit: Run, prompt: str, file: str = "test.jsonl") -> list[dict[str, float]]:
    said = told(bmkit("infer", "-m", prompt, "-i", file, "--json"))
    return [row["probabilities"] for row in said]


def mean(all_: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    return [
        {label: sum(row[label] for row in own) / len(own) for label in SEEN}
        for own in zip(*all_, strict=True)
    ]


RELATION: dict[str, Any] = {
    "task": "relation",
    "data": {"none": "none"},
    "template": {"text": PTR},
    "verbalizer": {"type": "ptr", "label_words": RULES},
}


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_rules_at_several_masks_and_words_at_one_tell_relations_together(
    bmkit: Run, promptable: Make, tmp_path: Path, kind: str
) -> None:
    path = promptable(kind)
    other = {"template": {"text": ONE}, "verbalizer": {"label_words": WORDS}}
    calibrated = {**RELATION, "calibrate": {"type": "contextual"}}
    metrics = make(bmkit, tmp_path, {**calibrated, "ensemble": {"members": [other]}}, path, "all")
    make(bmkit, tmp_path, calibrated, path, "p0")
    make(bmkit, tmp_path, {**calibrated, **other}, path, "p1")
    said = ask(bmkit, "all")
    for row, own in zip(said, mean([ask(bmkit, "p0"), ask(bmkit, "p1")]), strict=True):
        assert row == pytest.approx(own, abs=2e-5)
    pairs = [
        (max(row, key=row.__getitem__), own["label"])
        for row, own in zip(said, rows(24), strict=True)
    ]
    assert metrics["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / 24, abs=1e-6)
    hits = sum(a == b != "none" for a, b in pairs)
    guessed, there = sum(a != "none" for a, _ in pairs), sum(b != "none" for _, b in pairs)
    assert metrics["micro_f1"] == pytest.approx(2 * hits / (guessed + there), abs=1e-6)


def test_how_much_words_count_is_kept_with_each_member(
    bmkit: Run, promptable: Make, tmp_path: Path
) -> None:
    words = {label: [own[0], own[1], own[2]] for label, own in RULES.items()}
    values: dict[str, Any] = {
        "data": {"train": "train.jsonl"},
        "template": {"text": '{"placeholder": "text"} it is {"mask"}'},
        "verbalizer": {"label_words": words, "word_weights": True, "learning_rate": 0.5},
        "tune": {"mode": "soft"},
        "train": SHORT,
    }
    few = {"type": "few_shot", "num_examples_per_label": 3}
    seeds = {"learning_setting": {**few, "seeds": [1, 2]}}
    make(bmkit, tmp_path, {**values, **seeds, "ensemble": {}}, promptable("causal"), "all")
    alone = []
    for seed in (1, 2):
        one = {**values, "learning_setting": {**few, "seeds": [seed]}}
        make(bmkit, tmp_path, one, promptable("causal"), f"p{seed}")
        alone.append(ask(bmkit, f"p{seed}"))
    assert alone[0] != alone[1]
    for row, own in zip(ask(bmkit, "all"), mean(alone), strict=True):
        assert row == pytest.approx(own, abs=2e-5)


@pytest.mark.parametrize("trained", [0, 2])
def test_each_seed_of_an_ensemble_has_the_prompt_that_it_finds_by_a_search(
    bmkit: Run, promptable: Make, tmp_path: Path, trained: int
) -> None:
    path = promptable("causal")
    values: dict[str, Any] = {
        "data": {"train": "train.jsonl", "unlabelled": "plain.jsonl"},
        "template": {"text": '{"placeholder": "text"} it is {"mask"}'},
        "verbalizer": {"label_words": WORDS},
        "search": {"templates": ['so {"placeholder": "text"} {"mask"}'], "num_candidates": 2},
        "train": SHORT,
    }
    if trained:
        values["search"]["num_trained"] = trained
        values["tune"] = LORA
    few = {"type": "few_shot", "num_examples_per_label": 4}
    seeds = {"learning_setting": {**few, "seeds": [3, 4]}}
    metrics = make(bmkit, tmp_path, {**values, **seeds, "ensemble": {}}, path, "all")
    assert (metrics["members"], metrics["templates"]) == (2, 2)
    alone, labelled = [], []
    for seed in (3, 4):
        one = {**values, "learning_setting": {**few, "seeds": [seed]}}
        make(bmkit, tmp_path, one, path, f"p{seed}")
        alone.append(ask(bmkit, f"p{seed}"))
        labelled.append(ask(bmkit, f"p{seed}", "plain.jsonl"))
        found = tmp_path / "all" / "members" / f"0-seed-{seed}" / "search.json"
        assert found.read_text() == (tmp_path / f"p{seed}" / "search.json").read_text()
        kept = (tmp_path / f"p{seed}" / "train.jsonl").read_text().splitlines()
        for line, own in zip(kept, labelled[-1], strict=True):
            assert json.loads(line)["probabilities"] == pytest.approx(own, abs=2e-5)
    for row, own in zip(ask(bmkit, "all"), mean(alone), strict=True):
        assert row == pytest.approx(own, abs=2e-5)
    kept = (tmp_path / "all" / "train.jsonl").read_text().splitlines()
    for line, own in zip(kept, mean(labelled), strict=True):
        assert json.loads(line)["probabilities"] == pytest.approx(own, abs=2e-5)


def test_a_whole_model_is_trained_to_say_texts_and_says_them_again(
    bmkit: Run, promptable: Make, tmp_path: Path
) -> None:
    values = {
        "task": "generation",
        "data": {"labels": None, "train": "train.jsonl", "columns": {"target": "tail"}},
        "template": {"text": '{"placeholder": "text"} {"mask"}'},
        "generate": {"max_new_tokens": 3},
        "tune": {"mode": "full"},
        "learning_setting": {"type": "full"},
        "train": {"num_train_epochs": 20, "learning_rate": 0.01, "per_device_train_batch_size": 8},
    }
    path = promptable("causal")
    metrics = make(bmkit, tmp_path, values, path, "p")
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    right = [row["text"].strip() == own["tail"] for row, own in zip(said, rows(24), strict=True)]
    assert metrics["exact_match"] == pytest.approx(sum(right) / 24, abs=1e-6)
    assert metrics["exact_match"] > 0.6, metrics
    assert (tmp_path / "p" / "model" / "model.safetensors").is_file()
    assert bmkit("merge", "-m", "p", "-o", "merged").returncode == 0
    texts = [{"prompt": row["text"]} for row in rows(24)]
    (tmp_path / "asks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    how = ("-s", "max_new_tokens=3", "-s", "raw=true")
    plain = told(bmkit("infer", "-m", "merged", "-i", "asks.jsonl", "--json", *how))
    assert [row["text"].strip() for row in plain] == [row["text"].strip() for row in said]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "probing"}, "`task: probing` takes one prompt, and no ensemble"),
        ({"task": "generation"}, "`task: generation` takes one prompt, and no ensemble"),
        (
            {"task": "generation", "data": {"labels": None, "unlabelled": "plain.jsonl"}},
            "`task: generation` teaches no classifier",
        ),
    ],
)
def test_what_no_several_prompts_tell_is_refused(
    bmkit: Run, promptable: Make, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    text = '{"placeholder": "text"} {"mask"}'
    other = {"template": {"text": f"so {text}"}}
    values = {"data": {"labels": None}, "template": {"text": text}, **change}
    file = written(tmp_path, {**values, "ensemble": {"members": [other]}})
    done = bmkit("prompt", file, "-m", promptable("causal"), "-o", "p")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_tags_are_told_by_one_prompt(bmkit: Run, promptable: Make, tmp_path: Path) -> None:
    values = {
        "task": "tagging",
        "data": {"none": "none"},
        "template": {"text": '{"placeholder": "text"} {"meta": "span"} is {"mask"}'},
        "verbalizer": {"label_words": WORDS},
        "ensemble": {"members": [{"template": {"text": '{"meta": "span"} {"mask"}'}}]},
    }
    done = bmkit("prompt", written(tmp_path, values), "-m", promptable("causal"), "-o", "p")
    assert (done.returncode, done.stdout) == (2, "")
    assert "`task: tagging` takes one prompt, and no ensemble" in done.stderr
