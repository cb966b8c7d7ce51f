"""`bmkit prompt` that searches: templates, given and written, and label words, on few rows."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
FILLERS = ("film", "it", "so", "long", "one", "the", "was", "a")
WORDS = {"negative": ["bad"], "positive": ["good"]}
PLAIN = '{"placeholder": "text_a"} It was {"mask"}'
SHORT = '{"placeholder": "text_a"} {"mask"}'
SPECIAL = {
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "bos_token": "<s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
SENTINELS = ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
FEW = {"type": "few_shot", "num_examples_per_label": 4}


@cache
def tokenizer() -> Any:
    """A byte-level BPE tokenizer that knows the words here, with a mask and sentinels."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    special = [AddedToken(t, lstrip=t == "<mask>") for t in (*SPECIAL.values(), *SENTINELS)]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = (*FILLERS, "It", "terrible", "great", "bad", "good")
    bare.train_from_iterator([f"{one} {two}" for one in words for two in words], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bare, **SPECIAL, extra_special_tokens=SENTINELS)


def make(kind: str, path: Path, write: str | None = None) -> Path:
    """Write a random model of a kind; a T5 learns to `write` into gaps, a gap's text each."""
    import torch
    import transformers

    torch.manual_seed(3)
    known = tokenizer()
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "vocab_size": len(known)}
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        model: Any = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, **ids, decoder_start_token_id=0)  # type: ignore[arg-type]
        )
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        wide = {"num_attention_heads": 4, "initializer_range": 0.5}
        built, head = {"causal": ("Llama", "CausalLM"), "masked": ("Bert", "MaskedLM")}[kind]
        config = getattr(transformers, f"{built}Config")(**sizes, **ids, **wide)
        model = getattr(transformers, f"{built}For{head}")(config)
    if write is not None:
        inputs = known("so long<extra_id_0> bad<extra_id_1>", return_tensors="pt")
        labels = known(write, return_tensors="pt").input_ids
        steps = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(40):
            steps.zero_grad()
            model(input_ids=inputs.input_ids, labels=labels).loss.backward()
            steps.step()
    model.save_pretrained(path)
    known.save_pretrained(path)
    return path


def rows(count: int) -> list[dict[str, str]]:
    """Texts of four words, of which the last one tells the label."""
    draw = random.Random(count)
    found = []
    for number in range(count):
        words = [draw.choice(FILLERS) for _ in range(3)]
        words.append(("terrible", "great")[number % 2])
        found.append({"text": " ".join(words), "label": ("negative", "positive")[number % 2]})
    return found


def written(folder: Path, search: Any, **more: Any) -> Path:
    """Write a recipe, JSON being YAML, and its rows beside it; what is None is left out."""
    for name, count in (("train", 40), ("dev", 24), ("test", 30)):
        text = "".join(json.dumps(row) + "\n" for row in rows(count))
        (folder / f"{name}.jsonl").write_text(text)
    data = {
        **{name: f"{name}.jsonl" for name in ("train", "dev", "test")},
        "columns": {"text_a": "text", "label": "label"},
        "labels": list(WORDS),
        **more.pop("data", {}),
    }
    values: dict[str, Any] = {
        "kind": "prompt",
        "data": {key: value for key, value in data.items() if value is not None},
        "template": {"text": PLAIN},
        "verbalizer": {"label_words": WORDS},
        "search": search,
        "learning_setting": {"type": "full"},
        **more,
    }
    values = {key: value for key, value in values.items() if value is not None}
    path = folder / f"recipe-{len(list(folder.glob('recipe-*')))}.yaml"
    path.write_text(json.dumps(values, indent=1))
    return path


def told(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def tried(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "search.json").read_text())
    return found


GIVEN = {
    "templates": [SHORT],
    "label_words": {"negative": [["bad", "so"]], "positive": ["long"]},
    "num_candidates": 0,
}


