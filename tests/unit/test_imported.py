"""Experiments of OpenPrompt become recipes, and what can't be converted is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bmkit.data.classes import Classes
from bmkit.data.columns import read_rows
from bmkit.errors import InputError
from bmkit.prompt.recipe import PromptRecipe
from bmkit.prompting.imported import TEMPLATES, VERBALIZERS, convert
from bmkit.prompting.processors import DATASETS

FEW_SHOT = """
dataset: {name: agnews, path: data/agnews/}
plm:
  model_name: bert
  model_path: bert-large-cased
  optimize: {freeze_para: false, lr: 0.00003, weight_decay: 0.01,
             scheduler: {type: , num_warmup_steps: 500}}
train: {batch_size: 2, num_epochs: 4, max_grad_norm: -1.0}
dev: {batch_size: 8}
template: manual_template
verbalizer: manual_verbalizer
manual_template: {choice: 2, file_path: agnews/manual_template.txt}
one2one_verbalizer: {choice: 0, file_path: other.txt}
manual_verbalizer:
  parent_config: verbalizer
  label_words: {World: [politics], Sports: [sports], Business: [business], Tech: [technology]}
  prefix: ""
  multi_token_handler: mean
dataloader: {max_seq_length: 128, truncate_method: tail}
environment: {num_gpus: 2, cuda_visible_devices: [0, 1]}
reproduce: {seed: 100}
learning_setting: few_shot
few_shot: {parent_config: learning_setting, few_shot_sampling: sampling_from_train}
sampling_from_train:
  parent_config: few_shot_sampling
  num_examples_per_label: 10
  also_sample_dev: true
  num_examples_per_label_dev: 10
  seed: [123, 124]
