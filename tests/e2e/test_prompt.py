"""`bmkit prompt`: labels by a template, on every kind of model, and what `infer` makes of it."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., subprocess.CompletedProcess[str]]
KINDS = ("masked", "causal", "t5", "bart")
TEXTS = ("a good film", "the bad film was long", "it is a film", "so good and so long, a great one")
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HALVES = {
    f"{half}_{what}": size
    for half in ("encoder", "decoder")
    for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}


def tokenizer(kind: str) -> Any:
    """A byte-level BPE tokenizer that knows the words of TEXTS, with what `kind` needs."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    masks = ["<extra_id_0>", "<extra_id_1>"] if kind == "t5" else ["<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[*SPECIAL, *(AddedToken(mask, lstrip=True) for mask in masks)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator([f"{text} It was great bad terrible good" for text in TEXTS], trainer)
    ends = {"masked": "<s> $A </s>", "bart": "<s> $A </s>", "t5": "$A </s>", "causal": "$A"}[kind]
    bare.post_processor = processors.TemplateProcessing(
        single=ends, special_tokens=[("</s>", 1), ("<s>", 2)]
    )
    given = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    given |= {} if kind in ("t5", "causal") else {"mask_token": "<mask>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, **given, extra_special_tokens=masks if kind == "t5" else []
    )


@pytest.fixture(params=KINDS)
def asked(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A kind of model, and a random one of it: `tmp_path/asked`."""
    return request.param, make(request.param, tmp_path / "asked")


def make(kind: str, path: Path) -> Path:
    import transformers

    torch.manual_seed(3)
    known = tokenizer(kind)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "vocab_size": len(known)}
    wide = {"initializer_range": 0.5}
    if kind == "masked":
        config: Any = transformers.BertConfig(**SIZES, **ids, **wide, num_attention_heads=4)
        made: Any = transformers.BertForMaskedLM
    elif kind == "causal":
        config = transformers.LlamaConfig(**SIZES, **ids, **wide, num_attention_heads=4)
        made = transformers.LlamaForCausalLM
    elif kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        config = transformers.T5Config(**sizes, **ids, decoder_start_token_id=0)
        config.initializer_factor = 2.0
        made = transformers.T5ForConditionalGeneration
    else:
        config = transformers.BartConfig(
            d_model=32, **HALVES, **ids, init_std=0.5, decoder_start_token_id=1
        )
        made = transformers.BartForConditionalGeneration
    model = made(config)
    if kind == "bart":  # which is zero in a new one
        model.final_logits_bias.normal_()
    model.save_pretrained(path)
    known.save_pretrained(path)
    return path


WORDS = {"negative": ["bad", "terrible"], "positive": ["good", "great"]}
ROWS = [{"text": t, "label": ("positive", "negative")[i % 2]} for i, t in enumerate(TEXTS)]


def recipe(folder: Path, **more: Any) -> Path:
    """Write a recipe, JSON being YAML, and its rows beside it."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    columns = {"text_a": "text", "label": "label"}
    values: dict[str, Any] = {
        "kind": "prompt",
        "data": {"test": "rows.jsonl", "columns": columns, "labels": list(WORDS)},
        "template": {"text": '{"placeholder": "text_a"} It was {"mask"}'},
        "verbalizer": {"type": "manual", "label_words": WORDS},
    }
    for key, value in more.items():
        old = values.get(key)
        values[key] = {**old, **value} if isinstance(old, dict) else value
    path = folder / f"recipe-{len(list(folder.glob('recipe-*')))}.yaml"
    path.write_text(json.dumps(values, indent=1))
    return path


def directly(path: Path, kind: str, text: str) -> Any:
    """Return the logits at the mask, by transformers alone."""
    import transformers

    known = transformers.AutoTokenizer.from_pretrained(path)
    mask = {"causal": "", "t5": " <extra_id_0>"}.get(kind, " <mask>")
    ids = known(f"{text} It was{mask}", return_tensors="pt")["input_ids"]
    at = -1
    more = {}
    if kind == "masked":
        model: Any = transformers.AutoModelForMaskedLM.from_pretrained(path)
        at = int((ids[0] == known.mask_token_id).nonzero())
    elif kind == "causal":
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
    else:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path)
        said = known.convert_tokens_to_ids(["<pad>", "<extra_id_0>"])
        if kind == "bart":
            at = int((ids[0] == known.mask_token_id).nonzero())
            said = [1, *ids[0, :at].tolist()]
        more = {"decoder_input_ids": torch.tensor([said])}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits[0, at]


def shares(logits: Any, path: Path) -> Any:
    """Return the probabilities of labels: a softmax of the means of their words."""
    from transformers import AutoTokenizer

    known = AutoTokenizer.from_pretrained(path)
    ids = [known(f" {word}", add_special_tokens=False)["input_ids"][0] for word in sum_of(WORDS)]
    return logits[ids].log_softmax(-1).view(2, 2).mean(-1).softmax(-1)


def sum_of(words: dict[str, list[str]]) -> list[str]:
    return [word for own in words.values() for word in own]


def told(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_labels_are_told_as_by_transformers_alone(
    bmkit: Run, asked: tuple[str, Path], tmp_path: Path
) -> None:
    kind, path = asked
    (found,) = told(bmkit("prompt", recipe(tmp_path), "-m", path, "-o", "p", "--json"))
    said = told(bmkit("infer", "-m", "p", "-i", "rows.jsonl", "--json"))
    wanted = [shares(directly(path, kind, text), path) for text in TEXTS]
    assert len({round(float(own[0]), 3) for own in wanted}) == len(TEXTS), "rows are all alike"
    for row, own in zip(said, wanted, strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(own.tolist(), abs=2e-5)
    right = [row["label"] == own["label"] for row, own in zip(said, ROWS, strict=True)]
    assert found["metrics"]["accuracy"] == sum(right) / len(right)
    assert found["kind"] == "prompt"
    assert not list((tmp_path / "p").glob("*.safetensors")), "the base's weights are in the prompt"


@pytest.mark.parametrize("calibration", ["content_free", "contextual"])
def test_calibration_divides_by_what_is_likely_anyway(
    bmkit: Run, asked: tuple[str, Path], tmp_path: Path, calibration: str
) -> None:
    kind, path = asked
    texts = ["N/A", "nothing"] if calibration == "content_free" else list(TEXTS)
    spec: dict[str, Any] = {"type": calibration}
    spec |= {"texts": texts} if calibration == "content_free" else {}
    made = bmkit("prompt", recipe(tmp_path, calibrate=spec), "-m", path, "-o", "p", "--json")
    assert made.returncode == 0, made.stderr
    said = told(bmkit("infer", "-m", "p", "-i", "rows.jsonl", "--json"))

    def words(text: str) -> Any:
        from transformers import AutoTokenizer

        known = AutoTokenizer.from_pretrained(path)
        ids = [known(f" {w}", add_special_tokens=False)["input_ids"][0] for w in sum_of(WORDS)]
        return directly(path, kind, text)[ids].softmax(-1)

    prior = torch.stack([words(text) for text in texts]).mean(0)
    for row, text in zip(said, TEXTS, strict=True):
        raised = words(text) / prior
        raised = raised / raised.sum()
        wanted = raised.log().view(2, 2).mean(-1).softmax(-1)
        assert list(row["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=2e-5)
    shown = bmkit("show", "p").stdout
    assert "It was" in shown
    assert f"{float(prior[0]):.4f}" in shown


def test_words_that_the_model_does_not_say_are_left_out(
    bmkit: Run, asked: tuple[str, Path], tmp_path: Path
) -> None:
    kind, path = asked
    words = {"negative": ["bad", "terrible", "film", "a"], "positive": ["good", "great", "long"]}
    spec = {"type": "knowledgeable", "label_words": words, "candidate_frac": 0.6, "relevance": 0}
    file = recipe(tmp_path, verbalizer=spec, calibrate={"type": "contextual"})
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    from transformers import AutoTokenizer

    known = AutoTokenizer.from_pretrained(path)
    prior = torch.stack([directly(path, kind, t).softmax(-1) for t in TEXTS]).mean(0)
    rare = set(prior.argsort()[: int(0.6 * len(prior))].tolist())
    wanted = {}
    for label, own in words.items():
        ids = [known(f" {word}", add_special_tokens=False)["input_ids"][0] for word in own]
        best = max(ids, key=lambda token: float(prior[token]))
        wanted[label] = [token for token in ids if token == best or token not in rare]
    kept = json.loads((tmp_path / "p" / "prompt.json").read_text())["label_words"]
    assert {k: [word["ids"][0] for word in own] for k, own in kept.items()} == wanted
    assert made["metrics"]["label_words"] == sum(map(len, wanted.values())) < 7
    strict = ("-s", "verbalizer.relevance=1e6", "-s", "verbalizer.candidate_frac=0")
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "q", "--json", *strict))
    assert made["metrics"]["label_words"] == 2
    done = bmkit("prompt", file, "-m", path, "-o", "r", "-s", "calibrate.type=none")
    assert (done.returncode, done.stdout) == (2, "")
    assert "take contextual" in done.stderr


LONG = {"negative": ["bad", "so terrible"], "positive": ["good", "great film", "so long"]}


@pytest.mark.parametrize("kind", ["causal", "t5"])
@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_words_of_several_tokens_are_as_likely_as_token_by_token(
    bmkit: Run, tmp_path: Path, kind: str, combine: str
) -> None:
    path = make(kind, tmp_path / "asked")
    spec = {"label_words": LONG, "multi_token_handler": "likelihood", "combine": combine}
    text = '{"placeholder": "text_a"} It was {"mask"}, film.'
    file = recipe(tmp_path, verbalizer=spec, template={"text": text})
    assert bmkit("prompt", file, "-m", path, "-o", "p").returncode == 0
    said = told(bmkit("infer", "-m", "p", "-i", "rows.jsonl", "--json"))
    for row, text in zip(said, TEXTS, strict=True):
        found = [
            [_likelihood(path, kind, text, word, combine) for word in own] for own in LONG.values()
        ]
        words = torch.tensor([*found[0], *found[1]]).log_softmax(-1)
        wanted = torch.stack([words[:2].mean(), words[2:].mean()]).softmax(-1)
        assert list(row["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=5e-5)


def _likelihood(path: Path, kind: str, text: str, word: str, combine: str) -> float:
    """Return the log-likelihood of a word, and in a causal model of what is behind it."""
    import transformers

    known = transformers.AutoTokenizer.from_pretrained(path)
    parts = [f"{text} It was", f" {word}", ", film."]
    before, own, after = (known(p, add_special_tokens=False)["input_ids"] for p in parts)
    if kind == "causal":
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path)
        ids, asked = [*before, *own, *after], [*own, *after]
        given = {"input_ids": torch.tensor([ids])}
    else:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path)
        mask = known.convert_tokens_to_ids("<extra_id_0>")
        read, asked = [*before, mask, *after, known.eos_token_id], own
        ids = [0, mask, *own]
        given = {"input_ids": torch.tensor([read]), "decoder_input_ids": torch.tensor([ids])}
    with torch.no_grad():
        logprobs = model.eval()(**given).logits[0].log_softmax(-1)
    first = len(ids) - len(asked)
    each = [float(logprobs[first - 1 + i, token]) for i, token in enumerate(asked)]
    return sum(each) / (len(each) if combine == "mean" else 1)


def test_a_prompt_can_be_made_on_a_delta_and_on_a_compressed_model(
    bmkit: Run, tmp_path: Path
) -> None:
    path = make("causal", tmp_path / "asked")
    rows = [{"prompt": f"{t}.", "completion": " It was good."} for t in TEXTS]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ("-s", "train.max_steps=6", "-s", "train.learning_rate=0.05", "-q")
    assert bmkit("tune", "lora", "-m", path, "--data", "t.jsonl", "-o", "d", *short).returncode == 0
    assert bmkit("compress", "int8", "-m", path, "-o", "c", "-q").returncode == 0
    answers = []
    for base in (path, "d", "c"):
        out = f"p-{Path(base).name}"
        (made,) = told(bmkit("prompt", recipe(tmp_path), "-m", base, "-o", out, "--json"))
        said = told(bmkit("infer", "-m", out, "-i", "rows.jsonl", "--json"))
        answers.append([row["probabilities"]["negative"] for row in said])
        right = [row["label"] == own["label"] for row, own in zip(said, ROWS, strict=True)]
        assert made["metrics"]["accuracy"] == sum(right) / len(right)
    assert answers[1] != pytest.approx(answers[0], abs=1e-3), "the delta isn't at work"
    assert answers[2] == pytest.approx(answers[0], abs=0.05)
    assert answers[2] != answers[0], "the rounded weights aren't used"
    base = json.loads((tmp_path / "p-d" / "bmkit.json").read_text())["base"]
    assert (base["kind"], Path(base["path"])) == ("delta", tmp_path / "d")


@pytest.mark.parametrize("delta", ["prompt", "prefix"])
def test_what_a_delta_puts_in_front_is_read_before_the_prompt(
    bmkit: Run, tmp_path: Path, delta: str
) -> None:
    path = make("causal", tmp_path / "asked")
    rows = [{"prompt": f"{t}.", "completion": " It was good."} for t in TEXTS]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ("-s", "train.max_steps=6", "-s", "train.learning_rate=0.3", "-q")
    short = (*short, "-s", "deltas.0.num_virtual_tokens=4")
    done = bmkit("tune", delta, "-m", path, "--data", "t.jsonl", "-o", "d", *short)
    assert done.returncode == 0, done.stderr
    assert bmkit("prompt", recipe(tmp_path), "-m", "d", "-o", "p").returncode == 0
    said = told(bmkit("infer", "-m", "p", "-i", "rows.jsonl", "--json"))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known = AutoTokenizer.from_pretrained(path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "d")
    for row, text in zip(said, TEXTS, strict=True):
        ids = known(f"{text} It was", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            wanted = shares(model.eval()(input_ids=ids).logits[0, -1], path)
        assert list(row["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=2e-5)


def test_a_budget_and_rounding_for_one_run_tell_the_same(bmkit: Run, tmp_path: Path) -> None:
    path = make("masked", tmp_path / "asked")
    assert bmkit("prompt", recipe(tmp_path), "-m", path, "-o", "p").returncode == 0
    plain = told(bmkit("infer", "-m", "p", "-i", "rows.jsonl", "--json"))
    placed = told(bmkit("infer", "-m", "p", "-i", "rows.jsonl", "--json", "--cpu-memory", "300MiB"))
    rounded = told(bmkit("infer", "-m", "p", "-i", "rows.jsonl", "--json", "--quant", "int8"))
    for one, two, three in zip(plain, placed, rounded, strict=True):
        assert two["probabilities"] == pytest.approx(one["probabilities"], abs=1e-4)
        assert three["probabilities"] == pytest.approx(one["probabilities"], abs=0.05)


def test_rows_have_the_users_columns_or_the_templates_and_a_text_alone_will_do(
    bmkit: Run, tmp_path: Path
) -> None:
    path = make("causal", tmp_path / "asked")
    assert bmkit("prompt", recipe(tmp_path), "-m", path, "-o", "p").returncode == 0
    rows: list[dict[str, Any]] = [
        {"id": "a", "text": TEXTS[0], "more": [1, 2]},
        {"text_a": TEXTS[0]},
        {"prompt": TEXTS[0]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = told(bmkit("infer", "-m", "p", "-i", "in.jsonl", "--json"))
    assert [row["id"] for row in said] == ["a", 1, 2]
    assert len({row["probabilities"]["positive"] for row in said}) == 1
    line = bmkit("infer", "-m", "p", "-p", TEXTS[0]).stdout
    assert line == f"{said[0]['label']}\t{said[0]['probabilities'][said[0]['label']]:.4f}\n"
    (tmp_path / "in.jsonl").write_text('{"txet": "x"}\n' + json.dumps(rows[0]) + "\n")
    done = bmkit("infer", "-m", "p", "-i", "in.jsonl", "--json")
    assert (done.returncode, len(done.stdout.splitlines())) == (3, 1)
    assert "in.jsonl:1" in done.stderr
    assert "text" in done.stderr


def test_rows_come_from_a_table_too_and_those_that_are_cut_are_counted(
    bmkit: Run, tmp_path: Path
) -> None:
    path = make("causal", tmp_path / "asked")
    assert bmkit("prompt", recipe(tmp_path), "-m", path, "-o", "p").returncode == 0
    texts = [TEXTS[0], TEXTS[1], "long " * 800, "longer " * 800]
    rows = [{"id": f"n{i}", "text": text} for i, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = "id\ttext\n" + "".join(f"{row['id']}\t{row['text']}\n" for row in rows)
    (tmp_path / "in.tsv").write_text(table)
    (tmp_path / "in.tsv.gz").write_bytes(gzip.compress(table.encode()))
    words = ("infer", "-m", "p", "--json", "--report", "report.json", "-i")
    lines = told(bmkit(*words, "in.jsonl"))
    for file in ("in.tsv", "in.tsv.gz"):
        done = bmkit(*words, file)
        assert told(done) == lines
        assert "warning: 2 rows were cut: a prompt has" in done.stderr
        assert json.loads((tmp_path / "report.json").read_text())["rows_truncated"] == 2
    (tmp_path / "in.tsv").write_text("id\ttext\n1\ta\tb\n")
    done = bmkit(*words, "in.tsv")
    assert done.returncode == 3 and "in.tsv:2" in done.stderr
    (tmp_path / "in.tsv.gz").write_bytes(b"no gzip")
    done = bmkit(*words, "in.tsv.gz")
    assert done.returncode == 3 and "is not a whole gzip file" in done.stderr


def test_a_table_is_read_as_that_was_which_the_prompt_was_made_on(
    bmkit: Run, tmp_path: Path
) -> None:
    path = make("causal", tmp_path / "asked")
    lines = [f"{text}\t{number % 2}" for number, text in enumerate(TEXTS[:4])]
    (tmp_path / "rows.tsv").write_text("\n".join(lines) + "\n")
    data = {
        "train": None,
        "test": str(tmp_path / "rows.tsv"),
        "columns": {"text_a": 0, "label": 1},
        "labels": {"0": "negative", "1": "positive"},
    }
    assert bmkit("prompt", recipe(tmp_path, data=data), "-m", path, "-o", "p").returncode == 0
    found = told(bmkit("infer", "-m", "p", "-i", "rows.tsv", "--json"))
    assert [row["id"] for row in found] == [0, 1, 2, 3], "the first line is a row as well"
    (tmp_path / "named.tsv").write_text("label\ttext_a\n" + "".join(f"x\t{t}\n" for t in TEXTS[:4]))
    assert told(bmkit("infer", "-m", "p", "-i", "named.tsv", "--json")) == found
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "k", "sentence": TEXTS[0]}) + "\n")
    done = bmkit("infer", "-m", "p", "-i", "in.jsonl", "--json")
    assert done.returncode == 3 and "it has no `text_a`" in done.stderr
    data = {**data, "header": True, "test": str(tmp_path / "headed.tsv")}
    (tmp_path / "headed.tsv").write_text("\n".join(["what\tlabel", *lines]) + "\n")
    file = recipe(tmp_path, data=data)
    assert bmkit("prompt", file, "-m", path, "-o", "q").returncode == 0
    assert told(bmkit("infer", "-m", "q", "-i", "headed.tsv", "--json")) == found


def test_examples_show_each_token_and_need_no_weights(
    bmkit: Run, asked: tuple[str, Path], tmp_path: Path
) -> None:
    kind, path = asked
    (path / "model.safetensors").write_bytes(_without_data(path / "model.safetensors"))
    spec = {"text": '{"placeholder": "text_a"} It was {"mask"}', "max_seq_length": 9}
    file = recipe(tmp_path, template=spec)
    (found,) = told(bmkit("prompt", file, "-m", path, "--examples", 4, "--json"))
    assert found["model_kind"] == {"t5": "seq2seq", "bart": "seq2seq"}.get(kind, kind)
    last = found["examples"][3]
    assert last["cut"] > 0
    assert len(last["tokens"]) <= 9
    assert last["text"] == f"{TEXTS[3]} It was <mask>"
    roles = {token["role"] for token in last["tokens"]}
    assert {"placeholder", "text"} <= roles
    asked_at = [t for t in last.get("decoder", last["tokens"]) if t["asked"]]
    assert len(asked_at) == 1
    swapped = "data.labels={negative: good, positive: bad}"
    words = "verbalizer.label_words={good: great, bad: terrible}"
    more = ("-s", swapped, "-s", words, "-s", "verbalizer.multi_token_handler=first")
    (named,) = told(bmkit("prompt", file, "-m", path, "--examples", 4, "--json", *more))
    assert {row["label"] for row in named["examples"]} <= {"good", "bad"}
    text = bmkit("prompt", file, "-m", path, "--examples", 1).stdout
    assert "It" in text
    assert "asked" in text


def _without_data(file: Path) -> bytes:
    """Return a safetensors file's own bytes, with weights that are no numbers."""
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)
    return bytes(content)


def test_rows_may_have_several_labels(bmkit: Run, tmp_path: Path) -> None:
    path = make("causal", tmp_path / "asked")
    file = recipe(
        tmp_path,
        task="multilabel",
        data={"test": "many.csv", "columns": {"text_a": "t", "label": "l"}, "separator": ";"},
        calibrate={"type": "contextual"},
    )
    (tmp_path / "many.csv").write_text(
        "t,l\n" + "".join(f'"{text}",{own}\n' for text, own in zip(TEXTS, LABELS, strict=True))
    )
    (made,) = told(bmkit("prompt", file, "-m", path, "-o", "p", "--json"))
    assert {"accuracy", "macro_f1", "micro_f1"} <= set(made["metrics"])
    rows = [{"t": text} for text in TEXTS]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = told(bmkit("infer", "-m", "p", "-i", "in.jsonl", "--json"))
    for row in said:
        assert row["labels"] == [n for n, share in row["probabilities"].items() if share > 0.5]
    right = [
        set(row["labels"]) == set(own.split(";")) - {""}
        for row, own in zip(said, LABELS, strict=True)
    ]
    assert made["metrics"]["accuracy"] == pytest.approx(sum(right) / 4)


LABELS = ("positive", "negative;positive", "", "positive")


@pytest.mark.model
def test_calibration_helps_smollm2(bmkit: Run, smollm2: Path) -> None:
    plain = told(
        bmkit("prompt", "sentiment", "-m", "smollm2-135m", "--json", "-s", "calibrate.type=none")
    )
    free = told(bmkit("prompt", "sentiment", "-m", "smollm2-135m", "--json"))
    assert plain[0]["metrics"]["accuracy"] + 0.1 <= free[0]["metrics"]["accuracy"]
    assert free[0]["metrics"]["accuracy"] > 0.8
    done = bmkit("infer", "-m", free[0]["path"], "-p", "A dull and clumsy film.", "--json")
    assert told(done)[0]["label"] == "negative"
