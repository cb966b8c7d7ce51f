"""`bmkit prompt` for tasks without labels: what a model knows, and texts that it says."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., subprocess.CompletedProcess[str]]
Make = Callable[[str], Path]
KINDS = ("masked", "causal", "t5")


def write(folder: Path, values: dict[str, Any], **files: list[Any]) -> Path:
    """Write a recipe, JSON being YAML, and its rows beside it."""
    values = json.loads(json.dumps(values))
    for split, rows in files.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values.setdefault("data", {})[split] = f"{split}.jsonl"
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"kind": "prompt", **values}, indent=1))
    return path


def told(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


FACTS = [
    {"sub": "Ann", "obj": "Rome", "relation": "born"},
    {"sub": "Bob", "obj": "Oslo", "relation": "born"},
    {"sub": "x", "obj": "place near Rome", "relation": "is"},
]
PROBING: dict[str, Any] = {
    "task": "probing",
    "data": {"columns": {"subject": "sub", "object": "obj"}},
    "template": {"text": '{"placeholder": "subject"} was born in {"mask"}'},
}


def at_the_mask(path: Path, kind: str, subject: str) -> Any:
    """Return the log-probabilities of all tokens, by transformers alone."""
    import transformers

    known = transformers.AutoTokenizer.from_pretrained(path)
    mask = {"masked": " <mask>", "t5": " <extra_id_0>"}.get(kind, "")
    ids = known(f"{subject} was born in{mask}", return_tensors="pt")["input_ids"]
    made = {"masked": "AutoModelForMaskedLM", "causal": "AutoModelForCausalLM"}
    name = made.get(kind, "AutoModelForSeq2SeqLM")
    model = getattr(transformers, name).from_pretrained(path).eval()
    more = {}
    at = 4 + (kind == "masked") - (kind == "causal")
    if kind == "t5":
        more = {"decoder_input_ids": torch.tensor([[0, known.convert_tokens_to_ids(mask[1:])]])}
        at = 1
    with torch.no_grad():
        return model(input_ids=ids, **more).logits[0, at].log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_tokens_are_told_as_by_transformers_alone(
    bmkit: Run, promptable: Make, tmp_path: Path, kind: str
) -> None:
    from transformers import AutoTokenizer

    path = promptable(kind)
    known = AutoTokenizer.from_pretrained(path)
    (made,) = told(
        bmkit("prompt", write(tmp_path, PROBING, test=FACTS), "-m", path, "-o", "p", "--json")
    )
    places = []
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    for row, own in zip(said, FACTS, strict=True):
        wanted = at_the_mask(path, kind, own["sub"])
        order = wanted.argsort(descending=True).tolist()
        assert [known.convert_tokens_to_ids(one["token"]) for one in row["top"]] == order[:10]
        assert [one["probability"] for one in row["top"]] == pytest.approx(
            wanted.exp()[order[:10]].tolist(), abs=1e-5
        )
        if " " not in own["obj"]:
            places.append(1 + order.index(known.convert_tokens_to_ids(own["obj"])))
    metrics = made["metrics"]
    assert metrics["mean_reciprocal_rank"] == pytest.approx(
        sum(1 / place for place in places) / 2, abs=1e-6
    )
    assert metrics["precision_at_10"] == sum(place <= 10 for place in places) / 2
    assert (metrics["rows"], metrics["rows_left_out"]) == (2, 1)
    assert "test: born" in bmkit("show", "p").stdout


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_candidates_of_several_words_can_be_found(
    bmkit: Run, promptable: Make, tmp_path: Path, kind: str
) -> None:
    path = promptable(kind)
    (tmp_path / "cities.txt").write_text("Rome\nOslo\n\nplace near Rome\nRome\n")
    values = {**PROBING, "probing": {"candidates_file": "cities.txt", "top": 2}}
    (made,) = told(
        bmkit("prompt", write(tmp_path, values, test=FACTS), "-m", path, "-o", "p", "--json")
    )
    assert (made["metrics"]["rows"], made["metrics"]["rows_left_out"]) == (3, 0)
    assert made["metrics"]["precision_at_10"] == 1.0
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    assert {one["token"].strip() for row in said for one in row["top"]} <= {
        *("Rome", "Oslo", "place near Rome")
    }
    assert all(len(row["top"]) == 2 for row in said)
    right = [row["text"] == own["obj"] for row, own in zip(said, FACTS, strict=True)]
    assert made["metrics"]["precision_at_1"] == pytest.approx(sum(right) / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"data": {"labels": ["a", "b"]}}, 2, "`task: probing` has none"),
        ({"verbalizer": {"type": "manual", "label_words": ["a", "b"]}}, 2, "has no labels"),
        ({"data": {"columns": {"object": "answer"}}}, 3, "test.jsonl:1: it has no column `answer`"),
        ({"data": {}}, 3, "test.jsonl:1: it has no `object`"),
        ({"probing": {"candidates": ["Rome", "Oslo"]}}, 3, "test.jsonl:3: `place near Rome` is"),
        ({"probing": {"candidates": ["Rome", "zzz"]}}, 3, "`zzz` is no word to the tokenizer"),
        ({"task": "classification"}, 2, "it says nothing with `task: classification`"),
    ],
)
def test_probing_that_does_not_fit_is_refused(
    bmkit: Run, promptable: Make, tmp_path: Path, change: Any, code: int, said: str
) -> None:
    path = promptable("causal")
    values = {**PROBING, **change}
    if values["data"] is not PROBING["data"]:
        values["template"] = {"text": '{"placeholder": "sub"} was born in {"mask"}'}
    if "task" in change:
        values |= {"probing": {"top": 3}, "verbalizer": {"label_words": {"a": "is", "b": "of"}}}
    done = bmkit("prompt", write(tmp_path, values, test=FACTS), "-m", path, "-o", "p")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert said in done.stderr


def asks(count: int) -> list[dict[str, str]]:
    """Rows that want two words said, which follow from two that are read."""
    draw = random.Random(count)
    pairs = {"Ann": "Rome", "Bob": "Oslo", "x": "place", "it": "city"}
    found = []
    for _ in range(count):
        a, b = draw.choice(list(pairs)), draw.choice(list(pairs))
        found.append({"question": f"{a} , {b}", "answer": f"{pairs[a]} {pairs[b]}"})
    return found


GENERATION: dict[str, Any] = {
    "task": "generation",
    "data": {"columns": {"text_a": "question", "target": "answer"}},
    "template": {"text": '{"placeholder": "text_a"} is {"mask"}'},
    "generate": {"max_new_tokens": 6},
    "tune": {"mode": "delta", "deltas": [{"type": "lora"}]},
    "learning_setting": {"type": "full"},
    "train": {"num_train_epochs": 30, "learning_rate": 0.02, "per_device_train_batch_size": 16},
}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_texts_are_learned_generated_and_measured(
    bmkit: Run, promptable: Make, tmp_path: Path, kind: str
) -> None:
    path = promptable(kind)
    file = write(tmp_path, GENERATION, train=asks(64), test=asks(12))
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    metrics = made["metrics"]
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    right = [
        row["text"].split() == own["answer"].split()
        for row, own in zip(said, asks(12), strict=True)
    ]
    assert metrics["exact_match"] == pytest.approx(sum(right) / 12, abs=1e-6)
    assert metrics["exact_match"] <= metrics["rouge_l"] <= metrics["token_f1"]
    assert metrics["rouge_l"] > (0.9 if kind == "causal" else 0.3), metrics
    assert said[0]["prompt"] == f"{asks(12)[0]['question']} is"
    line = bmkit("infer", "-m", "p", "-p", asks(12)[0]["question"])
    assert line.stdout.split() == said[0]["text"].split()
    done = bmkit("infer", "-m", "p", "-p", "x", "--system", "y")
    assert done.returncode == 2 and "leave --system out" in done.stderr


def test_a_row_is_drawn_by_its_number_and_has_as_many_tokens_as_were_measured(
    bmkit: Run, promptable: Make, tmp_path: Path
) -> None:
    values = {**GENERATION, "tune": {"mode": "none"}, "learning_setting": {"type": "zero_shot"}}
    values["template"] = {"text": '{"soft": "is"} {"placeholder": "text_a"} {"mask"}'}
    values["generate"] = {"max_new_tokens": 9, "min_new_tokens": 6}
    path = promptable("causal")
    file = write(tmp_path, values, train=asks(4), test=asks(6))
    assert bmkit("prompt", file, "-m", path, "-o", "p").returncode == 0
    drawn = ("-s", "temperature=2.0", "-s", "repetition_penalty=1.3", "--seed", "3", "--json")
    rows = [json.dumps(row) for row in asks(6)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n")
    said = told(bmkit("infer", "sample", "-m", "p", "-i", "in.jsonl", *drawn))
    assert all(len(row["token_ids"]) >= 6 for row in said)
    (tmp_path / "in.jsonl").write_text("\n".join([*rows[:2], "{}", *rows[3:]]) + "\n")
    done = bmkit("infer", "sample", "-m", "p", "-i", "in.jsonl", *drawn)
    assert done.returncode == 3
    others = [json.loads(line) for line in done.stdout.splitlines()]
    kept = [row for number, row in enumerate(said) if number != 2]
    assert [row["token_ids"] for row in others] == [row["token_ids"] for row in kept]


@pytest.mark.parametrize("trained", ["soft", "prefix"])
def test_soft_tokens_and_prefixes_say_the_same_when_they_are_loaded_again(
    bmkit: Run, promptable: Make, tmp_path: Path, trained: str
) -> None:
    values = {**GENERATION, "train": {"max_steps": 6, "learning_rate": 0.3}}
    if trained == "soft":
        values["template"] = {"text": '{"soft": "is near"} {"placeholder": "text_a"} {"mask"}'}
        values["tune"] = {"mode": "soft"}
    else:
        values["tune"] = {"mode": "delta", "deltas": [{"type": "prefix", "num_virtual_tokens": 3}]}
    path = promptable("causal")
    (made,) = told(
        bmkit(
            "prompt",
            write(tmp_path, values, train=asks(16), test=asks(9)),
            "-m",
            path,
            "-o",
            "p",
            "--json",
        )
    )
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    from bmkit.verbalizers import overlap

    wanted = overlap.measure([row["text"] for row in said], [[own["answer"]] for own in asks(9)])
    assert {name: made["metrics"][name] for name in wanted} == wanted
    plain = {**values, "tune": {"mode": "none"}, "learning_setting": {"type": "zero_shot"}}
    if trained == "soft":
        plain["template"] = {"text": 'is near {"placeholder": "text_a"} {"mask"}'}
    done = bmkit(
        "prompt", write(tmp_path, plain, train=asks(16), test=asks(9)), "-m", path, "-o", "q"
    )
    assert done.returncode == 0, done.stderr
    other = told(bmkit("infer", "-m", "q", "-i", "test.jsonl", "--json"))
    assert [row["token_ids"] for row in other] != [row["token_ids"] for row in said]


@pytest.mark.parametrize(
    ("change", "kind", "code", "said"),
    [
        ({}, "masked", 3, "a model that fills in masks says no texts"),
        (
            {"template": {"text": '{"mask"} {"placeholder": "text_a"}'}},
            "causal",
            2,
            "goes on behind",
        ),
        ({"data": {"columns": {"text_a": "question"}}}, "causal", 3, "it has no text as `target`"),
        ({"calibrate": {"type": "contextual"}}, "causal", 2, "no labels to calibrate"),
        (
            {"learning_setting": {"type": "few_shot", "num_examples_per_label": 2}},
            "causal",
            2,
            "total",
        ),
        ({"template": {"text": '{"mask"} {"mask"}'}}, "causal", 2, "it has 2 masks"),
    ],
)
def test_generation_that_does_not_fit_is_refused(
    bmkit: Run, promptable: Make, tmp_path: Path, change: Any, kind: str, code: int, said: str
) -> None:
    path = promptable(kind)
    file = write(tmp_path, {**GENERATION, **change}, train=asks(8), test=asks(4))
    done = bmkit("prompt", file, "-m", path, "-o", "p")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert said in done.stderr
