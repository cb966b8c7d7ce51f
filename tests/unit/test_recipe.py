"""Recipes: what YAML means here, and errors that name everything wrong, each at its place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pytest
from pydantic import Field

from bmkit import builtin, recipe, registry
from bmkit.compress.recipe import CompressRecipe
from bmkit.errors import BmkitError, InputError, RecipeError
from bmkit.infer.recipe import InferRecipe
from bmkit.pipeline.stage import Request, load_recipe
from bmkit.prompt.recipe import PromptRecipe
from bmkit.recipe import Model, Recipe
from bmkit.tune.recipe import TuneRecipe

COMPRESS = """\
kind: compress
steps:
  - method: quantize
    bits: 8
"""
TUNE = """\
kind: tune
deltas:
  - type: lora
data:
  train: rows.jsonl
"""


class Place(NamedTuple):
    """One problem with a place in a file, as it is shown."""

    line: int
    column: int
    marked: str
    """The text above the carets."""
    says: str


def places(message: str) -> list[Place]:
    """Read a rendered error back: where each problem is said to be, and what its caret marks."""
    found = []
    lines = message.splitlines()
    for i, line in enumerate(lines):
        if not (head := re.fullmatch(r"  --> .*:(\d+):(\d+)", line)):
            continue
        shown, below = lines[i + 2], lines[i + 3]
        bar = shown.index(" | ") + 3
        assert shown[:bar].strip(" |") == head[1]
        carets = re.search(r"\^+", below)
        assert carets is not None
        marked = shown[carets.start() : carets.end()]
        column = int(head[2])
        assert shown[bar + column - 1 : bar + column - 1 + len(marked)] == marked
        found.append(Place(int(head[1]), column, marked, below[carets.end() :].strip()))
    return found


def on_command_line(message: str) -> dict[str, str]:
    """Return the problems that are shown at a flag: what it was, and what is said."""
    return dict(re.findall(r"^  --> (--.*)\n   = (.*)$", message, re.MULTILINE))


def refusal(text: str, model: type[Recipe], *assign: str) -> str:
    """Return what is said against a recipe."""
    with pytest.raises(RecipeError) as caught:
        doc = recipe.parse(text, "r.yaml")
        recipe.override(doc, assign)
        recipe.validate(doc, model)
    assert caught.value.exit_code == 2
    return str(caught.value)


def accepted(text: str, model: type[Any], *assign: str) -> Any:
    """Return the recipe that a text and its overrides make."""
    doc = recipe.parse(text, "r.yaml")
    recipe.override(doc, assign)
    return recipe.validate(doc, model)


# --- what YAML means -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1.5e+3", 1500.0),
        ("-2e-3", -0.002),
        (".5", 0.5),
        ("5.", 5.0),
        ("1.0", 1.0),
        ("0", 0),
        ("-12", -12),
        ("+3", 3),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("012", "012"),
        ("0x1f", "0x1f"),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("1.2.3", "1.2.3"),
        ("1e", "1e"),
        ("e5", "e5"),
        (".", "."),
        ("[-]", ["-"]),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("<<", "<<"),
        ("=", "="),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(text: str, meaning: object) -> None:
    value = recipe.parse(f"key: {text}\n", "r.yaml").data["key"]
    assert (value, type(value)) == (meaning, type(meaning))


def test_a_learning_rate_in_scientific_notation_is_a_number() -> None:
    text = TUNE + "train:\n  learning_rate: 1e-4\n"
    assert accepted(text, TuneRecipe).train.learning_rate == 0.0001


def test_text_is_never_turned_into_a_number_or_a_switch() -> None:
    said = places(refusal(TUNE + "merge: yes\nseed: 012\n", TuneRecipe))
    assert {(p.line, p.marked) for p in said} == {(6, "yes"), (7, "012")}


def test_a_merge_key_is_an_unknown_key_and_merges_nothing() -> None:
    said = places(refusal(COMPRESS + "<<: {seed: 3}\n", CompressRecipe))
    assert [(p.line, p.marked) for p in said] == [(5, "<<")]


def test_a_duplicate_key_is_named_with_the_line_of_the_first() -> None:
    said = places(refusal(COMPRESS + "seed: 1\ndevice: cpu\nseed: 2\n", CompressRecipe))
    assert said == [Place(7, 1, "seed", "`seed` is already set on line 5")]


def test_a_duplicate_key_deep_inside_a_list_is_found() -> None:
    said = places(refusal(COMPRESS + "    bits: 4\n", CompressRecipe))
    assert said == [Place(5, 5, "bits", "`bits` is already set on line 4")]


def test_the_same_key_in_two_mappings_is_no_duplicate() -> None:
    text = TUNE + "  dev: dev.jsonl\ntrain:\n  max_steps: 3\n"
    assert accepted(text, TuneRecipe).train.max_steps == 3


def test_a_number_and_the_same_number_as_text_are_one_key() -> None:
    text = TUNE + 'gates:\n  1: {max: 1}\n  "1": {max: 2}\n'
    said = places(refusal(text, TuneRecipe))
    assert any(p.line in {7, 8} and re.search("already set|must be text", p.says) for p in said)


def test_an_alias_stands_for_its_anchor() -> None:
    text = "kind: infer\nsystem: &word Hello\nstop_strings: [*word, *word]\n"
    assert accepted(text, InferRecipe).stop_strings == ["Hello", "Hello"]


def test_an_alias_without_an_anchor_is_named_at_its_place() -> None:
    said = places(refusal("kind: infer\nsystem: *nowhere\n", InferRecipe))
    assert [(p.line, p.column) for p in said] == [(2, 9)]
    assert "nowhere" in said[0].says


def test_aliases_that_multiply_are_refused_before_they_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "too large" in refusal("\n".join(lines), InferRecipe)


def test_an_alias_that_holds_itself_is_refused() -> None:
    assert "too large" in refusal("stop_strings: &a [*a]\n", InferRecipe)


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 300, "a: " + "[" * 60 + "]" * 60])
def test_deep_nesting_is_refused_without_a_crash(text: str) -> None:
    message = refusal(text, InferRecipe)
    assert len(message) < 5000, "the whole text is in the message"


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but a comment\n", "---\n"])
def test_an_empty_recipe_is_refused(text: str) -> None:
    message = refusal(text, InferRecipe)
    assert "empty" in message or "mapping" in message


def test_a_tab_is_named_at_its_place() -> None:
    said = places(refusal("kind: compress\nsteps:\n\t- method: quantize\n", CompressRecipe))
    assert [(p.line, p.column) for p in said] == [(3, 1)]


def test_a_caret_stays_under_its_word_behind_a_tab() -> None:
    message = refusal('{kind: infer, system: "a\tb", sead: 1}\n', InferRecipe)
    shown, below = message.splitlines()[3:5]
    assert below[: below.index("^")].count("\t") == 1
    assert below.index("^") == shown.index("sead")


def test_two_documents_in_a_file_are_refused() -> None:
    assert "not valid YAML" in refusal("kind: infer\n---\nkind: infer\n", InferRecipe)


def test_unclosed_brackets_are_named_with_a_place() -> None:
    said = places(refusal("kind: compress\nsteps: [\nseed: 1\n", CompressRecipe))
    assert len(said) == 1
    assert said[0].line in {2, 3}


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "17\n"])
def test_a_list_or_text_where_a_mapping_should_be_is_refused(text: str) -> None:
    said = places(refusal(text, CompressRecipe))
    assert [(p.line, p.column) for p in said] == [(1, 1)]
    assert "mapping" in said[0].says


def test_a_list_where_an_inner_mapping_should_be_is_named_at_its_place() -> None:
    said = places(refusal(TUNE + "train:\n  - max_steps: 1\n", TuneRecipe))
    assert [p.line for p in said] == [7]


def test_a_mapping_where_a_list_should_be_is_named_at_its_place() -> None:
    said = places(refusal("kind: compress\nsteps: {method: quantize}\n", CompressRecipe))
    assert [(p.line, p.column) for p in said] == [(2, 8)]


@pytest.mark.parametrize("tag", ["!!binary aGk=", "!!timestamp 2026-01-31", "!!set {a, b}"])
def test_a_value_that_json_has_no_form_for_is_refused_at_its_place(tag: str) -> None:
    said = places(refusal(TUNE + f"device: {tag}\n", TuneRecipe))
    assert [(p.line, p.column) for p in said] == [(6, 9)]


def test_a_tag_that_would_run_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = f"device: !!python/object/apply:os.system ['touch {mark}']\n"
    assert "not valid YAML" in refusal(TUNE + text, TuneRecipe)
    assert not mark.exists()


@pytest.mark.parametrize("value", ["1e999", "!!float .inf", "!!float .nan"])
def test_a_number_that_is_not_finite_is_refused(value: str) -> None:
    said = places(refusal(TUNE + f"train:\n  learning_rate: {value}\n", TuneRecipe))
    assert [p.line for p in said] == [7]


def test_a_control_character_is_refused_and_named() -> None:
    assert "r.yaml" in refusal("kind: infer\nsystem: a\x00b\n", InferRecipe)


@pytest.mark.parametrize(
    "content", [b"kind: infer\nsystem: caf\xe9\n", "kind: infer\n".encode("utf-16"), b"\xff\xfe"]
)
def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(BmkitError, match=re.escape(str(file))) as caught:
        load_recipe(Request("infer", str(file), ""))
    assert "UTF-8" in str(caught.value.hint)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbfkind: infer\nseed: 3\n")
    assert load_recipe(Request("infer", str(file), ""))[1].seed == 3


def test_windows_line_ends_change_nothing() -> None:
    said = places(refusal("kind: infer\r\nseed: x\r\n", InferRecipe))
    assert [(p.line, p.column, p.marked) for p in said] == [(2, 7, "x")]


# --- all problems at once, each at its place -----------------------------------------------------


def test_all_problems_are_named_at_once_each_under_its_caret() -> None:
    text = """\