@pytest.mark.parametrize(
    ("kind", "calibrate"), [("masked", "content_free"), ("causal", "contextual"), ("t5", "none")]
)
def test_the_best_pair_is_the_one_that_asking_each_pair_anew_finds(
    bmkit: Run, fresh: Run, tmp_path: Path, kind: str, calibrate: str
) -> None:
    path = make(kind, tmp_path / "asked")
    how = {"calibrate": {"type": calibrate, "num_examples": 8}}
    (made,) = told(
        bmkit("prompt", written(tmp_path, GIVEN, **how), "-m", path, "-o", "p", "--json")
    )
    negative = [["bad"], ["bad", "so"]]
    positive = [["good"], ["long"]]
    pairs = list(itertools.product((PLAIN, SHORT), negative, positive))
    assert made["metrics"]["templates"] == 2
    assert made["metrics"]["combinations"] == len(pairs) == 8
    accuracies = {}
    for number, (template, *words) in enumerate(pairs):
        label_words = dict(zip(WORDS, words, strict=True))
        file = written(
            tmp_path,
            None,
            template={"text": template},
            verbalizer={"label_words": label_words},
            learning_setting=None,
            **how,
        )
        (one,) = told(bmkit("prompt", file, "-m", path, "-o", f"a{number}", "--json"))
        key = (template, *(" ".join(own) for own in words))
        accuracies[key] = (one["metrics"]["dev_accuracy"], one["metrics"]["accuracy"])
    found = tried(tmp_path / "p")
    assert [one["text"] for one in found["templates"]] == [PLAIN, SHORT]
    assert len(found["pairs"]) == 8
    for pair in found["pairs"]:
        words = [" ".join(w.strip() for w in own) for own in pair["label_words"].values()]
        key = ((PLAIN, SHORT)[pair["template"]], *words)
        assert pair["held_out"]["accuracy"] == pytest.approx(accuracies[key][0], abs=1e-6)
    assert found["chosen"] == found["pairs"][0]
    assert found["held_out"] == "dev"
    metrics = made["metrics"]
    assert metrics["dev_accuracy"] == max(dev for dev, _ in accuracies.values())
    words = [" ".join(w.strip() for w in own) for own in found["chosen"]["label_words"].values()]
    key = ((PLAIN, SHORT)[found["chosen"]["template"]], *words)
    assert metrics["accuracy"] == accuracies[key][1]
    said = told(fresh("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    right = [row["label"] == own["label"] for row, own in zip(said, rows(30), strict=True)]
    assert sum(right) / 30 == pytest.approx(metrics["accuracy"], abs=1e-6)
    kept = json.loads((tmp_path / "p" / "prompt.json").read_text())
    assert kept["template"] == {"text": key[0]}


def test_the_likeliest_words_of_labels_tell_more_than_those_that_were_given(
    bmkit: Run, tmp_path: Path
) -> None:
    path = make("causal", tmp_path / "asked")
    (before,) = told(
        bmkit(
            *("prompt", written(tmp_path, None, learning_setting=None), "-m", path),
            *("-o", "b", "--json"),
        )
    )
    file = written(tmp_path, {"templates": [SHORT], "num_candidates": 40})
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    assert made["metrics"]["dev_accuracy"] > before["metrics"]["dev_accuracy"] + 0.1
    shown = bmkit("show", "p").stdout
    assert "1: template" in shown
    assert "on train" in shown
    (again,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    assert again["reused"]
    (twice,) = told(bmkit("prompt", file, "-m", path, "-o", "q", "--json", "--force"))
    assert twice["digest"] == made["digest"]


def test_without_dev_parts_of_train_are_held_out(bmkit: Run, tmp_path: Path) -> None:
    path = make("causal", tmp_path / "asked")
    search = {"templates": [SHORT], "num_candidates": 40, "folds": 3}
    file = written(tmp_path, search, data={"dev": None})
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    found = tried(tmp_path / "p")
    assert found["held_out"] == "parts of train"
    assert "dev_accuracy" not in made["metrics"]
    by_template = {pair["template"]: pair["held_out"] for pair in found["pairs"]}
    assert all(pair["held_out"] == by_template[pair["template"]] for pair in found["pairs"])
    held = [one["accuracy"] for one in by_template.values()]
    assert found["chosen"]["held_out"]["accuracy"] == max(held)
    own = [p for p in found["pairs"] if p["template"] == found["chosen"]["template"]]
    assert found["chosen"]["train"]["accuracy"] == max(p["train"]["accuracy"] for p in own)
    assert "held out" in bmkit("show", "p").stdout


def test_all_lines_of_a_file_are_tried_and_shown(bmkit: Run, tmp_path: Path) -> None:
    path = make("masked", tmp_path / "asked")
    (tmp_path / "templates.txt").write_text(f"{PLAIN}\n\n{SHORT}\n{PLAIN}\n")
    template = {"file_path": "templates.txt", "choice": "all"}
    file = written(tmp_path, {"num_candidates": 5}, template=template)
    (found,) = told(bmkit("prompt", file, "-m", path, "--examples", 2, "--json"))
    assert [one["template"] for one in found["examples"]] == [0, 0, 1, 1]
    assert "template 1  " in bmkit("prompt", file, "-m", path, "--examples", 1).stdout
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    assert made["metrics"]["templates"] == 2
    file = written(tmp_path, None, template=template, learning_setting=None)
    done = bmkit("prompt", file, "-m", path, "-o", "x")
    assert done.returncode == 2
    assert "takes a `search`" in done.stderr


@pytest.mark.parametrize(
    ("kind", "text", "template"),
    [
        ("causal", "<extra_id_0> It was<extra_id_1>", PLAIN),
        ("masked", "<extra_id_0> so<extra_id_1> film<extra_id_2>", None),
    ],
)
def test_a_model_with_sentinels_writes_templates_from_the_rows(
    bmkit: Run, tmp_path: Path, kind: str, text: str, template: str | None
) -> None:
    path = make(kind, tmp_path / "asked")
    make("t5", tmp_path / "writer", text)
    search = {"model": "writer", "beam_width": 4, "num_templates": 3, "num_candidates": 5}
    file = written(tmp_path, search, template={"text": SHORT}, learning_setting=FEW)
    (plan,) = told(bmkit("prompt", file, "-m", path, "--plan", "--json"))
    assert "write 3 templates with writer" in plan["steps"][0]
    assert {"model", "search.model"} <= set(plan["inputs"])
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    found = tried(tmp_path / "p")["templates"]
    own = [one for one in found if one["source"] == "written"]
    assert 1 <= len(own) <= 3
    assert made["metrics"]["templates"] == len(found) == len(own) + 1
    likely = [one["loglikelihood"] for one in own]
    assert likely == sorted(likely, reverse=True)
    both = [
        '{"placeholder": "text_a"} so {"mask"} film',
        'so {"mask"} film {"placeholder": "text_a"}',
    ]
    assert own[0]["text"] in ([template] if template else both)
    make("t5", tmp_path / "writer2", "<extra_id_0> long<extra_id_1>")
    done = bmkit("prompt", file, "-m", path, "-s", "search.model=writer2", "-o", "p")
    assert done.returncode == 3, "another model's templates aren't these"
    (same,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    assert same["reused"]


def test_several_pairs_are_trained_and_the_best_on_dev_is_kept(bmkit: Run, tmp_path: Path) -> None:
    path = make("causal", tmp_path / "asked")
    search = {**GIVEN, "num_trained": 3}
    lora = {"mode": "delta", "deltas": [{"type": "lora", "target_modules": "all-linear"}]}
    train = {"learning_rate": 0.01, "max_steps": 4}
    file = written(tmp_path, search, tune=lora, learning_setting=FEW, train=train)
    done = bmkit("prompt", file, "-m", path, "-o", "p", "--json")
    (made,) = told(done)
    assert "pair 3 of 3" in done.stderr
    found = tried(tmp_path / "p")
    alone = []
    turns = [
        next(p for p in found["pairs"] if p["template"] == number)
        for number in dict.fromkeys(p["template"] for p in found["pairs"])
    ]
    assert len(turns) == 2
    for number, pair in enumerate(turns):
        words = {k: [w.strip() for w in own] for k, own in pair["label_words"].items()}
        one = written(
            tmp_path,
            None,
            template={"text": (PLAIN, SHORT)[pair["template"]]},
            verbalizer={"label_words": words},
            tune=lora,
            learning_setting=FEW,
            train=train,
        )
        (other,) = told(bmkit("prompt", one, "-m", path, "-o", f"o{number}", "--json"))
        alone.append(other["metrics"]["dev_accuracy"])
    assert made["metrics"]["dev_accuracy"] >= max(alone)
    assert made["metrics"]["trainable_parameters"] > 0
    assert (tmp_path / "p" / "adapters" / "lora").is_dir()


def test_a_killed_search_goes_on_with_what_was_written_and_trained(
    fresh: Run, tmp_path: Path
) -> None:
    path = make("causal", tmp_path / "asked")
    make("t5", tmp_path / "writer", "<extra_id_0> It was<extra_id_1>")
    search = {"model": "writer", "beam_width": 3, "num_candidates": 3, "num_trained": 2}
    file = written(
        tmp_path,
        search,
        template={"text": SHORT},
        tune={"mode": "delta", "deltas": [{"type": "lora", "target_modules": "all-linear"}]},
        learning_setting=FEW,
        train={"max_steps": 60, "save_steps": 10},
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "bmkit_cli", "prompt", str(file), "-m", str(path), "-o", "p"],
        cwd=tmp_path,
        env=dict(os.environ),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 240
    while not list(tmp_path.rglob("pair-1/train/checkpoint-*/bmkit-whole")):
        assert process.poll() is None and time.monotonic() < end, "it never came to that"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()  # what was at work is to go on in a process of its kind, by the same products
    assert not (tmp_path / "p").exists()
    done = fresh("prompt", file, "-m", path, "-o", "p", "--json")
    (made,) = told(done)
    assert "write templates" not in done.stderr
    done = fresh("prompt", file, "-m", path, "-o", "q", "--json")
    (whole,) = told(done)
    assert "write templates" in done.stderr
    assert not whole["reused"]
    assert made["metrics"] == whole["metrics"]
    assert made["digest"] == whole["digest"]


@pytest.mark.parametrize(
    ("search", "more", "code", "said"),
    [
        ({}, {"data": {"train": None}}, 2, "no rows to learn from"),
        ({}, {"learning_setting": None}, 2, "`search` learns from rows"),
        ({"num_candidates": 0}, {}, 2, "nothing to choose from"),
        ({"templates": ["It was"]}, {}, 2, "no {"),
        ({"templates": ['{"soft": "It"} {"mask"}']}, {}, 2, "soft tokens"),
        ({"label_words": {"glad": ["so"]}}, {}, 2, "`glad` is none of the labels"),
        (
            {"label_words": {"glad": "so"}},
            {"data": {"labels": None}, "verbalizer": {"label_words": ["bad", "good"]}},
            2,
            "`glad` is none of the labels",
        ),
        ({"label_words": {"negative": [[]]}}, {}, 2, "an empty candidate"),
        ({"forms": ['{"special": "<extra_id_0>"} {"mask"}']}, {}, 2, "without `model`"),
        ({"model": "asked"}, {}, 3, "no seq2seq model"),
        ({"model": "asked", "forms": ['{"mask"}']}, {}, 2, "its gaps are none"),
        ({"num_trained": 2}, {}, 2, "nothing is trained"),
        ({}, {"verbalizer": {"type": "automatic"}}, 2, "finds its own"),
        (
            {},
            {"verbalizer": {"label_words": WORDS, "multi_token_handler": "likelihood"}},
            2,
            "asks once",
        ),
        (
            {"label_words": {"negative": ["so long"]}},
            {"verbalizer": {"type": "one_to_one", "label_words": WORDS}},
            3,
            "`so long`, of `negative`, is 2 tokens",
        ),
        (
            {},
            {
                "data": {"labels": ["negative", "positive", "odd"]},
                "verbalizer": {"label_words": {**WORDS, "odd": "so"}},
            },
            3,
            "no row of `odd`",
        ),
        (
            {},
            {
                "data": {"dev": None},
                "learning_setting": {"type": "full"},
                "rows": '{"text": "a", "label": "negative"}\n{"text": "b", "label": "positive"}\n',
            },
            3,
            "takes two rows",
        ),
        (
            {"model": "writer", "max_new_tokens": 1},
            {},
            3,
            "wrote no template",
        ),
        ({"model": "bart"}, {}, 3, "has no <extra_id_0>"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_searched_is_refused(
    bmkit: Run,
    tmp_path: Path,
    nothing_left: Callable[[], None],
    search: dict[str, Any],
    more: dict[str, Any],
    code: int,
    said: str,
) -> None:
    path = make("causal", tmp_path / "asked")
    if search.get("model") == "writer":
        make("t5", tmp_path / "writer", "<extra_id_0> so long<extra_id_1>")
    if search.get("model") == "bart":
        without_sentinels(tmp_path / "bart")
    text = more.get("rows")
    file = written(tmp_path, search, **{k: v for k, v in more.items() if k != "rows"})
    if text is not None:
        (tmp_path / "train.jsonl").write_text(text)
    done = bmkit("prompt", file, "-m", path, "-o", "p")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert said in done.stderr
    assert not (tmp_path / "p").exists()
    nothing_left()


def without_sentinels(path: Path) -> None:
    """Write a T5 whose tokenizer has none."""
    make("t5", path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (path / file).read_text()
        (path / file).write_text(text.replace("<extra_id_", "<other_"))