"""


def test_a_few_shot_experiment_becomes_a_recipe() -> None:
    recipe, notes = convert(yaml.safe_load(FEW_SHOT))
    assert recipe == {
        "kind": "prompt",
        "task": "classification",
        "seed": 100,
        "data": {
            "train": "data/agnews/train.csv",
            "test": "data/agnews/test.csv",
            "columns": {"label": 0, "text_a": 1, "text_b": 2},
            "labels": {"1": "World", "2": "Sports", "3": "Business", "4": "Tech"},
        },
        "template": {
            "file_path": "agnews/manual_template.txt",
            "choice": 2,
            "max_seq_length": 128,
            "truncate_method": "tail",
        },
        "verbalizer": {
            "type": "manual",
            "label_words": {
                "World": ["politics"],
                "Sports": ["sports"],
                "Business": ["business"],
                "Tech": ["technology"],
            },
            "prefix": "",
            "multi_token_handler": "mean",
        },
        "learning_setting": {
            "type": "few_shot",
            "num_examples_per_label": 10,
            "seeds": [123, 124],
        },
        "tune": {"mode": "full"},
        "train": {
            "learning_rate": 0.00003,
            "weight_decay": 0.01,
            "warmup_steps": 500,
            "num_train_epochs": 4,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 8,
        },
    }
    assert [note.split(":")[0] for note in notes] == [
        "data",
        "template",
        "train",
        "the model is no part of a recipe",
        "environment",
    ]
    assert "-m bert-large-cased" in notes[3]


def with_(**sections: Any) -> tuple[dict[str, Any], list[str]]:
    base = {
        "plm": {"optimize": {"freeze_para": True}},
        "dataset": {"name": "sst-2", "path": "sst2"},
        "template": "manual_template",
        "manual_template": {"text": "<text_a> It was <mask>."},
        "verbalizer": "manual_verbalizer",
        "manual_verbalizer": {"label_words": [["bad"], ["good"]]},
        "learning_setting": "full",
    }
    return convert(base | sections)


def test_the_first_language_of_templates_becomes_pieces() -> None:
    text = with_()[0]["template"]["text"]
    assert text == '{"placeholder": "text_a"} It was {"mask"}.'


def test_zero_shot_trains_nothing() -> None:
    recipe, _ = with_(learning_setting="zero_shot", plm={"optimize": {"freeze_para": False}})
    assert recipe["learning_setting"] == {"type": "zero_shot"}
    assert recipe["tune"] == {"mode": "none"}
    assert "train" not in recipe


@pytest.mark.parametrize(
    ("name", "section", "tune"),
    [
        ("manual_template", {}, {"mode": "none"}),
        ("mixed_template", {"optimize": {"lr": 0.003}}, {"mode": "soft", "learning_rate": 0.003}),
        (
            "soft_template",
            {"num_tokens": 7, "initialize_from_vocab": True, "random_range": 0.5},
            {"mode": "delta", "deltas": [{"type": "prompt", "num_virtual_tokens": 7}]},
        ),
        ("ptuning_template", {"prompt_encoder_type": "mlp"}, {"mode": "soft", "encoder": "mlp"}),
        ("ptuning_template", {}, {"mode": "soft", "encoder": "lstm"}),
        ("ptr_template", {}, {"mode": "soft", "encoder": "mlp"}),
        (
            "prefix_tuning_template",
            {"num_token": 5, "mid_dim": 512, "prefix_dropout": 0.0},
            {
                "mode": "delta",
                "deltas": [
                    {
                        "type": "prefix",
                        "num_virtual_tokens": 5,
                        "prefix_projection": True,
                        "encoder_hidden_size": 512,
                    }
                ],
            },
        ),
    ],
)
def test_what_a_template_trains_beside_a_frozen_model(
    name: str, section: dict[str, Any], tune: dict[str, Any]
) -> None:
    recipe, notes = with_(template=name, **{name: {"text": "x", **section}})
    assert recipe["tune"] == tune
    assert notes == []
    free, _ = with_(
        template=name, plm={"optimize": {"freeze_para": False}}, **{name: {"text": "x", **section}}
    )
    assert free["tune"] == {**tune, "mode": "full"}


def test_what_trains_vectors_in_front_has_the_rate_of_all() -> None:
    soft = {"soft_template": {"text": "x", "optimize": {"lr": 0.3}}}
    recipe, notes = with_(template="soft_template", **soft)
    assert recipe["train"]["learning_rate"] == 0.3 and notes == []
    assert "learning_rate" not in recipe["tune"]
    free = {"plm": {"optimize": {"freeze_para": False, "lr": 1e-5}}}
    recipe, notes = with_(template="soft_template", **soft, **free)
    assert recipe["train"]["learning_rate"] == 1e-5
    assert "were trained at 0.3" in notes[0]


def test_what_an_experiment_does_not_say_is_openprompts_default() -> None:
    few = {"learning_setting": "few_shot", "few_shot": {"few_shot_sampling": "x"}}
    recipe, _ = with_(plm={"optimize": {}}, **few)
    assert recipe["train"] == {
        "learning_rate": 5e-4,
        "weight_decay": 0.01,
        "warmup_steps": 500,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 2,
    }
    assert recipe["template"]["max_seq_length"] == 256
    assert recipe["learning_setting"]["num_examples_per_label"] == 10


def test_deltas_of_a_conversion_are_deltas_of_recipes() -> None:
    from pydantic import TypeAdapter

    from bmkit.deltas.recipe import Delta

    for name in ("soft_template", "prefix_tuning_template"):
        for delta in with_(template=name, **{name: {"text": "x"}})[0]["tune"]["deltas"]:
            TypeAdapter(Delta).validate_python(delta, strict=True)


def test_options_of_other_verbalizers_are_renamed() -> None:
    recipe, notes = with_(
        verbalizer="automatic_verbalizer",
        automatic_verbalizer={
            "num_cadidates": 1000,
            "label_word_num_per_class": 2,
            "num_searches": 1,
            "score_fct": "ce",
            "balance": True,
            "num_classes": 4,
            "init_using_split": "train",
        },
    )
    assert recipe["verbalizer"] == {
        "type": "automatic",
        "num_candidates": 1000,
        "words_per_label": 2,
        "balanced": True,
    }
    assert notes == [
        "verbalizer: words are searched by their likelihood ratio only",
        "automatic_verbalizer.init_using_split: 'train' was left out",
    ]


def test_calibration_is_taken_over() -> None:
    contextual, notes = with_(
        calibrate="contextualized_calibrate",
        contextualized_calibrate={"num_example": 200, "use_split": "train"},
    )
    assert contextual["calibrate"] == {"type": "contextual", "num_examples": 200}
    assert "never used it" in notes[0]
    dev = {"num_example": 9, "use_split": "dev"}
    _, notes = with_(calibrate="contextualized_calibrate", contextualized_calibrate=dev)
    assert any("not of `dev`" in note for note in notes)
    empty, _ = with_(calibrate="pmi_calibrate", pmi_calibrate={"parent_config": "calibrate"})
    assert empty["calibrate"] == {"type": "content_free"}


SEARCH: dict[str, Any] = {
    "classification": {"parent_config": "task", "auto_t": True, "auto_v": True},
    "template_generator": {
        "plm": {"model_name": "t5", "model_path": "t5-large"},
        "max_length": 18,
        "target_number": 2,
        "beam_width": 12,
        "length_limit": None,
    },
    "verbalizer_generator": {
        "candidate_num": 40,
        "label_word_num_per_class": 7,
        "score_fct": "llr",
        "normalize": True,
    },
    "lmbff_template": {
        "text": '{"placeholder": "text_a"} {"mask"} {"meta": "labelword"} {"mask"}',
    },
}
GAPS = '{"placeholder": "text_a"} {"special": "<extra_id_0>"} {"mask"} {"special": "<extra_id_1>"}'


def test_a_search_of_lm_bff_becomes_a_search() -> None:
    recipe, notes = with_(**SEARCH)
    assert recipe["search"] == {
        "num_candidates": 40,
        "model": "t5-large",
        "beam_width": 12,
        "max_new_tokens": 18,
        "num_templates": 12,
        "forms": [GAPS],
        "num_combinations": 7,
    }
    (note,) = notes
    assert "search.num_trained" in note
    PromptRecipe.model_validate(recipe | {"data": {"train": "a.tsv", **recipe["data"]}})


def test_what_isnt_searched_isnt_read_or_told() -> None:
    flags = {"classification": {"parent_config": "task", "auto_t": False, "auto_v": False}}
    recipe, notes = with_(**(SEARCH | flags))
    assert "search" not in recipe
    assert notes == []
    words, _ = with_(**(SEARCH | {"classification": {"auto_v": True}}))
    assert words["search"] == {"num_candidates": 40, "num_combinations": 7}


def test_a_search_whose_gaps_or_model_arent_said_tells_so() -> None:
    generator = {"template_generator": {"beam_width": 3}}
    asked = {"classification": {"auto_t": True}}
    for lmbff in ({"file_path": "initial.txt", "choice": 0}, {"text": "It was <mask>."}):
        recipe, notes = with_(**(SEARCH | generator | asked | {"lmbff_template": lmbff}))
        assert recipe["search"] == {"num_candidates": 0, "beam_width": 3, "num_templates": 3}
        assert "search.model" in notes[0]
        assert str(next(iter(lmbff.values()))) in notes[1]


def test_a_template_to_be_written_is_tried_without_what_is_written() -> None:
    recipe, _ = with_(template="lmbff_template", lmbff_template=SEARCH["lmbff_template"])
    assert recipe["template"]["text"] == '{"placeholder": "text_a"} {"mask"}'


def test_all_that_is_left_out_is_said() -> None:
    recipe, notes = with_(
        task="generation",
        verbalizer=None,
        generation={"parent_config": "task", "max_length": 320, "num_beams": 5},
        train={"teacher_forcing": True, "shuffle_data": False},
        logging={"path_base": "logs", "overwrite": True},
        dataset={"name": "webnlg", "path": "data"},
        unheard={"of": 1},
    )
    assert recipe["task"] == "generation"
    assert "verbalizer" not in recipe
    said = "\n".join(notes)
    for left in (
        "the columns of `webnlg` aren't known",
        "generation.max_length: 320 was left out",
        "generation.num_beams: 5 was left out",
        "train.teacher_forcing: True was left out",
        "train.shuffle_data: False was left out",
        "logging: left out; -o says where",
        "unheard.of: 1 was left out",
    ):
        assert left in said
    assert said.count("logging") == 1
    assert "manual_verbalizer" not in said  # it wasn't selected


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"kind": "tune"}, "no experiment of OpenPrompt"),
        ([], "no experiment of OpenPrompt"),
        ({"template": "manual_templat", "verbalizer": None}, "`manual_templat` is no template"),
        (
            {"template": "manual_template", "verbalizer": "x"},
            "`x` is no verbalizer of OpenPrompt",
        ),
        (
            {"template": "manual_template", "learning_setting": "few"},
            "`few` is none of OpenPrompt's",
        ),
        ({"template": "manual_template", "plm": 3, "train": "x", "dataset": None}, None),
    ],
)
def test_what_is_no_experiment_is_refused(config: Any, told: str | None) -> None:
    if told is None:
        convert(config)
        return
    with pytest.raises(InputError) as caught:
        convert(config)
    assert told in str(caught.value)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("verbalizer", VERBALIZERS)
def test_every_template_goes_with_every_verbalizer(template: str, verbalizer: str) -> None:
    recipe, _ = with_(template=template, verbalizer=verbalizer, **{template: {"text": "x"}})
    assert recipe["verbalizer"]["type"] == VERBALIZERS[verbalizer]
    assert yaml.safe_load(yaml.safe_dump(recipe)) == recipe


@pytest.mark.parametrize("name", ["boolq", "cb", "rte", "copa", "multirc", "wic", "wsc"])
def test_columns_and_labels_of_tasks_read_their_rows(name: str, rows: Callable[..., Path]) -> None:
    sample: dict[str, dict[str, Any]] = {
        "boolq": {"question": "q", "passage": "p", "label": True},
        "cb": {"premise": "p", "hypothesis": "h", "label": "neutral"},
        "rte": {"premise": "p", "hypothesis": "h", "label": "not_entailment"},
        "copa": {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 1},
        "multirc": {
            "passage": {
                "text": "t",
                "questions": [{"question": "q", "answers": [{"text": "a", "label": 1}]}],
            }
        },
        "wic": {"word": "w", "sentence1": "a", "sentence2": "b", "label": False},
        "wsc": {"text": "t", "target": {"span1_text": "a", "span2_text": "b"}, "label": True},
    }
    known = DATASETS[name]
    labels = known.labels if isinstance(known.labels, dict) else list(known.labels)  # type: ignore[arg-type]
    (found,) = read_rows(rows("x.jsonl", sample[name]), known.columns)
    assert Classes.of(labels).number(found) in range(len(labels))
    assert json.dumps(found.values["text_a"])


def test_reading_data_and_words_and_converting_need_no_torch() -> None:
    modules = "data.columns data.shots prompting.wordfiles prompting.generation prompting.imported"
    script = "\n".join(f"import bmkit.{name}" for name in modules.split())
    script += "\nimport sys\nassert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