kind: compress
seeed: 1
steps:
  - method: quantise
    bits: '8'
    group_size: 33
    scale_serch: 2
    exclude_modules: q_proj
dtype: flot32
seed: -1
"""
    message = refusal(text, CompressRecipe)
    said = {(p.line, p.marked): p.says for p in places(message)}
    assert set(said) == {
        (2, "seeed"),
        (4, "quantise"),
        (5, "'8'"),
        (6, "33"),
        (7, "scale_serch"),
        (8, "q_proj"),
        (9, "flot32"),
        (10, "-1"),
    }
    assert message.startswith("r.yaml: 8 problems\n")
    assert "did you mean `seed`?" in said[2, "seeed"]
    assert "did you mean `quantize`?" in said[4, "quantise"]
    assert "write 8" in said[5, "'8'"]
    assert all(size in said[6, "33"] for size in ("channel", "auto", "32", "64", "128"))
    assert "did you mean `scale_search`?" in said[7, "scale_serch"]
    assert "did you mean `float32`?" in said[9, "flot32"]
    assert "`seed`" in said[10, "-1"]


def test_a_duplicate_key_is_told_together_with_the_other_problems() -> None:
    said = places(refusal(COMPRESS + "seed: 1\nseed: 2\nsteeps: []\n", CompressRecipe))
    assert sorted((p.line, p.marked) for p in said) == [(6, "seed"), (7, "steeps")]


def test_an_unknown_key_far_from_every_other_lists_what_is_known() -> None:
    said = places(refusal(COMPRESS + "zzzzzz: 1\n", CompressRecipe))
    known = set(CompressRecipe.model_fields)
    assert known <= set(re.findall(r"\w+", said[0].says))


def test_a_missing_key_is_named_where_it_is_missing() -> None:
    text = "kind: compress\nseed: 1\nsteps:\n  - bits: 4\n"
    said = places(refusal(text, CompressRecipe))
    assert said == [Place(4, 5, "bits", "`method` is required")]


def test_a_missing_key_of_the_recipe_itself_is_named() -> None:
    assert [p.says for p in places(refusal("kind: compress\n", CompressRecipe))] == [
        "`steps` is required"
    ]


def test_a_key_that_is_no_text_is_named_once_at_its_place() -> None:
    said = places(refusal(COMPRESS + "true: 1\n1.5: 2\n", CompressRecipe))
    assert [(p.line, p.marked) for p in said] == [(5, "true"), (6, "1.5")]


def test_a_value_of_a_union_is_named_by_its_key_and_once() -> None:
    text = "kind: tune\ndeltas:\n  - type: lora\n    target_modules: 5\ndata:\n  train: x\n"
    said = places(refusal(text, TuneRecipe))
    assert {(p.line, p.column) for p in said} == {(4, 21)}
    everything = " ".join(p.says for p in said)
    assert "target_modules" in everything
    assert "list[str]" not in everything, "the name of a Python type is no word of a recipe"


@pytest.mark.parametrize("value", ["q_proj", "all_linear"])
def test_one_module_written_without_brackets_is_refused_with_both_ways_out(value: str) -> None:
    text = TUNE.replace("lora\n", f"lora\n    target_modules: {value}\n")
    said = " ".join(p.says for p in places(refusal(text, TuneRecipe)))
    assert "all-linear" in said
    assert "list[str]" not in said


def test_a_wrong_list_item_is_named_at_the_item() -> None:
    text = TUNE.replace("lora\n", "lora\n    layers: [0, one, 2]\n")
    said = places(refusal(text, TuneRecipe))
    assert [(p.line, p.column, p.marked) for p in said] == [(4, 17, "one")]


def test_an_empty_list_of_steps_is_refused_at_its_place() -> None:
    said = places(refusal("kind: compress\nsteps: []\n", CompressRecipe))
    assert [(p.line, p.column) for p in said] == [(2, 8)]


def test_a_recipe_of_another_kind_names_the_command_that_runs_it() -> None:
    said = places(refusal(COMPRESS, TuneRecipe))
    assert [(p.line, p.marked) for p in said] == [(1, "compress")]
    assert "`bmkit compress`" in said[0].says


def test_a_misspelt_kind_names_the_nearest() -> None:
    said = places(refusal(COMPRESS.replace("kind: compress", "kind: compres"), CompressRecipe))
    assert [(p.line, p.column) for p in said] == [(1, 7)]
    assert "did you mean `compress`?" in said[0].says


class Round(Model):
    """A variant of a tagged union."""

    method: Literal["round"]
    bits: int = 8


class Prune(Model):
    """Another variant."""

    method: Literal["prune"]
    sparsity: float = 0.5


class Union(Recipe):
    """A recipe with a tagged union, as engines with several methods have."""

    kind: Literal["compress"]
    steps: list[Annotated[Round | Prune, Field(discriminator="method")]]


def test_an_unknown_discriminator_names_the_nearest_at_its_value() -> None:
    text = "kind: compress\nsteps:\n  - method: prone\n    sparsity: 0.5\n"
    said = places(refusal(text, Union))
    assert [(p.line, p.column, p.marked) for p in said] == [(3, 13, "prone")]
    assert "did you mean `prune`?" in said[0].says
    assert "round" in said[0].says


def test_a_missing_discriminator_is_named() -> None:
    said = places(refusal("kind: compress\nsteps:\n  - sparsity: 0.5\n", Union))
    assert [(p.line, p.says) for p in said] == [(3, "`method` is required")]


def test_a_key_of_another_variant_is_unknown_and_only_its_own_are_offered() -> None:
    text = "kind: compress\nsteps:\n  - method: prune\n    bits: 8\n    sparsty: 1\n"
    said = {p.marked: p.says for p in places(refusal(text, Union))}
    assert set(said) == {"bits", "sparsty"}
    assert "sparsity" in said["bits"]
    assert "method" in said["bits"]
    assert "did you mean `sparsity`?" in said["sparsty"]


def test_a_wrong_value_inside_a_variant_is_named_at_its_place() -> None:
    text = "kind: compress\nsteps:\n  - method: prune\n  - method: round\n    bits: many\n"
    said = places(refusal(text, Union))
    assert [(p.line, p.column, p.marked) for p in said] == [(5, 11, "many")]
    assert "`bits`" in said[0].says


# --- gates ---------------------------------------------------------------------------------------


def test_a_gate_on_an_unknown_metric_is_named_at_its_line() -> None:
    text = TUNE + "seed: 1\ngates:\n  train_loss: {max: 2}\n  dev_los: {max: 1}\n"
    said = places(refusal(text, TuneRecipe))
    assert [(p.line, p.column, p.marked) for p in said] == [(9, 3, "dev_los")]
    assert "did you mean `dev_loss`?" in said[0].says


def test_a_gate_on_an_unknown_metric_is_told_together_with_the_other_problems() -> None:
    message = refusal(TUNE + "gates:\n  dev_los: {max: 1}\nseeed: 1\n", TuneRecipe)
    assert "dev_los" in message
    assert "seeed" in message


def test_two_gates_on_unknown_metrics_are_both_named() -> None:
    message = refusal(TUNE + "gates:\n  dev_los: {max: 1}\n  perplexity: {max: 1}\n", TuneRecipe)
    assert "`dev_los`" in message
    assert "`perplexity`" in message


def test_a_gate_in_a_stage_without_metrics_is_refused() -> None:
    assert "`speed`" in refusal("kind: infer\ngates: {speed: {min: 1}}\n", InferRecipe)


def test_a_gate_without_a_bound_is_named_at_its_line() -> None:
    said = places(refusal(TUNE + "gates:\n  train_loss: {}\n", TuneRecipe))
    assert [p.line for p in said] == [7]
    assert "`min` or `max`" in said[0].says


def test_a_gate_on_a_known_metric_is_accepted() -> None:
    found = accepted(TUNE + "  dev: held.jsonl\ngates:\n  dev_loss: {max: 1.5}\n", TuneRecipe)
    assert found.gates["dev_loss"].max == 1.5


def test_a_gate_on_held_out_rows_is_refused_where_there_are_none() -> None:
    said = places(refusal(TUNE + "gates:\n  dev_loss: {max: 1.5}\n", TuneRecipe))
    assert [p.line for p in said] == [7]
    assert "data.dev" in said[0].says


@pytest.mark.parametrize(
    ("more", "line", "word"),
    [
        ("train:\n  save_steps: 5\n  max_steps: 0\n", 8, "-1"),
        ("train:\n  save_steps: 5\n  early_stopping_patience: 2\n", 8, "data.dev"),
        ("train:\n  save_steps: 5\n  load_best_model_at_end: true\n", 8, "data.dev"),
        ("  labels: [yes, no, yes]\n", 6, "`yes`"),
        ("  labels: [yes]\n", 6, "`labels` needs 2 items at least"),
        ("  labels: yes\n", 6, "`labels` should be a list"),
        ("gates: {train_loss: 3}\n", 6, "`train_loss` should be a mapping"),
    ],
)
def test_what_would_train_in_vain_is_named_at_its_own_line(more: str, line: int, word: str) -> None:
    said = places(refusal(TUNE + more, TuneRecipe))
    assert [p.line for p in said] == [line]
    assert word in said[0].says


def test_a_name_that_is_none_is_refused_in_plain_words() -> None:
    text = TUNE.replace("type: lora", "{type: lora, name: a.b}")
    assert "`name` can't be `a.b`" in places(refusal(text, TuneRecipe))[0].says


def test_of_several_overrides_the_one_that_is_wrong_is_named() -> None:
    doc = recipe.parse(TUNE, "r.yaml")
    recipe.override(doc, ["train.max_steps=5", "train.early_stopping_patience=2"])
    with pytest.raises(RecipeError) as caught:
        recipe.validate(doc, TuneRecipe)
    assert "--set train.early_stopping_patience=2" in str(caught.value)
    assert "max_steps" not in str(caught.value)


def test_keys_that_contradict_each_other_are_named_at_the_line_of_one_of_them() -> None:
    said = places(refusal("kind: infer\n\ndo_sample: true\ntemperature: 0\n", InferRecipe))
    assert len(said) == 1
    assert said[0].line in {3, 4}


def test_a_contradiction_about_a_key_that_is_not_there_names_the_whole_key() -> None:
    text = """
