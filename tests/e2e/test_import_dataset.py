"""`bmkit import dataset`: what the `datasets` library reads becomes rows that stages take."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

Run = Callable[..., subprocess.CompletedProcess[str]]
LABELS = ClassLabel(names=["negative", "positive"])


def reviews(count: int, label: int | None = None) -> Dataset:
    rows = {
        "sentence": [f"sentence {i} é" for i in range(count)],
        "label": [i % 2 if label is None else label for i in range(count)],
    }
    return Dataset.from_dict(rows, Features({"sentence": Value("string"), "label": LABELS}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the folder of a saved dataset of three splits."""
    splits = {"train": reviews(6), "validation": reviews(4), "test": reviews(3, label=-1)}
    DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_saved_dataset_becomes_splits_with_names_of_classes(
    bmkit: Run, saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    said = json.loads(bmkit("import", "dataset", str(saved), "-o", str(out), "--json").stdout)
    assert said["kind"] == "data"
    assert said["metrics"] == {"rows_train": 6, "rows_dev": 4, "rows_test": 3}
    assert lines(out / "train.jsonl")[:2] == [
        {"sentence": "sentence 0 é", "label": "negative"},
        {"sentence": "sentence 1 é", "label": "positive"},
    ]
    assert lines(out / "test.jsonl")[0] == {"sentence": "sentence 0 é"}  # -1: it isn't told
    again = json.loads(bmkit("import", "dataset", str(saved), "-o", str(out), "--json").stdout)
    assert again["reused"] and again["digest"] == said["digest"]
    shown = json.loads(bmkit("show", str(out), "--json").stdout)
    assert shown["kind"] == "data"


def test_a_prompt_is_measured_on_what_was_imported(
    bmkit: Run, saved: Path, tiny: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "data", tmp_path / "recipe.yaml"
    bmkit("import", "dataset", str(saved), "-o", str(out), "--split", "train", "--split", "dev")
    recipe.write_text(
        "kind: prompt\n"
        f"data:\n  test: {out}/dev.jsonl\n  columns: {{text_a: sentence, label: label}}\n"
        "  labels: [negative, positive]\n"
        """template: {text: '{"placeholder": "text_a"} It was {"mask"}'}\n"""
        'verbalizer:\n  label_words: {negative: "<!>b", positive: "<!>g"}\n'
    )
    asked = ("prompt", str(recipe), "-m", str(tiny), "-o", str(tmp_path / "p"), "--json")
    metrics = json.loads(bmkit(*asked).stdout)["metrics"]
    assert metrics["rows"] == 4


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl"])
def test_a_single_file_is_a_split_for_training(bmkit: Run, tmp_path: Path, suffix: str) -> None:
    rows, file = reviews(5), tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        rows.to_parquet(str(file))
    elif suffix == "jsonl":
        rows.to_json(str(file))
    else:
        rows.to_csv(str(file), sep="\t" if suffix == "tsv" else ",")
    out = tmp_path / "data"
    bmkit("import", "dataset", str(file), "-o", str(out), "--limit", "2")
    assert [row["sentence"] for row in lines(out / "train.jsonl")] == [
        "sentence 0 é",
        "sentence 1 é",
    ]


def test_a_changed_file_is_read_again(bmkit: Run, tmp_path: Path) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "data"
    file.write_text('{"text": "a"}\n')
    bmkit("import", "dataset", str(file), "-o", str(out))
    file.write_text('{"text": "b"}\n')
    refused = bmkit("import", "dataset", str(file), "-o", str(out))
    assert refused.returncode == 3 and "--force" in refused.stderr
    bmkit("import", "dataset", str(file), "-o", str(out), "--force")
    assert lines(out / "train.jsonl") == [{"text": "b"}]


def test_nested_labels_dates_and_what_json_lacks(bmkit: Run, tmp_path: Path) -> None:
    day = datetime.date(2026, 11, 27)
    Dataset.from_dict(
        {"tags": [[0, 1]], "day": [day], "raw": [b"\xff"], "score": [float("nan")]},
        Features(
            {
                "tags": Sequence(LABELS),
                "day": Value("date32"),
                "raw": Value("binary"),
                "score": Value("float64"),
            }
        ),
    ).save_to_disk(str(tmp_path / "saved"))
    out = tmp_path / "data"
    said = bmkit("import", "dataset", str(tmp_path / "saved"), "-o", str(out))
    assert lines(out / "train.jsonl") == [
        {"tags": ["negative", "positive"], "day": "2026-11-27", "score": None}
    ]
    assert "`raw`" in said.stderr


def test_what_cannot_be_read_is_refused(bmkit: Run, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"

    def refused(*arguments: str) -> tuple[int, str]:
        done = bmkit("import", "dataset", *arguments, "-o", str(out))
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    code, said = refused(str(saved), "--split", "tain")
    assert code == 3 and "`tain`" in said and "train" in said
    code, said = refused("nobody/nothing-at-all")
    assert code == 4 and "nobody/nothing-at-all" in said
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    code, said = refused(str(tmp_path / "broken.parquet"))
    assert code == 3 and "broken.parquet" in said
    (tmp_path / "empty.jsonl").write_text("")
    assert refused(str(tmp_path / "empty.jsonl"))[0] == 3
    (tmp_path / "notes.txt").write_text("text")
    code, said = refused(str(tmp_path / "notes.txt"))
    assert code == 3 and ".parquet" in said
    (tmp_path / "folder").mkdir()
    assert refused(str(tmp_path / "folder"))[0] == 3
    assert not out.exists() and not list(tmp_path.glob(".*.partial"))
