"""`bmkit prompt` with several masks: PTR, texts of each row's own, relations and tags."""

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
KINDS = ("masked", "causal", "t5")
SENTINELS = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")


@pytest.fixture(params=KINDS)
def asked(request: pytest.FixtureRequest, promptable: Callable[[str], Path]) -> tuple[str, Path]:
    """A kind of model, and a random one of it."""
    return request.param, promptable(request.param)


def write(folder: Path, name: str, values: dict[str, Any], **files: list[Any]) -> Path:
    """Write a recipe, JSON being YAML, and its rows beside it."""
    for split, rows in files.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values.setdefault("data", {})[split] = f"{split}.jsonl"
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"kind": "prompt", **values}, indent=1))
    return path


def told(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


PTR = '{"placeholder": "text"} the {"mask"} {"meta": "head"} {"mask"} the {"mask"} {"meta": "tail"}'
RULES = {
    "parent": ["person", "parent", "person"],
    "child": ["person", "child", "person"],
    "lives": ["person", "lives", "city"],
    "none": ["person", "nothing", "place"],
}
PAIRS = [
    {"text": "Ann near Bob .", "head": "Ann", "tail": "Bob", "label": "parent"},
    {"text": "Bob visits Rome .", "head": "Bob", "tail": "Rome", "label": "none"},
    {"text": "it was Oslo , x", "head": "x", "tail": "Oslo", "label": "lives"},
]
RELATION: dict[str, Any] = {
    "task": "relation",
    "data": {"labels": list(RULES), "none": "none"},
    "template": {"text": PTR},
    "verbalizer": {"type": "ptr", "label_words": RULES},
}


def relation(**more: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(RELATION)), **more}


def directly(path: Path, kind: str, row: dict[str, str]) -> list[float]:
    """Return the probabilities of labels, by transformers alone."""
    import transformers

    known = transformers.AutoTokenizer.from_pretrained(path)
    masks = {"masked": ["<mask>"] * 3, "t5": [f"<extra_id_{n}>" for n in range(3)]}.get(kind)
    texts = {}
    for label, words in RULES.items():
        a, b, c = masks or words
        texts[label] = f"{row['text']} the {a} {row['head']} {b} the {c} {row['tail']}"
    made = {"masked": "AutoModelForMaskedLM", "causal": "AutoModelForCausalLM"}
    name = made.get(kind, "AutoModelForSeq2SeqLM")
    model = getattr(transformers, name).from_pretrained(path).eval()
    found = []
    for label, words in RULES.items():
        ids = known(texts[label], return_tensors="pt")["input_ids"]
        own = known.convert_tokens_to_ids(words)
        with torch.no_grad():
            if kind == "masked":
                said = model(ids).logits[0].log_softmax(-1)
                places = (ids[0] == known.mask_token_id).nonzero()[:, 0].tolist()
                found.append(sum(float(said[p, t]) for p, t in zip(places, own, strict=True)))
            elif kind == "causal":
                first = len(row["text"].split()) + 1
                said = model(ids).logits[0].log_softmax(-1)
                rest = range(first, ids.shape[1])
                found.append(sum(float(said[at - 1, ids[0, at]]) for at in rest))
            else:
                zero, one, two = known.convert_tokens_to_ids(list(SENTINELS))
                answer = [own[0], one, own[1], two, own[2]]
                decoder = torch.tensor([[0, zero, *answer]])
                said = model(ids, decoder_input_ids=decoder).logits[0].log_softmax(-1)
                found.append(sum(float(said[at, t]) for at, t in enumerate(answer, 1)))
    return torch.tensor(found).softmax(-1).tolist()


