"""Prompts that tell labels together, the rows that they label, and the classifier that learns."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
WORDS = {"negative": ["<!>b"], "positive": ["<!>g"]}
"""Of one byte each: the tiny model has no longer tokens."""
PLAIN = '{"placeholder": "text_a"}: {"mask"}'
SOFT = '{"soft": None, "duplicate": 2} {"placeholder": "text_a"} {"mask"}'
FEW = {"type": "few_shot", "num_examples_per_label": 4}
SHORT = {"learning_rate": 0.02, "max_steps": 6, "per_device_train_batch_size": 4}
LORA: dict[str, Any] = {"mode": "delta", "deltas": [{"type": "lora"}], "learning_rate": 0.05}


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    """Texts of which the last word tells the label."""
    draw = random.Random(count + first)
    found = []
    for number in range(count):
        words = [draw.choice(("film", "it", "so", "one")) for _ in range(3)]
        words.append(("dull", "fun")[number % 2])
        found.append({"text": " ".join(words), "label": ("negative", "positive")[number % 2]})
    return found


def written(folder: Path, template: str = PLAIN, **more: Any) -> Path:
    """Write a recipe, JSON being YAML, and its rows beside it."""
    for name, count in (("train", 32), ("test", 20), ("dev", 12)):
        text = "".join(json.dumps(row) + "\n" for row in rows(count))
        (folder / f"{name}.jsonl").write_text(text)
    plain = "".join(json.dumps({"text": row["text"]}) + "\n" for row in rows(24, 1))
    (folder / "plain.jsonl").write_text(plain)
    data = {"columns": {"text_a": "text", "label": "label"}, "labels": list(WORDS)}
    values: dict[str, Any] = {
        "kind": "prompt",
        "data": {"train": "train.jsonl", "test": "test.jsonl", **data, **more.pop("data", {})},
        "template": {"text": template},
        "verbalizer": {"label_words": WORDS},
        "tune": LORA,
        "learning_setting": {**FEW, "seeds": [1, 2]},
        "train": SHORT,
        **more,
    }
    path = folder / f"recipe-{len(list(folder.glob('recipe-*')))}.yaml"
    path.write_text(json.dumps(values, indent=1))
    return path


def told(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def ask(
    bmkit: Run, prompt: object, *more: object, file: str = "test.jsonl"
) -> list[dict[str, Any]]:
    return told(bmkit("infer", "-m", prompt, "-i", file, "--json", *more))


def mean(all_: list[list[dict[str, Any]]], weights: list[float]) -> list[dict[str, float]]:
    """Return the weighted means of probabilities, row by row, in plain Python."""
    return [
        {
            label: sum(w * row["probabilities"][label] for w, row in zip(weights, own, strict=True))
            / sum(weights)
            for label in WORDS
        }
        for own in zip(*all_, strict=True)
    ]


def test_an_ensemble_says_the_weighted_mean_of_what_its_prompts_say_alone(
    bmkit: Run, fresh: Run, tiny: Path, tmp_path: Path
) -> None:
    second = {"type": "soft", "label_words": WORDS, "learning_rate": 0.1}
    ensemble = {
        "weights": "dev_accuracy",
        "members": [{"template": {"text": SOFT}, "verbalizer": second}],
    }
    file = written(tmp_path, ensemble=ensemble)
    (made,) = told(bmkit("prompt", file, "-m", tiny, "-o", "all", "--json"))
    alone, weights = [], []
    for template, verbalizer in ((PLAIN, {"label_words": WORDS}), (SOFT, second)):
        for seed in (1, 2):
            rate = {"learning_rate": LORA["learning_rate"]} if template == SOFT else {}
            one = written(
                tmp_path,
                template,
                tune={"mode": "delta", "deltas": LORA["deltas"], **rate},
                verbalizer=verbalizer,
                learning_setting={**FEW, "seeds": [seed]},
            )
            name = f"p{len(alone)}"
            (found,) = told(bmkit("prompt", one, "-m", tiny, "-o", name, "--json"))
            weights.append(found["metrics"]["dev_accuracy"])
            alone.append(ask(bmkit, name))
    assert len({json.dumps(own[0]["probabilities"]) for own in alone}) == 4, "all are alike"
    wanted = mean(alone, weights)
    said = told(fresh("infer", "-m", "all", "-i", "test.jsonl", "--json"))
    for row, own in zip(said, wanted, strict=True):
        assert row["probabilities"] == pytest.approx(own, abs=2e-5)
    right = [row["label"] == own["label"] for row, own in zip(said, rows(20), strict=True)]
    assert made["metrics"]["accuracy"] == sum(right) / len(right)
    assert made["metrics"]["members"] == 4
    for row, own in zip(ask(bmkit, "all", "-s", "batch_size=1"), said, strict=True):
        assert row["probabilities"] == pytest.approx(own["probabilities"], abs=2e-5)
    shown = told(bmkit("show", "all", "--json"))[0]
    assert [line["step"] for line in shown["table"][:4]] == [
        *("0-seed-1", "0-seed-2", "1-seed-1", "1-seed-2"),
    ]
    assert [line["dev_accuracy"] for line in shown["table"][:4]] == weights
    assert bmkit("show", "all").stdout.count("member   ") == 4


@pytest.mark.parametrize("over", ["probabilities", "logarithms"])
def test_prompts_without_training_tell_together_and_label_other_rows(
    bmkit: Run, tiny: Path, tmp_path: Path, over: str
) -> None:
    plain = {"tune": {}, "learning_setting": {}}
    other = 'A {"placeholder": "text_a"}. So {"mask"}'
    file = written(
        tmp_path,
        **plain,
        data={"unlabelled": "plain.jsonl", "dev": "dev.jsonl"},
        ensemble={"aggregate": over, "members": [{"template": {"text": other}}]},
    )
    (made,) = told(bmkit("prompt", file, "-m", tiny, "-o", "all", "--json"))
    assert {"accuracy", "dev_accuracy"} <= made["metrics"].keys()
    alone = []
    for template in (PLAIN, other):
        name = f"p{len(alone)}"
        one = written(tmp_path, template, **plain)
        assert bmkit("prompt", one, "-m", tiny, "-o", name).returncode == 0
        alone.append(ask(bmkit, name, file="plain.jsonl"))
    said = ask(bmkit, "all", file="plain.jsonl")
    labelled = [json.loads(line) for line in (tmp_path / "all" / "train.jsonl").open()]
    for number, (row, one, two) in enumerate(zip(said, *alone, strict=True)):
        wanted = {k: (v + two["probabilities"][k]) / 2 for k, v in one["probabilities"].items()}
        if over == "logarithms":
            both = {
                k: (v * two["probabilities"][k]) ** 0.5 for k, v in one["probabilities"].items()
            }
            wanted = {k: v / sum(both.values()) for k, v in both.items()}
        assert row["probabilities"] == pytest.approx(wanted, abs=2e-5)
        assert labelled[number]["text"] == rows(24, 1)[number]["text"]
        assert labelled[number]["probabilities"] == pytest.approx(wanted, abs=2e-5)


STUDENT = {
    "kind": "tune",
    "deltas": [{"type": "lora"}],
    "temperature": 2,
    "data": {"train": "train.jsonl", "dev": "test.jsonl"},
    "train": {"max_steps": 8, "learning_rate": 1e-2},
}


def test_a_pipeline_teaches_one_classifier_what_prompts_say_together(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    recipe = written(
        tmp_path,
        data={"unlabelled": "plain.jsonl"},
        ensemble={"weights": "untrained_accuracy", "members": [{"template": {"text": SOFT}}]},
    )
    (tmp_path / "student.yaml").write_text(json.dumps(STUDENT))
    stages = [
        {"prompt": str(recipe), "model": str(tiny), "out": "all"},
        {"tune": "student.yaml", "out": "taught"},
    ]
    (tmp_path / "pet.yaml").write_text(json.dumps(stages))
    (made,) = told(bmkit("run", "pet.yaml", "--json"))
    assert made["kind"] == "delta"
    assert made["metrics"]["rows"] == 24
    said = ask(bmkit, "taught", file="plain.jsonl")
    assert all(row["probabilities"].keys() == WORDS.keys() for row in said)
    (same,) = told(bmkit("tune", "student.yaml", "-m", "all", "-o", "taught", "--json"))
    assert same["reused"], "the pipe and the pipeline differ"
    rows_alone = ("--data", "all/train.jsonl", "-s", "data.dev=test.jsonl")
    (other,) = told(
        bmkit("tune", "student.yaml", "-m", tiny, *rows_alone, "-o", "taught", "--json")
    )
    assert other["reused"], "the rows alone make another"
    made_by = told(bmkit("show", "taught", "--json"))[0]
    assert [step["stage"] for step in made_by["steps"]] == ["prompt", "tune"]


def test_a_prompt_that_has_labelled_nothing_teaches_nothing(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    file = written(tmp_path, tune={}, learning_setting={})
    assert bmkit("prompt", file, "-m", tiny, "-o", "p").returncode == 0
    (tmp_path / "student.yaml").write_text(json.dumps(STUDENT))
    done = bmkit("tune", "student.yaml", "-m", "p", "-o", "t")
    assert done.returncode == 3
    assert "labelled no rows" in done.stderr
    (made,) = told(bmkit("tune", "student.yaml", "-m", "p", "--data", "train.jsonl", "--json"))
    assert made["metrics"]["rows"] == 32


def test_probabilities_teach_what_they_say_not_the_likeliest_label(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    soft = [{"text": row["text"], "probabilities": {"no": 0.7, "yes": 0.3}} for row in rows(24)]
    (tmp_path / "soft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in soft))
    recipe = {**STUDENT, "temperature": 1, "data": {"train": "soft.jsonl"}}
    recipe["train"] = {"max_steps": 60, "learning_rate": 1e-2, "lr_scheduler_type": "cosine"}
    (tmp_path / "student.yaml").write_text(json.dumps(recipe))
    assert bmkit("tune", "student.yaml", "-m", tiny, "-o", "t").returncode == 0
    said = ask(bmkit, "t", file="soft.jsonl")
    shares = [row["probabilities"]["no"] for row in said]
    assert sum(shares) / len(shares) == pytest.approx(0.7, abs=0.08)


@pytest.mark.parametrize(
    ("probabilities", "said"),
    [
        ({"no": 0.7, "yes": 0.7}, "make 1.4 together"),
        ({"no": -0.2, "yes": 1.2}, "`no` has `-0.2`"),
        ({"no": "much", "yes": 0}, "`no` has `much`"),
        ([0.5, 0.5], "takes labels"),
        ({}, "takes labels"),
        ({"no": 0.5, "yess": 0.5}, "did you mean `yes`?"),
    ],
)
def test_probabilities_that_are_none_are_refused_by_their_line(
    bmkit: Run, tiny: Path, tmp_path: Path, probabilities: Any, said: str
) -> None:
    good = {"text": "a", "probabilities": {"no": 0.5, "yes": 0.5}}
    lines = [good, {"text": "b", "probabilities": probabilities}]
    (tmp_path / "soft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    data = {"train": "soft.jsonl", "labels": ["no", "yes"]}
    (tmp_path / "student.yaml").write_text(json.dumps({**STUDENT, "data": data}))
    done = bmkit("tune", "student.yaml", "-m", tiny, "-o", "t")
    assert done.returncode == 3, done.stderr
    assert "soft.jsonl:2: " in done.stderr
    assert said in done.stderr


ONE = {"template": {"text": PLAIN}}
ZERO: dict[str, Any] = {"tune": {}, "learning_setting": {}}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"ensemble": {}, "learning_setting": FEW}, "one prompt is none"),
        ({"ensemble": {"members": [ONE], "weights": "dev_accuracy"}, **ZERO}, "needs data.dev"),
        (
            {"ensemble": {"members": [ONE], "weights": "untrained_accuracy"}, **ZERO},
            "rows to learn",
        ),
        ({"ensemble": {"members": [{"template": {"text": "no mask"}}]}}, "has no"),
        ({"ensemble": {"members": [{"template": {"file_path": "t.txt"}}]}}, "file_path"),
        (
            {"ensemble": {"members": [{**ONE, "verbalizer": {"label_words": {"bad": "x"}}}]}},
            "`bad` is none of the labels",
        ),
    ],
)
def test_what_tells_nothing_together_is_refused(
    bmkit: Run, tiny: Path, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    done = bmkit("prompt", written(tmp_path, **more), "-m", tiny, "-o", "p")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr


def test_an_error_of_a_member_shows_the_member(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    file = written(tmp_path, SOFT, ensemble={"members": [ONE]}, tune={"mode": "soft"})
    done = bmkit("prompt", file, "-m", tiny, "-o", "p")
    assert done.returncode == 2 and "no soft tokens" in done.stderr
    lines = file.read_text().splitlines()
    (line,) = [n for n, text in enumerate(lines, 1) if json.dumps(PLAIN) in text]
    assert f"{file.name}:{line}:" in done.stderr
