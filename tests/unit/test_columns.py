"""Rows of JSON lines, CSV and TSV under the names that a template uses."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmkit.data.columns import map_columns, read_rows
from bmkit.data.tabular import Record, split_files
from bmkit.errors import InputError, RecipeError

Write = Callable[..., Path]
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write bytes or text to a file in `tmp_path`."""

    def put(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return put


def values(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    return [record.values for record in read_rows(*args, **kwargs)]


def refusal(path: Path, columns: Any = None, **kwargs: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read_rows(path, columns, **kwargs)
    return caught.value


def test_columns_without_a_header_are_numbers(write: Write) -> None:
    path = write("x.tsv", 'a "fine" film\t1\n\n"half of a quote\t0\n')
    found = read_rows(path, {"text_a": 0, "label": 1})
    assert [r.values for r in found] == [
        {"text_a": 'a "fine" film', "label": "1"},
        {"text_a": '"half of a quote', "label": "0"},
    ]
    assert [(r.line, r.where) for r in found] == [(1, f"{path}:1"), (3, f"{path}:3")]


def test_a_table_without_a_header_is_read_by_numbers_if_nothing_is_named(write: Write) -> None:
    path = write("x.csv", "a,b\nc,d\n")
    assert values(path, header=False) == [{"0": "a", "1": "b"}, {"0": "c", "1": "d"}]
    assert values(path) == [{"a": "c", "b": "d"}]


def test_columns_with_a_header_have_names_and_the_others_keep_theirs(write: Write) -> None:
    path = write("x.csv", "text,label,source\ngood,yes,web\n")
    mapped = values(path, {"text_a": "text", "meta.from": "source"})
    assert mapped == [
        {"text": "good", "label": "yes", "source": "web", "text_a": "good", "meta": {"from": "web"}}
    ]
    assert values(path, {"text": "source"})[0]["text"] == "web"
    assert values(path, {"text_a": 0}, header=True)[0]["text_a"] == "good"


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_csv_is_read_as_python_writes_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    kept = [row for row in rows if any(cell.strip() for cell in row)]
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("a", "b"), *kept])
    if kept:
        assert [(v["a"], v["b"]) for v in values(path)] == kept


def test_a_quoted_value_may_hold_line_ends_and_rows_keep_their_first_line(write: Write) -> None:
    path = write("x.csv", 'a,b\r\n"one\ntwo, three",1\r\n"four ""five""",2\r\n')
    found = read_rows(path)
    assert [r.values["a"] for r in found] == ["one\ntwo, three", 'four "five"']
    assert [r.line for r in found] == [2, 4]
    raw = values(write("y.tsv", 'a\tb\n"one"\t1\n'))
    quoted = values(write("y.tsv", 'a\tb\n"one"\t1\n'), quoted=True)
    assert (raw[0]["a"], quoted[0]["a"]) == ('"one"', "one")


def test_paths_lead_into_nested_rows_and_a_key_with_a_dot_goes_first(write: Write) -> None:
    row = {"p": {"text": "inside", "a.b": 3}, "p.x": "outside", "choices": ["one", "two"]}
    path = write("x.jsonl", json.dumps(row))
    columns = {"text_a": "p.text", "x": "p.x", "second": "choices.1", "meta.y": "p.a.b"}
    found = values(path, columns)[0]
    assert (found["text_a"], found["x"], found["second"]) == ("inside", "outside", "two")
    assert found["meta"] == {"y": 3}


def test_a_star_makes_a_row_of_each_item_of_nested_lists(write: Write) -> None:
    row = {
        "text": "t",
        "questions": [
            {"q": "q1", "answers": [{"a": "x", "l": 0}, {"a": "y", "l": 1}]},
            {"q": "q2", "answers": [{"a": "z", "l": 1}]},
        ],
    }
    path = write("x.jsonl", json.dumps(row) + "\n" + json.dumps({**row, "questions": []}))
    columns = {
        "text_a": "text",
        "text_b": "questions.*.q",
        "answer": "questions.*.answers.*.a",
        "label": "questions.*.answers.*.l",
    }
    found = [(v["text_a"], v["text_b"], v["answer"], v["label"]) for v in values(path, columns)]
    assert found == [("t", "q1", "x", 0), ("t", "q1", "y", 1), ("t", "q2", "z", 1)]


def test_rows_from_elsewhere_may_lack_a_label_and_have_our_names() -> None:
    columns = {"text_a": 0, "label": 1, "meta.word": "w"}

    def mapped(**held: Any) -> list[dict[str, Any]]:
        record = Record("stdin:1", 1, held)
        found = map_columns(record, columns, keep=False, optional=["label"], ours_too=True)
        return [r.values for r in found]

    assert mapped(text_a="t", w="x", label="1") == [
        {"text_a": "t", "label": "1", "meta": {"word": "x"}}
    ]
    assert mapped(**{"0": "t", "1": "1", "w": "x"}) == [
        {"text_a": "t", "label": "1", "meta": {"word": "x"}}
    ]
    assert mapped(**{"0": "t", "w": "x"}) == [{"text_a": "t", "meta": {"word": "x"}}]
    with pytest.raises(InputError, match="stdin:1: it has no `text_a`"):
        mapped(sentence="t", gold="1", w="x")  # a number is no place in an object
    assert mapped(text_a="t", meta={"word": "x"})[0]["meta"] == {"word": "x"}
    short = Record("", 1, {"text_a": "t"})
    (found,) = map_columns(short, {"text_a": 0, "label": 1}, optional=["label"])
    assert found.values == {"text_a": "t"}
    nested = Record("", 1, {"answers": [{"label": "1"}], "label": "0"})
    (found,) = map_columns(nested, {"label": "answers.*.label"}, ours_too=True)
    assert found.values["label"] == "1"
    swapped = Record("", 1, {"text_a": "1", "text_b": "2"})
    (found,) = map_columns(swapped, {"text_a": "text_b", "text_b": "text_a"}, ours_too=True)
    assert found.values == {"text_a": "2", "text_b": "1"}
    named = {"text_a": "sentence", "label": "gold"}
    without = Record("stdin:1", 1, {"sentence": "t"})
    (found,) = map_columns(without, named, optional=["label"])
    assert found.values == {"sentence": "t", "text_a": "t"}
    with pytest.raises(InputError, match="stdin:1: it has no column `gold`"):
        list(map_columns(without, named))


def test_the_same_rows_are_read_plain_compressed_and_as_a_json_list(
    write: Write, tmp_path: Path
) -> None:
    rows = [{"a": "é", "b": 1}, {"a": "f", "b": None}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert values(write("x.jsonl", lines)) == rows
    assert values(write("x.jsonl.gz", gzip.compress(lines))) == rows
    assert values(write("y.json", lines)) == rows
    assert values(write("z.json", "\ufeff " + json.dumps(rows))) == rows
    assert read_rows(tmp_path / "z.json")[1].where == f"{tmp_path / 'z.json'}, row 2"


def test_a_byte_order_mark_is_passed_over(write: Write) -> None:
    assert values(write("x.csv", "\ufeffa,b\n1,2\n")) == [{"a": "1", "b": "2"}]


def test_a_folder_has_a_file_for_each_split(write: Write, tmp_path: Path) -> None:
    for name in ("train.jsonl", "validation.csv.gz", "test.tsv", "README.md", "other.csv"):
        write(name, "x")
    found = {split: path.name for split, path in split_files(tmp_path).items()}
    assert found == {"train": "train.jsonl", "dev": "validation.csv.gz", "test": "test.tsv"}
    write("dev.csv", "x")
    with pytest.raises(InputError, match=r"two files for `dev`: dev.csv and validation.csv.gz"):
        split_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.csv", "a,b\n1,2\n1,2,3\n", ":3: it has 3 columns, line 1 has 2"),
        ("x.tsv", "a\tb\n1\n", ":2: it has 1 column, line 1 has 2"),
        ("x.csv", b"a,b\n1,2\n\xff,3\n", ":3: it is not UTF-8"),
        ("x.csv", 'a,b\n1,2\n"1"x,3\n', ":3: it is not a row"),
        ("x.csv", 'a,b\n"open,3\nb,4\n', ":2: it is not a row"),
        ("x.csv", "a,a\n1,2\n", ":1: two columns are called `a`"),
        ("x.csv", "a,b\n", "holds no rows"),
        ("x.csv", "", "holds no rows"),
        ("x.json", "[]", "holds no rows"),
        ("x.json", "[1]", ", row 1: it is not a JSON object"),
        ("x.json", "[{]", "it is not JSON"),
        ("x.jsonl", '{"a": 1}\n{"a"\n', ":2: it is not JSON"),
        ("x.jsonl.gz", b"no gzip", "not a whole gzip file"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "not a whole gzip file"),
        ("x.parquet", "a", "rows are read from .jsonl"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line(
    write: Write, name: str, content: str | bytes, told: str
) -> None:
    path = write(name, content)
    error = str(refusal(path))
    assert str(path) in error
    assert told in error


def test_a_missing_column_is_told_with_those_that_there_are(write: Write) -> None:
    path = write("x.jsonl", '{"passage": {"text": "t"}, "label": 0}\n{"passage": {}, "label": 0}')
    error = refusal(path, {"text_a": "passage.txt"})
    assert str(error) == f"{path}:1: it has no column `passage.txt`, which is to be `text_a`"
    assert error.hint == "did you mean `passage.text`? There are `passage.text`, `label`"
    assert f"{path}:2: " in str(refusal(path, {"text_a": "passage.text"}))
    assert "`passage.*.text`" in str(refusal(path, {"text_a": "passage.*.text"}))
    table = write("x.tsv", "a\tb\n")
    error = refusal(table, {"text_a": 2})
    assert str(error) == f"{table}:1: it has no column 2, which is to be `text_a`"
    assert error.hint == "there are 2, counted from 0"


def test_a_file_without_labels_is_read_if_they_are_optional(write: Write) -> None:
    path = write("x.tsv", "one\ntwo\n")
    columns = {"text_a": 0, "label": 1}
    assert values(path, columns, optional=["label"]) == [{"text_a": "one"}, {"text_a": "two"}]
    assert "no column 1, which is to be `label`" in str(refusal(path, columns))


def test_a_file_that_is_not_there_and_a_folder_are_told(tmp_path: Path) -> None:
    assert "there is no file" in str(refusal(tmp_path / "none.csv"))
    assert "is a folder" in str(refusal(tmp_path))
    with pytest.raises(InputError, match="holds no file of a split"):
        split_files(tmp_path)


def test_columns_that_contradict_each_other_are_refused(write: Write) -> None:
    with pytest.raises(RecipeError, match="can't both"):
        read_rows(write("x.jsonl", "{}"), {"meta": "a", "meta.x": "b"})
