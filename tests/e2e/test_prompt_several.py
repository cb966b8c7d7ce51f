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
VOCABULARY = (
    *("person", "city", "place", "parent", "child", "lives", "born", "of", "in", "nothing", "the"),
    *("Ann", "Bob", "Rome", "Oslo", "visits", "near", "is", "was", "it", "x", ",", "."),
)
SPECIAL = ("<pad>", "</s>", "<s>", "<unk>", "<mask>", "<extra_id_0>", "<extra_id_1>")
SPECIAL = (*SPECIAL, "<extra_id_2>")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def tokenizer(kind: str) -> Any:
    """A tokenizer with one token for each word of VOCABULARY."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*SPECIAL, *VOCABULARY))}
    bare = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"masked": "<s> $A </s>", "t5": "$A </s>", "causal": "$A"}[kind]
    bare.post_processor = processors.TemplateProcessing(
        single=ends, special_tokens=[("</s>", 1), ("<s>", 2)]
    )
    given = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    given |= {"mask_token": "<mask>"} if kind == "masked" else {}
    more = list(SPECIAL[5:]) if kind == "t5" else []
    return PreTrainedTokenizerFast(tokenizer_object=bare, **given, extra_special_tokens=more)


def make(kind: str, path: Path) -> Path:
    """Write a random model of a kind, which can learn."""
    import transformers

    torch.manual_seed(3)
    known = tokenizer(kind)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "vocab_size": len(known)}
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        config: Any = transformers.T5Config(**sizes, **ids, decoder_start_token_id=0)
        made: Any = transformers.T5ForConditionalGeneration
    else:
        wide = {"num_attention_heads": 4, "initializer_range": 0.3}
        built = "Llama" if kind == "causal" else "Bert"
        config = getattr(transformers, f"{built}Config")(**SIZES, **ids, **wide)
        made = getattr(transformers, f"{built}For{'CausalLM' if kind == 'causal' else 'MaskedLM'}")
    made(config).save_pretrained(path)
    known.save_pretrained(path)
    return path


@pytest.fixture(params=KINDS)
def asked(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A kind of model, and a random one of it: `tmp_path/asked`."""
    return request.param, make(request.param, tmp_path / "asked")


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
                zero, one, two = known.convert_tokens_to_ids(SPECIAL[5:])
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


def test_texts_of_a_row_are_its_labels(
    bmkit: Run, asked: tuple[str, Path], tmp_path: Path
) -> None:
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
    bmkit: Run, tmp_path: Path, key: str, value: Any, code: int, said: str
) -> None:
    path = make("causal", tmp_path / "asked")
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


def test_a_row_without_an_entity_is_named(bmkit: Run, tmp_path: Path) -> None:
    path = make("causal", tmp_path / "asked")
    bad = [*PAIRS, {k: v for k, v in PAIRS[0].items() if k != "tail"}]
    done = bmkit("prompt", write(tmp_path, "r", relation(), test=bad), "-m", path, "-o", "p")
    assert (done.returncode, done.stdout) == (3, "")
    assert "test.jsonl:4" in done.stderr
    assert "`tail`" in done.stderr
