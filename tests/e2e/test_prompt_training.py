"""`bmkit prompt` that trains: soft tokens, deltas and verbalizers, on few rows and many seeds."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
FILLERS = ("film", "it", "so", "long", "one", "the", "was", "a")
SOFT = '{"soft": "It"} {"placeholder": "text_a"} {"soft": None, "duplicate": 2} {"mask"}'
PLAIN = '{"placeholder": "text_a"} It was {"mask"}'
WORDS = {"negative": ["bad"], "positive": ["good"]}
FAST = {"learning_rate": 0.02, "num_train_epochs": 20, "per_device_train_batch_size": 8}


SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def tokenizer(kind: str) -> Any:
    """A byte-level BPE tokenizer that knows the words here, with a mask as `kind` has it."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    mask = "<extra_id_0>" if kind == "t5" else "<mask>"
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[*SPECIAL.values(), AddedToken(mask, lstrip=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = (*FILLERS, "It", "terrible", "great", "bad", "good")
    bare.train_from_iterator([f"{one} {two}" for one in words for two in words], trainer)
    ends = {"masked": "<s> $A </s>", "t5": "$A </s>", "causal": "$A"}[kind]
    bare.post_processor = processors.TemplateProcessing(
        single=ends, special_tokens=[("</s>", 1), ("<s>", 2)]
    )
    given = SPECIAL | ({"mask_token": mask} if kind == "masked" else {})
    more = [mask] if kind == "t5" else []
    return PreTrainedTokenizerFast(tokenizer_object=bare, **given, extra_special_tokens=more)


def make(kind: str, path: Path) -> Path:
    """Write a random model of a kind, which can learn."""
    import torch
    import transformers

    torch.manual_seed(3)
    known = tokenizer(kind)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "vocab_size": len(known)}
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        config: Any = transformers.T5Config(**sizes, **ids, decoder_start_token_id=0)
        made: Any = transformers.T5ForConditionalGeneration
    else:
        wide = {"num_attention_heads": 4, "initializer_range": 0.5 if kind == "causal" else 0.2}
        built = "Llama" if kind == "causal" else "Bert"
        config = getattr(transformers, f"{built}Config")(**SIZES, **ids, **wide)
        name = {"causal": "LlamaForCausalLM", "masked": "BertForMaskedLM"}[kind]
        made = getattr(transformers, name)
    made(config).save_pretrained(path)
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


def written(folder: Path, template: str = SOFT, **more: Any) -> Path:
    """Write a recipe, JSON being YAML, and its rows beside it."""
    for name, count in (("train", 64), ("test", 40)):
        text = "".join(json.dumps(row) + "\n" for row in rows(count))
        (folder / f"{name}.jsonl").write_text(text)
    values: dict[str, Any] = {
        "kind": "prompt",
        "data": {
            "train": "train.jsonl",
            "test": "test.jsonl",
            "columns": {"text_a": "text", "label": "label"},
            "labels": list(WORDS),
        },
        "template": {"text": template},
        "verbalizer": {"label_words": WORDS},
        "tune": {"mode": "soft"},
        "learning_setting": {"type": "full"},
        "train": FAST,
        **more,
    }
    path = folder / f"recipe-{len(list(folder.glob('recipe-*')))}.yaml"
    path.write_text(json.dumps(values, indent=1))
    return path


def accuracy(said: list[dict[str, Any]]) -> float:
    right = [row["label"] == own["label"] for row, own in zip(said, rows(40), strict=True)]
    return sum(right) / len(right)


def told(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


TRAINED = {
    "masked": ({"type": "soft", "label_words": WORDS, "learning_rate": 0.1}, {"mode": "soft"}),
    "causal": ({"label_words": WORDS}, {"mode": "soft", "encoder": "mlp"}),
    "t5": (
        {"label_words": WORDS},
        {"mode": "delta", "deltas": [{"type": "lora"}], "learning_rate": 0.05},
    ),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_training_tells_labels_apart_and_the_artifact_says_the_same_in_another_process(
    bmkit: Run, fresh: Run, tmp_path: Path, kind: str
) -> None:
    path = make(kind, tmp_path / "asked")
    verbalizer, tune = TRAINED[kind]
    file = written(tmp_path, verbalizer=verbalizer, tune=tune)
    (before,) = told(
        bmkit(
            *("prompt", written(tmp_path, PLAIN, tune={}, learning_setting={}), "-m", path),
            *("-o", "b", "--json"),
        )
    )
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    metrics = made["metrics"]
    assert metrics["accuracy"] >= 0.8 > before["metrics"]["accuracy"] + 0.1
    assert metrics["trainable_parameters"] > 0
    said = told(fresh("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    assert accuracy(said) == metrics["accuracy"]
    again = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json", "-s", "batch_size=1"))
    for one, two in zip(said, again, strict=True):
        assert one["probabilities"] == pytest.approx(two["probabilities"], abs=2e-5)
    assert (tmp_path / "p" / "soft" / "soft_rows.safetensors").is_file()
    assert (tmp_path / "p" / "adapters").is_dir() == (kind == "t5")
    shown = bmkit("show", "p").stdout
    assert shown.count("now near") == 3


@pytest.mark.parametrize("verbalizer", ["manual", "soft"])
def test_an_artifact_says_what_transformers_and_peft_make_of_its_files(
    bmkit: Run, tmp_path: Path, verbalizer: str
) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = make("causal", tmp_path / "asked")
    file = written(
        tmp_path,
        verbalizer={"type": verbalizer, "label_words": WORDS},
        tune={"mode": "delta", "deltas": [{"type": "lora"}], "encoder": "lstm"},
        train={**FAST, "num_train_epochs": 2},
    )
    assert bmkit("prompt", file, "-m", path, "-o", "p").returncode == 0
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    known = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path)
    trained = load_file(tmp_path / "p" / "soft" / "soft_rows.safetensors")["rows"]
    model = PeftModel.from_pretrained(base, tmp_path / "p" / "adapters" / "lora").eval()
    for row, own in zip(said[:6], rows(40), strict=False):
        ids = known(f" {own['text']}", return_tensors="pt")["input_ids"]
        words = base.get_input_embeddings()(ids)[0]
        with torch.no_grad():
            given = torch.cat((trained[:1], words, trained[1:]))[None]
            found = model(inputs_embeds=given, output_hidden_states=True)
            if verbalizer == "soft":
                head = load_file(tmp_path / "p" / "verbalizer.safetensors")["head.weight"]
                wanted = (found.hidden_states[-1][0, -1] @ head.T).softmax(-1)
            else:
                at = [known(f" {w}")["input_ids"][0] for own in WORDS.values() for w in own]
                wanted = found.logits[0, -1][at].softmax(-1)
        assert list(row["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=2e-5)


def test_soft_tokens_that_nothing_trains_are_their_words(bmkit: Run, tmp_path: Path) -> None:
    path = make("causal", tmp_path / "asked")
    answers = []
    for out, template in (
        ("s", '{"placeholder": "text_a"} {"soft": "It was"} {"mask"}'),
        ("w", PLAIN),
    ):
        file = written(tmp_path, template, tune={}, learning_setting={})
        assert bmkit("prompt", file, "-m", path, "-o", out).returncode == 0
        answers.append(told(bmkit("infer", "-m", out, "-i", "test.jsonl", "--json")))
    for one, two in zip(*answers, strict=True):
        assert one["probabilities"] == pytest.approx(two["probabilities"], abs=1e-5)
    file = written(tmp_path, learning_setting={"type": "full"})
    (found,) = told(bmkit("prompt", file, "-m", path, "--examples", 1, "--json"))
    soft = [t["token"] for t in found["examples"][0]["tokens"] if t["role"] == "soft"]
    assert soft == ["<soft 0>", "<soft 1>", "<soft 2>"]
    file = written(tmp_path, tune={}, learning_setting={})
    done = bmkit("prompt", file, "-m", path, "-o", "x")
    assert done.returncode == 2
    assert "begin at random" in done.stderr


FEW = {"type": "few_shot", "num_examples_per_label": 4}


@pytest.mark.parametrize(
    "verbalizer",
    [
        {"type": "prototypical"},
        {"type": "automatic", "words_per_label": 2},
    ],
    ids=lambda v: v["type"],
)
def test_verbalizers_learn_from_a_few_rows_of_a_frozen_model(
    bmkit: Run, tmp_path: Path, verbalizer: dict[str, Any]
) -> None:
    path = make("causal", tmp_path / "asked")
    file = written(
        tmp_path,
        '{"placeholder": "text_a"} {"mask"}',
        verbalizer=verbalizer,
        tune={},
        learning_setting={"type": "full"},
    )
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    assert accuracy(said) == made["metrics"]["accuracy"] >= 0.6


def test_each_seed_has_a_draw_of_its_own_and_the_best_on_dev_is_kept(
    bmkit: Run, tmp_path: Path
) -> None:
    path = make("causal", tmp_path / "asked")
    few = {**FEW, "seeds": [1, 2, 3]}
    short = {**FAST, "num_train_epochs": 4}
    (made,) = told(
        bmkit(
            *("prompt", written(tmp_path, learning_setting=few, train=short), "-m", path),
            *("-o", "p", "--json"),
        )
    )
    alone = {}
    for seed in (1, 2, 3):
        file = written(tmp_path, learning_setting={**FEW, "seeds": [seed]}, train=short)
        (one,) = told(bmkit("prompt", file, "-m", path, "-o", f"p{seed}", "--json"))
        alone[seed] = one["metrics"]
    metrics = made["metrics"]
    values = [one["accuracy"] for one in alone.values()]
    assert len(set(values)) > 1, "all seeds are alike"
    assert metrics["accuracy"] == pytest.approx(statistics.mean(values), abs=1e-6)
    assert metrics["accuracy_sd"] == pytest.approx(statistics.stdev(values), abs=1e-6)
    kept = json.loads((tmp_path / "p" / "prompt.json").read_text())["seed"]
    assert alone[kept]["dev_accuracy"] == max(one["dev_accuracy"] for one in alone.values())
    said = told(bmkit("infer", "-m", "p", "-i", "test.jsonl", "--json"))
    assert accuracy(said) == alone[kept]["accuracy"]


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(
    bmkit: Run, tmp_path: Path, home: Path
) -> None:
    path = make("causal", tmp_path / "asked")
    few = {**FEW, "seeds": [1, 2]}
    train = {**FAST, "max_steps": 30, "save_steps": 5}
    file = written(tmp_path, learning_setting=few, train=train)
    process = subprocess.Popen(
        [sys.executable, "-m", "bmkit_cli", "prompt", str(file), "-m", str(path), "-o", "p"],
        cwd=tmp_path,
        env=dict(os.environ),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not list(tmp_path.rglob("seed-2/train/checkpoint-*/bmkit-whole")):
        assert process.poll() is None and time.monotonic() < end, "it never came to that"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "p").exists()
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    (whole,) = told(bmkit("prompt", file, "-m", path, "-o", "q", "--json", "-s", "seed=7"))
    assert made["metrics"] == whole["metrics"], "the recipe's seed says nothing where seeds do"
    said, wanted = (
        told(bmkit("infer", "-m", out, "-i", "test.jsonl", "--json")) for out in ("p", "q")
    )
    assert [row["probabilities"] for row in said] == [row["probabilities"] for row in wanted]


LORA: dict[str, Any] = {"mode": "delta", "deltas": [{"type": "lora", "r": 2}]}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"template": PLAIN}, "no soft tokens"),
        (
            {"template": PLAIN, "tune": {**LORA, "learning_rate": 0.3}},
            "tune.learning_rate is for them alone",
        ),
        ({"template": PLAIN, "tune": {**LORA, "encoder": "mlp"}}, "tune.encoder is for them"),
        (
            {"train": {"metric_for_best_model": "dev_idle_f1"}},
            "has dev_loss, dev_accuracy, dev_f1",
        ),
        ({"learning_setting": {**FEW, "num_examples_per_label": 40}}, "too few rows"),
        ({"learning_setting": {"type": "zero_shot"}}, "take few_shot or full"),
        ({"tune": {"mode": "delta"}}, "takes one at least"),
        ({"verbalizer": {"type": "soft", "label_words": WORDS}, "tune": {}}, "is trained"),
        ({"learning_setting": {**FEW, "seeds": [1, 1]}}, "one comes twice"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    bmkit: Run, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    path = make("causal", tmp_path / "asked")
    done = bmkit("prompt", written(tmp_path, **more), "-m", path, "-o", "p")
    assert done.returncode in (2, 3), done.stderr
    assert said in done.stderr
    assert not (tmp_path / "p").exists()
