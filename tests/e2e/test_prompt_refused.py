"""`bmkit prompt`: what is wrong with a template, its words or rows is named where it is."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
BYTES = {"negative": "<!>b", "positive": "<!>g"}
"""Words of the tiny model's vocabulary, which has bytes alone."""


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe in YAML, with parts of it changed, and its rows beside it."""

    def write(
        rows: str = '{"t": "fine", "l": "positive"}\n{"t": "no", "l": "negative"}\n',
        template: str = """{text: '{"placeholder": "text_a"} It was {"mask"}'}""",
        words: Any = BYTES,
        more: str = "",
    ) -> Path:
        (tmp_path / "rows.jsonl").write_text(rows)
        path = tmp_path / "recipe.yaml"
        path.write_text(
            "kind: prompt\n"
            "data:\n  test: rows.jsonl\n  columns: {text_a: t, label: l}\n"
            "  labels: [negative, positive]\n"
            f"template: {template}\n"
            f"verbalizer:\n  label_words: {json.dumps(words)}\n{more}"
        )
        return path

    return write


Refused = Callable[..., str]


@pytest.fixture
def refused(bmkit: Run, tiny: Path, tmp_path: Path, nothing_left: Callable[[], None]) -> Refused:
    """Run a recipe that must be refused with this code; return what was said."""

    def run(recipe: Path, code: int, *more: str) -> str:
        done = bmkit("prompt", recipe, "-m", "tiny", "-o", "p", *more)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert not (tmp_path / "p").exists()
        nothing_left()
        return done.stderr

    return run


def test_the_recipe_that_the_others_change_is_fine(
    bmkit: Run, tiny: Path, written: Callable[..., Path]
) -> None:
    done = bmkit("prompt", written(), "-m", "tiny", "-o", "p", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["rows"] == 2


def test_a_text_alone_does_not_fill_a_template_of_several_fields(
    bmkit: Run, tiny: Path, written: Callable[..., Path]
) -> None:
    template = """{text: '{"placeholder": "a"} {"placeholder": "b"} {"mask"}'}"""
    rows = '{"a": "x", "b": "y", "label": "positive"}\n{"a": "z", "b": "y", "label": "negative"}\n'
    file = written(rows=rows, template=template)
    file.write_text(file.read_text().replace("  columns: {text_a: t, label: l}\n", ""))
    assert bmkit("prompt", file, "-m", "tiny", "-o", "p").returncode == 0
    done = bmkit("infer", "-m", "p", "-p", "x")
    assert done.returncode == 3
    assert "`prompt` alone fills no template with `a`, `b`" in done.stderr


@pytest.mark.parametrize("option", [("--system", "x"), ("--logprobs", "2")])
def test_options_that_a_prompt_has_no_place_for_are_refused(
    bmkit: Run, tiny: Path, written: Callable[..., Path], option: tuple[str, str]
) -> None:
    assert bmkit("prompt", written(), "-m", "tiny", "-o", "p").returncode == 0
    done = bmkit("infer", "-m", "p", "-p", "x", *option)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"leave {option[0]} out" in done.stderr


def test_text_with_braces_on_the_command_line_is_shown_how_to_be_quoted(
    refused: Refused, written: Callable[..., Path]
) -> None:
    text = refused(written(), 2, "-s", 'template.text={"placeholder": "text_a"} {"mask"}')
    assert """not valid YAML; text in quotes is: 'template.text="…"'""" in text


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("""{text: '{"placeholder": "text_b"} {"mask"}'}""", "did you mean `text_a`?"),
        ("""{jinja: '{{ text_b }} {{ mask }}'}""", "'text_b' is undefined"),
    ],
)
def test_a_field_that_rows_do_not_have_is_told_of_by_the_plan(
    refused: Refused, written: Callable[..., Path], template: str, said: str
) -> None:
    told = refused(written(template=template), 3, "--plan")
    assert "rows.jsonl:1" in told and said in told


def test_a_delta_that_goes_nowhere_is_told_of_by_the_plan(
    bmkit: Run, tiny: Path, written: Callable[..., Path]
) -> None:
    few = "learning_setting: {type: full}\n"
    deltas = "tune: {mode: delta, deltas: [{type: lora, r: 4, target_modules: [MODULE]}]}\n"
    file = written(more=few + deltas)
    file.write_text(file.read_text().replace("  test: rows", "  train: rows"))
    text = file.read_text()
    file.write_text(text.replace("MODULE", "nope"))
    done = bmkit("prompt", file, "-m", "tiny", "--plan")
    assert done.returncode == 2 and "`nope`" in done.stderr
    file.write_text(text.replace("MODULE", "q_proj"))
    plan = json.loads(bmkit("prompt", file, "-m", "tiny", "--plan", "--json").stdout)
    assert plan["steps"][0] == "train lora"
    done = bmkit("prompt", file, "-m", "tiny", "-o", "p", "-s", "train.max_steps=1")
    assert done.returncode == 0, done.stderr
    size = sum(f.stat().st_size for f in (file.parent / "p").rglob("*.safetensors"))
    assert size <= plan["peak"]["disk_bytes"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("""{text: '{"placeholder": "text_a"} It was good'}""", 'the template has no {"mask"}'),
        ("""{text: '{"placeholder": "text_a" It was {"mask"}'}""", "column 1"),
        ("""{text: '{"placeholder": "text_a"} was} {"mask"}'}""", "column 30: this } closes"),
        ("""{text: '{"placehodler": "text_a"} {"mask"}'}""", "did you mean `placeholder`?"),
        ("""{jinja: '{{ text_a }} It was'}""", "has no {{ mask }}"),
        ("""{chat: [{role: user, content: '{"mask"}'}]}""", "assistant"),
        ("{truncate_method: tail}", "one of `text`, `file_path`, `jinja`, `chat` is required"),
        ("""{text: '{"mask"}', jinja: '{{ mask }}'}""", "it goes without `text`"),
    ],
)
def test_a_template_that_is_wrong_is_shown_at_its_line_and_column(
    refused: Refused, written: Callable[..., Path], template: str, said: str
) -> None:
    told = refused(written(template=template), 2)
    assert said in told
    assert "recipe.yaml:6:" in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"negative": "<!>b", "positiv": "<!>g"}, "`positiv` is none of the labels"),
        ({"negative": "<!>b"}, "`positive` has none"),
        (["<!>b"], "1 lists of words for 2 labels"),
        ({"negative": ["<!>b", "<!>g"], "positive": ["<!>g", "<!>b"]}, "have the same words"),
        ({"negative": "<!>b", "positive": []}, "`positive` has none"),
    ],
)
def test_label_words_that_are_wrong_are_shown_at_their_line(
    refused: Refused, written: Callable[..., Path], words: Any, said: str
) -> None:
    told = refused(written(words=words), 2)
    assert said in told
    assert "recipe.yaml:8:" in told


def test_a_word_that_is_not_one_token_shows_its_tokens(
    refused: Refused, written: Callable[..., Path]
) -> None:
    words = {"negative": "bad", "positive": "good"}
    told = refused(written(words=words, more="  type: one_to_one\n"), 3)
    assert "`bad`, of `negative`, is 4 tokens: Ġ b a d" in told
    assert "recipe.yaml:8:" in told
    told = refused(written(words=words), 3)
    assert "have the same first tokens" in told
    assert "multi_token_handler: mean" in told
    assert "recipe.yaml:8:" in told


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('{"t": "fine", "l": "positive"}\n{"l": "negative"}\n', "rows.jsonl:2"),
        ('{"t": "fine", "l": "positive"}\n{"t": "no", "l": "negativ"}\n', "`negativ` is none"),
        ('{"t": "fine", "l": "positive"}\n{"t": "no"}\n', "rows.jsonl:2"),
        ('{"t": "fine", "l": "positive"}\n{"t": null, "l": "negative"}\n', "rows.jsonl:2"),
        ('{"t": "fine"\n', "rows.jsonl:1"),
        ("", "holds no rows"),
    ],
)
def test_a_row_that_is_wrong_is_named(
    refused: Refused, written: Callable[..., Path], rows: str, said: str
) -> None:
    assert said in refused(written(rows=rows), 3)


def test_a_placeholder_that_rows_lack_is_named_with_the_row(
    refused: Refused, written: Callable[..., Path]
) -> None:
    template = """{text: '{"placeholder": "text_b"} It was {"mask"}'}"""
    told = refused(written(template=template), 3)
    assert "rows.jsonl:1" in told
    assert "`text_b`" in told


def test_a_template_longer_than_the_context_is_told(
    refused: Refused, written: Callable[..., Path]
) -> None:
    long = "very " * 120
    template = f"""{{text: '{long}{{"placeholder": "text_a"}} {{"mask"}}'}}"""
    told = refused(written(template=template), 2, "-s", "template.max_seq_length=4000")
    assert "what the model reads is 512" in told
    assert "recipe.yaml:6:" in refused(written(template=template), 2)


@pytest.mark.parametrize(
    ("assign", "said"),
    [
        ("data.labels=[positive]", "one label only"),
        ("tune.mode=soft", "take few_shot or full"),
        ("tune.mode=full", "take few_shot or full"),
        ("tune.encoder=lstm", "says nothing with `mode: none`"),
        ("learning_setting.type=full", "say what is trained"),
        ("learning_setting.type=few_shot", "num_examples_per_label and num_examples_total"),
        ("verbalizer.type=automatic", "finds its own"),
        ("task=multilabel", "take content_free or contextual"),
        ('template.text=\'{"soft"} {"mask"}\'', "soft tokens"),
        ('template.text=\'{"mask"} and {"mask"}\'', "2 masks"),
        ("model_kind=masked", "this model is causal"),
        ("gates.acuracy.min=1", "did you mean `accuracy`?"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_model_is_read(
    refused: Refused, written: Callable[..., Path], tiny: Path, assign: str, said: str
) -> None:
    code = 3 if assign.startswith("model_kind") else 2
    assert said in refused(written(), code, "-s", assign)


def test_a_prompt_is_refused_on_another_tokenizer_and_told_of_another_base(
    bmkit: Run, tiny: Path, tmp_path: Path, written: Callable[..., Path]
) -> None:
    assert bmkit("prompt", written(), "-m", "tiny", "-o", "p").returncode == 0
    assert bmkit("compress", "int8", "-m", "tiny", "-o", "c").returncode == 0
    done = bmkit("infer", "-m", "c", "--adapter", "p", "-p", "fine", "--json")
    assert done.returncode == 0, done.stderr
    assert "warning" in done.stderr
    assert set(json.loads(done.stdout)["probabilities"]) == {"negative", "positive"}
    file = tmp_path / "c" / "tokenizer.json"
    values = json.loads(file.read_text())
    words = values["model"]["vocab"]
    words["b"], words["g"] = words["g"], words["b"]
    other = tmp_path / "other"
    other.mkdir()
    for part in tiny.iterdir():
        (other / part.name).write_bytes(part.read_bytes())
    (other / "tokenizer.json").write_text(json.dumps(values))
    done = bmkit("infer", "-m", "other", "--adapter", "p", "-p", "fine")
    assert (done.returncode, done.stdout) == (3, "")
    assert "another tokenizer" in done.stderr


def test_a_prompt_whose_base_has_changed_or_gone_is_refused(
    bmkit: Run, tiny: Path, written: Callable[..., Path]
) -> None:
    assert bmkit("prompt", written(), "-m", "tiny", "-o", "p").returncode == 0
    config = tiny / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    done = bmkit("infer", "-m", "p", "-p", "fine")
    assert (done.returncode, done.stdout) == (3, "")
    assert "has changed" in done.stderr
    assert "-m BASE --adapter p" in done.stderr.replace(str(tiny.parent) + "/", "")


def test_a_damaged_prompt_is_refused(bmkit: Run, tiny: Path, written: Callable[..., Path]) -> None:
    assert bmkit("prompt", written(), "-m", "tiny", "-o", "p").returncode == 0
    file = tiny.parent / "p" / "prompt.json"
    file.write_text(file.read_text().replace("negative", "negatives", 1))
    done = bmkit("infer", "-m", "p", "-p", "fine")
    assert (done.returncode, done.stdout) == (3, "")
    assert "damaged" in done.stderr


def test_a_prompt_has_nothing_to_score_and_is_no_model(
    bmkit: Run, tiny: Path, written: Callable[..., Path]
) -> None:
    assert bmkit("prompt", written(), "-m", "tiny", "-o", "p").returncode == 0
    assert bmkit("infer", "-m", "p", "-p", "fine", "--score").returncode == 2
    assert bmkit("compress", "int8", "-m", "p", "-o", "x").returncode == 3
    assert bmkit("tune", "lora", "-m", "p", "-o", "x").returncode == 3


def test_a_gate_that_is_not_met_ends_with_five(
    bmkit: Run, tiny: Path, written: Callable[..., Path]
) -> None:
    done = bmkit("prompt", written(), "-m", "tiny", "-o", "p", "-s", "gates.accuracy.min=1.1")
    assert (done.returncode, done.stdout) == (5, "")


def test_an_encoder_without_a_head_for_words_is_refused(
    bmkit: Run, bert: Path, written: Callable[..., Path]
) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(bert).save_pretrained(bert)
    done = bmkit("prompt", written(), "-m", "bert", "-o", "p")
    assert (done.returncode, done.stdout) == (3, "")
    assert "head" in done.stderr


def test_openprompts_experiment_becomes_a_recipe_that_runs(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "op.yaml").write_text(
        "dataset: {name: sst-2, path: data}\nplm: {model_path: gpt2, optimize: "
        "{freeze_para: True, lr: 3e-5}}\ntemplate: manual_template\nmanual_template:\n"
        """  text: '{"placeholder": "text_a"} It was {"mask"}'\n"""
        "verbalizer: manual_verbalizer\nmanual_verbalizer: {label_words: [[<!>b], [<!>g]]}\n"
        "learning_setting: zero_shot\nenvironment: {num_gpus: 1}\n"
    )
    done = bmkit("import", "openprompt", "op.yaml", "-o", "r.yaml")
    assert (done.returncode, done.stdout) == (0, "r.yaml\n"), done.stderr
    for said in ("-m gpt2", "plm.optimize.lr", "environment"):
        assert said in done.stderr
    (tmp_path / "data").mkdir()
    for split in ("train", "dev", "test"):
        (tmp_path / "data" / f"{split}.tsv").write_text("sentence\tlabel\nfine\t1\nno\t0\n")
    made = bmkit("prompt", "r.yaml", "-m", "tiny", "--json")
    assert made.returncode == 0, made.stderr
    assert {"accuracy", "dev_accuracy"} <= set(json.loads(made.stdout)["metrics"])
    assert bmkit("import", "openprompt", "op.yaml", "-o", "r.yaml").returncode == 3
    assert bmkit("import", "openprompt", "r.yaml").returncode == 3
    assert bmkit("import", "openprompt", "nothing.yaml").returncode == 3


def test_a_pipeline_may_end_in_a_prompt_and_ask_it(
    bmkit: Run, tiny: Path, tmp_path: Path, written: Callable[..., Path]
) -> None:
    written()
    (tmp_path / "line.yaml").write_text(
        "- prompt: recipe.yaml\n  model: tiny\n  out: p\n- infer: greedy\n  prompt: fine\n"
    )
    done = bmkit("run", "line.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["probabilities"]) == {"negative", "positive"}