kind: prompt
data: {test: rows.jsonl, labels: [bad, good]}
template: {text: 'It was {"mask"}'}
verbalizer: {label_words: {bad: [no], good: [yes]}}
"""
    multilabel = str(refusal(text + "task: multilabel\n", PromptRecipe))
    assert "`calibrate.type`: `task: multilabel` asks" in multilabel
    trained = text + "tune: {mode: delta}\nlearning_setting: {type: full}\n"
    assert "`tune.deltas`: `mode: delta` takes one" in str(refusal(trained, PromptRecipe))
    there = str(refusal(text + "task: multilabel\ncalibrate: {type: none}\n", PromptRecipe))
    assert "`calibrate.type`" not in there


# --- --set ---------------------------------------------------------------------------------------


def test_set_changes_a_key_inside_a_list_by_its_number() -> None:
    assert accepted(COMPRESS, CompressRecipe, "steps.0.bits=4").steps[0].bits == 4


def test_set_appends_at_the_number_after_the_last() -> None:
    text = "kind: infer\nstop_strings: [a]\n"
    found = accepted(text, InferRecipe, "stop_strings.1=b", "stop_strings.2=c")
    assert found.stop_strings == ["a", "b", "c"]


def test_set_replaces_an_item_and_keeps_the_others() -> None:
    text = "kind: infer\nstop_strings: [a, b, c]\n"
    assert accepted(text, InferRecipe, "stop_strings.1=x").stop_strings == ["a", "x", "c"]


@pytest.mark.parametrize("key", ["stop_strings.3", "stop_strings.1.x", "stop_strings.-1"])
def test_set_beyond_the_end_of_a_list_says_how_long_it_is(key: str) -> None:
    message = refusal("kind: infer\nstop_strings: [a]\n", InferRecipe, f"{key}=z")
    said = on_command_line(message)
    assert set(said) == {f"--set {key}=z"}
    assert "1 item" in said[f"--set {key}=z"]


def test_set_with_a_word_where_a_list_has_numbers_is_refused() -> None:
    said = on_command_line(refusal(COMPRESS, CompressRecipe, "steps.first.bits=4"))
    assert "`steps.first`" in said["--set steps.first.bits=4"]


@pytest.mark.parametrize("key", ["steps.².bits", "steps.٣.bits"])
def test_set_with_a_digit_that_is_no_ascii_digit_is_refused(key: str) -> None:
    assert set(on_command_line(refusal(COMPRESS, CompressRecipe, f"{key}=4"))) == {f"--set {key}=4"}


def test_set_makes_the_mapping_that_is_not_there() -> None:
    assert accepted(TUNE, TuneRecipe, "train.max_steps=3").train.max_steps == 3


def test_set_below_a_plain_value_says_that_it_holds_no_keys() -> None:
    said = on_command_line(refusal(TUNE + "seed: 1\n", TuneRecipe, "seed.x=1"))
    assert "`seed`" in said["--set seed.x=1"]


def test_set_with_an_unknown_key_is_named_at_the_flag_with_the_nearest() -> None:
    message = refusal(COMPRESS, CompressRecipe, "steps.0.bitz=4", "sead=1")
    said = on_command_line(message)
    assert "did you mean `bits`?" in said["--set steps.0.bitz=4"]
    assert "did you mean `seed`?" in said["--set sead=1"]
    assert places(message) == []


def test_set_with_a_wrong_value_is_named_at_the_flag_with_the_nearest() -> None:
    said = on_command_line(refusal(COMPRESS, CompressRecipe, "dtype=bfloat", "steps.0.bits=5"))
    assert "did you mean `bfloat16`?" in said["--set dtype=bfloat"]
    assert "4, 8" in said["--set steps.0.bits=5"]


def test_set_that_breaks_a_key_by_setting_something_inside_it_is_named_at_the_flag() -> None:
    message = refusal("kind: infer\n", InferRecipe, "system.words=3")
    assert set(on_command_line(message)) == {"--set system.words=3"}
    assert places(message) == []


def test_faults_of_the_file_and_of_set_are_told_together() -> None:
    message = refusal(COMPRESS + "sead: 1\n", CompressRecipe, "devise=cpu", "nothing", "seed=[1")
    assert [p.marked for p in places(message)] == ["sead"]
    assert set(on_command_line(message)) == {
        "--set devise=cpu",
        "--set nothing",
        "--set seed=[1",
    }
    assert message.startswith("r.yaml: 4 problems")


def test_a_duplicate_key_inside_the_value_of_set_is_refused() -> None:
    assign = "train={max_steps: 1, max_steps: 2}"
    message = refusal(TUNE, TuneRecipe, assign)
    assert f"--set {assign}" in message
    assert "max_steps" in message.replace(assign, "")


@pytest.mark.parametrize("assign", ["=3", " = 3", "steps"])
def test_set_without_a_key_or_a_value_shows_how_it_is_written(assign: str) -> None:
    said = on_command_line(refusal(COMPRESS, CompressRecipe, assign))
    assert "KEY=VALUE" in said[f"--set {assign}"]


def test_the_value_of_set_follows_the_same_yaml() -> None:
    found = accepted(TUNE, TuneRecipe, "train.learning_rate=1e-4", "data.dev=on")
    assert (found.train.learning_rate, found.data.dev) == (0.0001, "on")


def test_set_without_a_value_is_null() -> None:
    text = TUNE + "  dev: held-out.jsonl\n"
    assert accepted(text, TuneRecipe, "data.dev=").data.dev is None


def test_the_value_of_set_may_hold_equals_signs() -> None:
    assert accepted("kind: infer\n", InferRecipe, "system=a=b").system == "a=b"


def test_a_later_set_wins() -> None:
    assert accepted(COMPRESS, CompressRecipe, "seed=1", "seed=2").seed == 2


def test_the_recipes_in_the_page_on_tuning_are_valid() -> None:
    page = Path(__file__).parents[2] / "docs" / "tune.md"
    blocks = re.findall(r"```yaml\n(kind: tune\n.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for text in blocks:
        accepted(text, TuneRecipe)


# --- files, precedence, built-in recipes ---------------------------------------------------------


@pytest.fixture
def tune_file(tmp_path: Path) -> Path:
    """A tune recipe in a folder that isn't the working directory."""
    file = tmp_path / "recipes" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(
        "kind: tune\nseed: 1\ndeltas: [{type: lora}]\n"
        "data: {train: rows.jsonl, dev: ../dev.jsonl}\n"
    )
    return file


