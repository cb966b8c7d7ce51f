"""Pipelines: every value is checked where it stands, paths are the file's, lineage runs again."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmkit.artifact import Step
from bmkit.errors import InputError, RecipeError
from bmkit.pipeline import chain


def faults(tmp_path: Path, text: str) -> str:
    """Return what is said of a pipeline that is wrong."""
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        chain.check(chain.read(str(tmp_path / "p.yaml")))
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [
        ("- pull: a\n- infer: greedy\n  prompt: 5\n", "3:11", "`prompt`"),
        ("- pull: a\n- compress: int8\n  set: [a]\n", "3:8", "`set`"),
        ("- pull: a\n- infer: greedy\n  prompt: x\n  adapters: foo\n", "4:13", "`adapters`"),
        ("- pull: a\n- infer: greedy\n", "2:3", "prompt"),
        ("- pull: a\n- infer: greedy\n  prompt: x\n  input: y\n", "2:3", "one of"),
        ("- pull: a\n- tune: lora\n  seed: -1\n", "3:9", "seed"),
        ("- pull: a\n- tune: lora\n  sead: 1\n", "3:3", "did you mean `seed`"),
        ("- pull: 5\n", "1:9", "pull"),
        ("- pull: a\n- tune: lora\n  model: [1]\n", "3:10", "`model`"),
        ("- pull: a\n- infer: greedy\n  prompt: x\n  max_new_tokens: 0\n", "4:19", "greater"),
        ("- pull: a\n- compress:\n    steps: []\n    sed: 1\n", "4:5", "did you mean `seed`"),
        ("- pull: a\n- compress:\n    seed: x\n    steps:\n", "3:11", "seed"),
        ("- pull: a\n- duplex: starter\n  model: b\n", "2:3", "`duplex-eval` measures one"),
        ("- duplex: starter\n- duplex-eval: eval\n", "2:3", "needs `pull` or `model`"),
        ("- pull: a\n- duplex-eval:\n    evil: {}\n", "3:5", "did you mean `eval`"),
    ],
)
def test_every_fault_is_named_where_it_stands(
    tmp_path: Path, text: str, place: str, word: str
) -> None:
    said = faults(tmp_path, text)
    assert f"p.yaml:{place}" in said
    assert word in said
    assert "^" in said


def test_faults_of_all_stages_are_named_at_once(tmp_path: Path) -> None:
    text = "- pull: a\n- compress: {steps: 1}\n- tune: lora\n  set: {train.max_stebs: 1}\n"
    said = faults(tmp_path, text)
    assert "stage 2" in said
    assert "stage 3" in said
    assert "max_steps" in said


def test_paths_are_relative_to_the_file_where_something_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there" / "ckpt").mkdir(parents=True)
    (tmp_path / "there" / "delta").mkdir()
    (tmp_path / "there" / "int8").mkdir()  # a directory is no recipe
    (tmp_path / "there" / "rows.jsonl").touch()
    (tmp_path / "there" / "p.yaml").write_text(
        "- pull: ckpt\n- compress: int8\n  out: small\n"
        "- infer: greedy\n  input: rows.jsonl\n  adapters: [delta, owner/name]\n"
    )
    monkeypatch.chdir(tmp_path)
    pull, compress, infer = chain.read("there/p.yaml")
    here = tmp_path / "there"
    assert pull.recipe == str(here / "ckpt")
    assert compress.recipe == "int8"
    assert compress.options["out"] == str(here / "small")
    assert infer.options["input"] == str(here / "rows.jsonl")
    assert infer.options["adapters"] == [str(here / "delta"), "owner/name"]


def test_what_a_merge_has_made_has_no_pipeline_and_it_is_said_why() -> None:
    steps = [
        Step(stage="tune", name="lora", key="a", recipe={"kind": "tune"}, inputs={}),
        Step(stage="merge", name="merge", key="b", recipe={"weights": None}, inputs={}),
    ]
    assert [list(item) for item in chain.lineage(steps[:1])] == [["tune"]]
    with pytest.raises(InputError, match="`bmkit merge`"):
        chain.lineage(steps)
