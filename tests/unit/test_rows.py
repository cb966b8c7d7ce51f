"""JSON lines: every row, or what is wrong with it and on which line."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmkit.data import rows
from bmkit.data.rows import BadRow, Row
from bmkit.errors import InputError

JSON_VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=20)


def read(content: bytes) -> list[Row | BadRow]:
    """Read what a file of this content holds."""
    return list(rows.read(io.BytesIO(content)))


@given(st.lists(st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=4), max_size=8))
@settings(max_examples=100, deadline=None)
def test_rows_come_back_as_json_wrote_them(values: list[dict[str, object]]) -> None:
    for escaped in (True, False):
        text = "".join(json.dumps(v, ensure_ascii=escaped) + "\n" for v in values)
        found = read(text.encode("utf-8", "surrogatepass") if escaped else text.encode())
        assert found == [Row(i, v) for i, v in enumerate(values, 1)]


def test_empty_lines_are_passed_over_and_still_counted() -> None:
    assert read(b'\n{"a": 1}\n  \t\r\n\n{"b": 2}') == [Row(2, {"a": 1}), Row(5, {"b": 2})]


def test_a_byte_order_mark_and_windows_line_ends_are_passed_over() -> None:
    assert read(b'\xef\xbb\xbf{"a": 1}\r\n{"b": 2}\r\n') == [Row(1, {"a": 1}), Row(2, {"b": 2})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 200_000, "deep"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_line_is_told_with_its_number_and_the_others_are_read(
    line: bytes, problem: str
) -> None:
    first, bad, last = read(b'{"a": 1}\n' + line + b'\n{"b": 2}\n')
    assert (first, last) == (Row(1, {"a": 1}), Row(3, {"b": 2}))
    assert isinstance(bad, BadRow)
    assert bad.line == 2
    assert problem in bad.problem


def test_rows_are_read_as_they_come() -> None:
    def lines() -> object:
        yield b'{"a": 1}\n'
        raise AssertionError("the second line was read before the first was used")

    assert next(rows.read(lines())) == Row(1, {"a": 1})  # type: ignore[arg-type]


def test_read_all_gives_every_row_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n\n{"b": 2}\n')
    assert rows.read_all(tmp_path / "r.jsonl") == [Row(1, {"a": 1}), Row(3, {"b": 2})]


def test_read_all_names_the_file_and_the_first_bad_line(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text('{"a": 1}\n\n{"b": \n[]\n')
    with pytest.raises(InputError, match=re.escape(f"{file}:3:")) as caught:
        rows.read_all(file)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("content", ["", "\n\n", "  \n"])
def test_read_all_refuses_a_file_without_rows(tmp_path: Path, content: str) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match="no rows") as caught:
        rows.read_all(file)
    assert caught.value.hint


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool", "developer"])
def test_messages_with_known_roles_are_a_chat(role: str) -> None:
    assert rows.messages_problem([{"role": role, "content": "x"}]) is None


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "hello",
        {},
        [],
        ["hello"],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": None}],
        [{"role": None, "content": "x"}],
        [{"role": "", "content": "x"}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "assitant", "content": "y"}],
    ],
)
def test_what_is_no_chat_is_told(messages: object) -> None:
    assert rows.messages_problem(messages)


def test_a_misspelt_role_names_the_nearest() -> None:
    said = rows.messages_problem([{"role": "assitant", "content": "y"}])
    assert said is not None
    assert "`assitant`" in said
    assert "did you mean `assistant`?" in said


def test_a_misspelt_key_of_a_row_names_the_nearest() -> None:
    wanted = "`messages`, `prompt`/`completion` or `text`"
    said = rows.unknown_shape({"id": 1, "mesages": []}, wanted)
    assert wanted in said
    assert "`mesages`" in said
    assert "did you mean `messages`?" in said
    assert "did you mean" not in rows.unknown_shape({"zzz": 1}, wanted)