def test_a_path_in_a_recipe_is_relative_to_its_file(
    tune_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    data = load_recipe(Request("tune", str(tune_file), ""))[1].data  # type: ignore[attr-defined]
    assert Path(data.train) == tune_file.parent / "rows.jsonl"
    assert Path(data.dev).resolve() == tmp_path / "dev.jsonl"


def test_a_path_given_with_set_is_relative_to_the_working_directory(
    tune_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    request = Request("tune", str(tune_file), "", assign=("data.train=here.jsonl",))
    data = load_recipe(request)[1].data  # type: ignore[attr-defined]
    assert Path(data.train) == tmp_path / "here.jsonl"
    assert Path(data.dev).resolve() == tmp_path / "dev.jsonl"


def test_a_path_inside_a_mapping_given_with_set_is_relative_to_the_working_directory(
    tune_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    request = Request("tune", str(tune_file), "", assign=("data={train: here.jsonl}",))
    assert Path(load_recipe(request)[1].data.train) == tmp_path / "here.jsonl"  # type: ignore[attr-defined]


def test_a_builtin_path_names_a_file_that_ships_with_bmkit(tune_file: Path) -> None:
    for assign in ((), ("data.train=builtin:data/instructions-train.jsonl",)):
        request = Request("tune", "lora" if not assign else str(tune_file), "", assign=assign)
        train = Path(load_recipe(request)[1].data.train)  # type: ignore[attr-defined]
        assert train == builtin.directory() / "data" / "instructions-train.jsonl"
        assert train.is_file()


def test_an_absolute_path_stays_and_a_tilde_is_the_home_directory(
    tune_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assign = ("data.train=/data/a.jsonl", "data.dev=~/b.jsonl")
    data = load_recipe(Request("tune", str(tune_file), "", assign=assign))[1].data  # type: ignore[attr-defined]
    assert (data.train, data.dev) == ("/data/a.jsonl", "/home/somebody/b.jsonl")


def test_data_takes_the_place_of_train_and_drops_bmkits_own_held_out_rows(tmp_path: Path) -> None:
    request = Request("tune", "lora", "", data=str(tmp_path / "mine.jsonl"))
    data = load_recipe(request)[1].data  # type: ignore[attr-defined]
    assert (data.train, data.dev) == (str(tmp_path / "mine.jsonl"), None)


def test_data_takes_the_place_of_train_and_keeps_the_recipes_own_held_out_rows(
    tune_file: Path, tmp_path: Path
) -> None:
    request = Request("tune", str(tune_file), "", data=str(tmp_path / "mine.jsonl"))
    data = load_recipe(request)[1].data  # type: ignore[attr-defined]
    assert data.train == str(tmp_path / "mine.jsonl")
    assert Path(data.dev).resolve() == tmp_path / "dev.jsonl"


def test_data_as_a_directory_takes_the_place_of_every_split(
    tune_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "splits"
    folder.mkdir()
    (folder / "train.jsonl").write_text("{}\n")
    request = Request("tune", str(tune_file), "", data=str(folder))
    assert load_recipe(request)[1].data.dev is None  # type: ignore[attr-defined]
    (folder / "dev.jsonl").write_text("{}\n")
    data = load_recipe(request)[1].data  # type: ignore[attr-defined]
    assert (data.train, data.dev) == (str(folder / "train.jsonl"), str(folder / "dev.jsonl"))


def test_data_as_a_directory_without_a_train_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.jsonl"):
        load_recipe(Request("tune", "lora", "", data=str(tmp_path)))


def test_a_flag_wins_over_set_and_set_over_the_recipe(tune_file: Path) -> None:
    def seed(assign: tuple[str, ...] = (), flag: int | None = None) -> int:
        return load_recipe(Request("tune", str(tune_file), "", assign=assign, seed=flag))[1].seed

    assert seed() == 1
    assert seed(("seed=2",)) == 2
    assert seed(("seed=2",), 3) == 3
    assert seed(flag=0) == 0


def test_a_flag_of_one_stage_wins_over_set_as_well() -> None:
    request = Request(
        "infer", "greedy", "", assign=("max_new_tokens=5",), flags={"max_new_tokens": 7}
    )
    assert load_recipe(request)[1].max_new_tokens == 7  # type: ignore[attr-defined]


def test_a_wrong_flag_is_named_as_it_was_written() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(Request("infer", "greedy", "", flags={"max_new_tokens": 0}))
    assert set(on_command_line(str(caught.value))) == {"--max-new-tokens 0"}


def test_an_inline_recipe_is_checked_like_a_file() -> None:
    text = "- compress:\n    steps:\n      - method: quantize\n        bitts: 4\n"
    doc = recipe.part(recipe.parse(text, "p.yaml"), (0, "compress"))
    doc.data["kind"] = "compress"
    with pytest.raises(RecipeError, match="did you mean `bits`") as caught:
        load_recipe(Request("compress", doc, ""))
    assert "p.yaml:4:9" in str(caught.value)


def test_a_part_is_a_copy(tmp_path: Path) -> None:
    doc = recipe.parse("a:\n  b: 1\n", "x")
    recipe.part(doc, ("a",)).data["b"] = 2
    recipe.override(recipe.part(doc), ["a.b=3"])
    assert doc.data == {"a": {"b": 1}}
    assert not doc.overrides


def test_an_unknown_recipe_name_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="int9") as caught:
        load_recipe(Request("compress", "int9", ""))
    assert "`int" in str(caught.value.hint)


def test_a_recipe_file_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.yaml"):
        load_recipe(Request("compress", str(tmp_path / "gone.yaml"), ""))


def test_errors_of_a_file_name_the_file_with_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(COMPRESS + "sead: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(Request("compress", str(file), ""))
    assert f"{file}:5:1" in str(caught.value)


BUILTIN = [(stage, name) for stage in registry.STAGES for name in builtin.names(stage)]


@pytest.mark.parametrize(("stage", "name"), BUILTIN)
def test_every_builtin_recipe_is_valid_and_says_how_it_is_run(stage: str, name: str) -> None:
    found = load_recipe(Request(stage, name, ""))[1]
    assert found.kind == stage
    command = r"duplex \w+( TRANSCRIPT\.jsonl)?" if stage == "duplex" else stage
    assert re.search(rf"bmkit {command} {name}\b", builtin.first_line(stage, name))


def test_the_builtin_recipes_that_the_contract_names_are_there() -> None:
    assert {("compress", "int8"), ("compress", "int4"), ("tune", "lora"), ("infer", "greedy")} <= (
        set(BUILTIN)
    )


@pytest.mark.parametrize("stage", list(registry.STAGES))
def test_every_key_of_a_recipe_says_what_it_means(stage: str) -> None:
    schema = registry.load(registry.STAGES[stage].recipe).model_json_schema()
    models = [schema, *schema.get("$defs", {}).values()]
    silent = [
        f"{m['title']}.{key}"
        for m in models
        for key, value in m.get("properties", {}).items()
        if not value.get("description")
        and key not in {"kind", "method", "type", "min", "max"}
        and "$ref" not in json.dumps(value)
    ]
    assert silent == []