def test_relations_are_told_as_by_transformers_alone(
    bmkit: Run, asked: tuple[str, Path], tmp_path: Path
) -> None:
    kind, path = asked
    file = write(tmp_path, "r", relation(), test=PAIRS)
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    for row, own in zip(said, PAIRS, strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(
            directly(path, kind, own), abs=2e-5
        )
    right = [a["label"] == b["label"] for a, b in zip(said, PAIRS, strict=True)]
    assert made["metrics"]["accuracy"] == pytest.approx(sum(right) / 3, abs=1e-6)
    pairs = [(a["label"], b["label"]) for a, b in zip(said, PAIRS, strict=True)]
    hits = sum(a == b != "none" for a, b in pairs)
    guessed, there = sum(a != "none" for a, _ in pairs), sum(b != "none" for _, b in pairs)
    assert made["metrics"]["micro_f1"] == pytest.approx(2 * hits / (guessed + there), abs=1e-6)
    assert "person" in bmkit("show", "p").stdout


def test_calibrated_labels_come_back_from_the_artifact(
    bmkit: Run, asked: tuple[str, Path], tmp_path: Path
) -> None:
    kind, path = asked
    file = write(tmp_path, "r", relation(calibrate={"type": "contextual"}), test=PAIRS)
    assert bmkit("prompt", file, "-m", path, "-o", "p").returncode == 0
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    plain = torch.tensor([directly(path, kind, row) for row in PAIRS])
    wanted = plain / plain.mean(0)
    wanted = wanted / wanted.sum(1, keepdim=True)
    for row, own in zip(said, wanted.tolist(), strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(own, abs=1e-4)
    assert "in all" in bmkit("show", "p").stdout


def many(count: int) -> list[dict[str, str]]:
    """Rows whose label can be seen in their text."""
    draw = random.Random(count)
    words = {"parent": "born", "child": "is", "lives": "near", "none": "visits"}
    found = []
    for at in range(count):
        label = list(words)[at % 4]
        head, tail = draw.choice(["Ann", "Bob"]), draw.choice(["Rome", "Oslo"])
        text = f"{draw.choice(['it', 'x'])} {head} {words[label]} {tail} ."
        found.append({"text": text, "head": head, "tail": tail, "label": label})
    return found


def test_rules_are_trained_on_rows(bmkit: Run, asked: tuple[str, Path], tmp_path: Path) -> None:
    _, path = asked
    values = relation(
        tune={"mode": "delta", "deltas": [{"type": "lora"}]},
        learning_setting={"type": "full"},
        train={"num_train_epochs": 12, "learning_rate": 0.02, "per_device_train_batch_size": 8},
    )
    file = write(tmp_path, "r", values, train=many(48), test=many(24))
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    assert made["metrics"]["accuracy"] > 0.9, made["metrics"]
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    right = [a["label"] == b["label"] for a, b in zip(said, many(24), strict=True)]
    assert made["metrics"]["accuracy"] == pytest.approx(sum(right) / 24, abs=1e-6)


COPA = [
    {"text": "Ann is near", "yes": "the city", "no": "it was x", "label": "yes"},
    {"text": "Bob was", "yes": "born in Rome", "no": "Oslo", "label": "no"},
]


def test_texts_of_a_row_are_its_labels(bmkit: Run, asked: tuple[str, Path], tmp_path: Path) -> None:
    import transformers

    kind, path = asked
    words = {"yes": '{"meta": "yes"} .', "no": '{"meta": "no"} .'}
    values = {
        "data": {"labels": ["yes", "no"]},
        "template": {"text": '{"placeholder": "text"} {"mask"}'},
        "verbalizer": {"type": "generation", "label_words": words, "combine": "mean"},
    }
    file = write(tmp_path, "r", values, test=COPA)
    done = bmkit("prompt", file, "-m", path, "-o", "p")
    assert done.returncode == 0, done.stderr
    assert '{"meta": "yes"} .' in bmkit("show", "p").stdout
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    if kind != "causal":
        return
    known = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    for row, own in zip(said, COPA, strict=True):
        found = []
        for label in ("yes", "no"):
            before = known(own["text"])["input_ids"]
            ids = known(f"{own['text']} {own[label]} .", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logprobs = model(ids).logits[0].log_softmax(-1)
            rest = range(len(before), ids.shape[1])
            found.append(sum(float(logprobs[at - 1, ids[0, at]]) for at in rest) / len(rest))
        wanted = torch.tensor(found).softmax(-1).tolist()
        assert list(row["probabilities"].values()) == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize(
    ("key", "value", "code", "said"),
    [
        ("verbalizer.label_words.child", ["person", "child"], 2, "`child` has 2"),
        ("template.text", '{"meta": "head"} {"meta": "tail"} {"mask"}', 2, "the template 1 masks"),
        ("template.text", '{"mask"} {"mask"} {"mask"}', 2, "two entities"),
        ("template.text", PTR.replace("head", "heda"), 2, "two entities"),
        ("verbalizer.type", "manual", 2, "take verbalizer.type: ptr"),
        ("data.columns", {"tail": "object"}, 3, "test.jsonl:1: it has no column `object`"),
        ("task", "multilabel", 2, "one label a row"),
        ("data.none", "nothing", 2, "none of the labels"),
    ],
)
def test_rules_that_do_not_fit_are_refused(
    bmkit: Run,
    tmp_path: Path,
    promptable: Callable[[str], Path],
    key: str,
    value: Any,
    code: int,
    said: str,
) -> None:
    path = promptable("causal")
    values = relation()
    part = values
    *above, last = key.split(".")
    for name in above:
        part = part[name]
    part[last] = value
    if key == "task":
        values["data"].pop("none")
    done = bmkit("prompt", write(tmp_path, "r", values, test=PAIRS), "-m", path, "-o", "p")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert said in done.stderr


def test_a_row_without_an_entity_is_named(
    bmkit: Run, tmp_path: Path, promptable: Callable[[str], Path]
) -> None:
    path = promptable("causal")
    bad = [*PAIRS, {k: v for k, v in PAIRS[0].items() if k != "tail"}]
    done = bmkit("prompt", write(tmp_path, "r", relation(), test=bad), "-m", path, "-o", "p")
    assert (done.returncode, done.stdout) == (3, "")
    assert "test.jsonl:4" in done.stderr
    assert "`tail`" in done.stderr


def tagged(count: int) -> list[dict[str, Any]]:
    """Rows of words, of which names are persons or cities."""
    draw = random.Random(count)
    kinds = {"Ann": "PER", "Bob": "PER", "Rome": "LOC", "Oslo": "LOC"}
    found = []
    for at in range(count):
        words = [draw.choice(["Ann", "Rome", "x", "near", "of"]) for _ in range(4)]
        words.insert(at % 4, draw.choice(list(kinds)))
        tags = [f"B-{kinds[word]}" if word in kinds else "O" for word in words]
        found.append({"words": words, "ner": tags})
    return found


TAGGING: dict[str, Any] = {
    "task": "tagging",
    "data": {
        "columns": {"tokens": "words", "tags": "ner"},
        "labels": {"PER": "person", "LOC": "city", "O": "nothing"},
        "none": "nothing",
    },
    "template": {"text": '{"placeholder": "text_a"} , {"meta": "span"} is the {"mask"}'},
    "verbalizer": {
        "type": "manual",
        "label_words": {"person": "person", "city": "city", "nothing": "nothing"},
    },
    "tagging": {"max_words": 2, "negatives": 20},
    "tune": {"mode": "delta", "deltas": [{"type": "lora"}]},
    "learning_setting": {"type": "full"},
    "train": {"num_train_epochs": 4, "learning_rate": 0.01, "per_device_train_batch_size": 8},
}


@pytest.mark.parametrize("unit", ["spans", "tokens"])
def test_tags_are_learned_told_and_measured(
    bmkit: Run, asked: tuple[str, Path], tmp_path: Path, unit: str
) -> None:
    kind, path = asked
    values = json.loads(json.dumps(TAGGING))
    values["tagging"]["unit"] = unit
    values["train"]["num_train_epochs"] = 10 if kind == "causal" else 2
    file = write(tmp_path, "r", values, train=tagged(24), test=tagged(10))
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    assert kind != "causal" or made["metrics"]["accuracy"] > 0.9, made["metrics"]
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    names = values["data"]["labels"]
    hits = guessed = there = 0
    for row, own in zip(said, tagged(10), strict=True):
        assert row["tokens"] == own["words"]
        found = {(s["start"], s["end"], s["label"]) for s in row["spans"]}
        tags = enumerate(own["ner"])
        wanted = {(at, at + 1, names[tag[2:]]) for at, tag in tags if tag != "O"}
        hits, guessed, there = hits + len(found & wanted), guessed + len(found), there + len(wanted)
        assert all(0 < span["probability"] <= 1 for span in row["spans"])
    assert made["metrics"]["micro_f1"] == pytest.approx(2 * hits / (guessed + there), abs=1e-6)
    right = [
        a == names.get(b[2:], "nothing")
        for row, own in zip(said, tagged(10), strict=True)
        for a, b in zip(row["tags"], own["ner"], strict=True)
    ]
    assert made["metrics"]["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-6)
    (one,) = told(bmkit("infer", "-m", "p", "-p", "Ann near Rome", "--json"))
    assert one["tokens"] == ["Ann", "near", "Rome"]


def test_a_row_whose_tags_do_not_fit_is_named(
    bmkit: Run, tmp_path: Path, promptable: Callable[[str], Path]
) -> None:
    path = promptable("causal")
    bad = [*tagged(2), {"words": ["x", "of"], "ner": ["O"]}]
    file = write(tmp_path, "r", json.loads(json.dumps(TAGGING)), train=bad, test=tagged(2))
    done = bmkit("prompt", file, "-m", path, "-o", "p")
    assert (done.returncode, done.stdout) == (3, "")
    assert "train.jsonl:3: it has 2 tokens and 1 tags" in done.stderr


def test_how_much_words_count_is_learned_and_kept(
    bmkit: Run, asked: tuple[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    _, path = asked
    labels = {"near": ["person", "lives", "born"], "far": ["city", "nothing"]}
    rows = [{**row, "label": ("near", "far")[at % 2]} for at, row in enumerate(many(32))]
    values = {
        "data": {"labels": list(labels)},
        "template": {"text": '{"placeholder": "text"} it is {"mask"}'},
        "verbalizer": {
            "type": "knowledgeable",
            "label_words": labels,
            "candidate_frac": 0,
            "relevance": 0,
            "word_weights": True,
            "learning_rate": 0.3,
        },
        "calibrate": {"type": "contextual"},
        "tune": {"mode": "soft"},
        "learning_setting": {"type": "full"},
        "train": {"num_train_epochs": 4, "load_best_model_at_end": True},
    }
    file = write(tmp_path, "r", values, train=rows, test=rows, dev=rows)
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    assert made["metrics"]["trainable_parameters"] == 2 * 3
    assert made["metrics"]["train_loss"] < 10
    weights = load_file(tmp_path / "p" / "verbalizer.safetensors")["word_weights"]
    assert float(weights.abs().max()) > 0.1
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    right = [a["label"] == b["label"] for a, b in zip(said, rows, strict=True)]
    assert made["metrics"]["accuracy"] == pytest.approx(sum(right) / 32, abs=1e-6)
    none = bmkit("prompt", file, "-m", path, "-o", "q", "-s", "tune.mode=none")
    assert (none.returncode, none.stdout) == (2, "")
    assert "take tune.mode soft or delta" in none.stderr
