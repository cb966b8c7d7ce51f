"""The template language: what it says, what it refuses, and where it points."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bmkit.errors import InputError, RecipeError
from bmkit.prompting.chat import parse_chat
from bmkit.prompting.filters import FILTERS, apply
from bmkit.prompting.jinja import from_jinja
from bmkit.prompting.pieces import (
    Again,
    Mask,
    Meta,
    Piece,
    Placeholder,
    Scaffold,
    Soft,
    Special,
    Text,
)
from bmkit.prompting.template import Template, parse, read_file, to_text

# What a template says -> its pieces.
GRAMMAR: dict[str, list[Piece]] = {
    "": [],
    "  \n ": [],
    "It was": [Text("It was")],
    " It was": [Text("It was", space=True)],
    "a  b \n c": [Text("a  b \n c")],
    '{"placeholder":"text_a"}': [Placeholder("text_a")],
    '{"placeholder": "text_a", "shortenable": False}': [Placeholder("text_a", shortenable=False)],
    "{'placeholder': 'text_a'}": [Placeholder("text_a")],
    '{"shortenable": True, "placeholder": "text_a"}': [Placeholder("text_a")],
    '{"placeholder": "a", "post_processing": "strip"}': [
        Placeholder("a", post_processing=("strip",))
    ],
    '{"placeholder": "a", "post_processing": ["strip", "lower"]}': [
        Placeholder("a", post_processing=("strip", "lower"))
    ],
    '{"meta":"word"}': [Meta("word")],
    '{"meta":"word", "shortenable": True, "post_processing": "lower"}': [
        Meta("word", shortenable=True, post_processing=("lower",))
    ],
    '{"mask"}': [Mask()],
    '{"mask": None}': [Mask()],
    '{"mask"} and {"mask"}.': [Mask(), Text("and", True), Mask(True), Text(".")],
    'a  {"mask"}': [Text("a"), Mask(space=True)],
    '{"mask"}\n': [Mask()],
    '{"mask"}\n{"mask"}': [Mask(), Text("\n"), Mask()],
    '{"soft"}': [Soft()],
    '{"soft": None}': [Soft()],
    '{"soft": ""}': [Soft()],
    '{"soft": None, "duplicate": 10}': [Soft(duplicate=10)],
    '{"soft": None, "duplicate": 10, "same": True}': [Soft(duplicate=10, same=True)],
    '{"soft": None, "duplicate": 1, "same": True}': [Soft()],
    '{"soft": "Question:"}': [Soft("Question:")],
    '{"soft": "a b", "soft_id": 3}x{"soft_id": 3}': [
        Soft("a b", soft_id=3),
        Text("x"),
        Again(3),
    ],
    '{"soft": None, "soft_id": 1} {"soft": None, "soft_id": 1}': [
        Soft(soft_id=1),
        Again(1, space=True),
    ],
    '{"special":"<eos>"}': [Special("<eos>")],
    '{"special":"<eos>", "shortenable": False}': [Special("<eos>")],
    '{"text":"In short: "}': [Text("In short: ")],
    '{"text":"long", "shortenable": True}': [Text("long", shortenable=True)],
    '{"text": "one"}two': [Text("one"), Text("two")],
    '{"text": "{"}{"text": "it\'s }\\n"}': [Text("{"), Text("it's }\n")],
    '{"text":\n "é",\n "shortenable": False}': [Text("é")],
    '{{"mask"}}': [Text('{"mask"}')],
    '{{{"mask"}}}': [Text("{"), Mask(), Text("}")],
    "f(x) = {{x}}": [Text("f(x) = {x}")],
    '{"text": "\\d"}': [Text("\\d")],
}


@pytest.mark.parametrize("text", GRAMMAR)
def test_a_template_is_read_as_the_grammar_says(text: str) -> None:
    assert list(parse(text).pieces) == GRAMMAR[text]


@pytest.mark.parametrize("text", GRAMMAR)
def test_a_template_is_written_as_it_is_read(text: str) -> None:
    again = to_text(parse(text))
    assert parse(again) == parse(text)
    assert to_text(parse(again)) == again


# What is wrong -> the column, words of the message, words of the hint.
WRONG: dict[str, tuple[int, str, str]] = {
    '{"placeholdr":"a"} {"mask"}': (2, "did you mean `placeholder`", ""),
    '{"colour":"a"}': (2, "known: placeholder, meta, mask", ""),
    '{"placeholder":"a", "shortenabel": True}': (21, "did you mean `shortenable`", ""),
    '{"mask": None, "duplicate": 2}': (16, "`mask` has no option `duplicate`", ""),
    '{"mask": None, "shortenable": True}': (16, "`mask` can't be shortened", ""),
    '{"placeholder"}': (2, "`placeholder` takes a key", ""),
    '{"placeholder": 3}': (17, "`placeholder` takes a key", ""),
    '{"placeholder": ""}': (17, "`placeholder` takes a key", ""),
    '{"meta": None}': (10, "`meta` takes a key", ""),
    '{"text": 1}': (10, "`text` takes text", ""),
    '{"special": []}': (13, "`special` takes a token", ""),
    '{"mask": 1}': (10, "takes no value", ""),
    '{"soft": 4}': (10, "`soft` takes text", ""),
    '{"soft": " "}': (10, "a blank", ""),
    '{"soft": None, "duplicate": 0}': (29, "1 or more", ""),
    '{"soft": None, "duplicate": True}': (29, "1 or more", ""),
    '{"soft": None, "duplicate": 1000000000}': (29, "at most", ""),
    '{"soft": None, "same": True}': (16, "without `duplicate`", ""),
    '{"soft": None, "duplicate": 2, "same": 1}': (40, "True or False", ""),
    '{"soft": None, "soft_id": 0}': (27, "1 or more", ""),
    '{"soft": None, "soft_id": 1} {"soft_id": 2}': (30, "no earlier piece", "as in"),
    '{"soft_id": 1} {"soft": None, "soft_id": 1}': (1, "no earlier piece", "as in"),
    '{"soft": "a", "soft_id": 1} {"soft": "b", "soft_id": 1}': (29, "another piece", "again"),
    '{"soft", "duplicate": 3}': (21, "no piece", '{"soft": None, "duplicate": 3}'),
    '{"mask", "text"}': (10, "both `mask` and `text`", ""),
    '{"mask": None, "text": "a"}': (16, "both `mask` and `text`", ""),
    '{"mask": None, "mask": None}': (16, "said twice", ""),
    '{"placeholder": "a", "shortenable": true}': (37, "not a literal", "write True"),
    "{text_a}": (2, "not in quotes", '{"placeholder": "text_a"}'),
    "{mask}": (2, "not in quotes", '{"mask"}'),
    "{}": (1, "empty", "{{}}"),
    "{1: 2}": (2, "a key is text", ""),
    '{"text": "a}': (10, "unterminated", ""),
    'a { b {"mask"}': (3, "never closed", "{{"),
    'a } b {"mask"}': (3, "closes nothing", "}}"),
    '{"text": f"{1}"}': (10, "not a literal", ""),
    '{"text": open("x").read()}': (10, "not a literal", ""),
    '{"text": lambda x: x}': (10, "not a literal", ""),
    '{"text" for x in y}': (1, "no piece", ""),
    'é\n é {"text": "é", "x": 1}': (18, "no option `x`", ""),
    '{"placeholder": "a", "post_processing": "stirp"}': (41, "did you mean `strip`", ""),
    '{"placeholder": "a", "post_processing": 1}': (41, "a filter's name", ""),
    '{"placeholder": "a", "post_processing": lambda s: s.strip().lower()}': (
        41,
        "never run",
        'write "post_processing": ["strip", "lower"]',
    ),
    '{"placeholder": "a", "post_processing": "lambda s: s.rstrip(string.punctuation)"}': (
        41,
        "never run",
        'write "post_processing": "rstrip_punctuation"',
    ),
    '{"placeholder": "a", "post_processing": str.lower}': (41, "never run", '"lower"'),
    '{"placeholder": "a", "post_processing": lambda s: s.lower(x=1)}': (
        41,
        "never run",
        "filters are strip",
    ),
    '{"placeholder": "a", "post_processing": lambda s: s.encode()}': (
        41,
        "never run",
        "filters are strip",
    ),
    '{"text": "\\ud800"}': (10, "UTF-8", ""),
    '{"text": "\ud800"}': (11, "UTF-8", ""),
    "{" + '"a": [' * 500 + "]" * 500 + "}": (-1, "", ""),
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: ascii(text)[:40])
def test_what_is_wrong_is_pointed_at(text: str) -> None:
    column, words, hint = WRONG[text]
    with pytest.raises(RecipeError) as caught:
        parse(text, "recipe's template")
    message = str(caught.value)
    assert message.startswith("recipe's template, ")
    assert words in message
    assert hint in (caught.value.hint or "")
    shown, carets = message.splitlines()[-2:]
    if column > 0:
        assert f"column {column}:" in message
        assert carets.index("^") - len("   | ") == column - 1
    assert len(carets) <= len(shown)


def test_a_caret_stands_under_the_fault_behind_tabs_too() -> None:
    with pytest.raises(RecipeError) as caught:
        parse('\ta\t{"maks"}')
    assert str(caught.value).splitlines()[-2:] == ['   | \ta\t{"maks"}', "   | \t \t ^^^^^^"]


def test_code_in_a_template_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "made"
    for value in (f"__import__('pathlib').Path({str(target)!r}).touch()", "exec('1')"):
        for text in (
            f'{{"text": {value}}}',
            f'{{"placeholder": "a", "post_processing": "lambda s: {value}"}}',
            f'{{"placeholder": "a", "post_processing": {value}}}',
            f"{{{value}}}",
        ):
            with pytest.raises(RecipeError):
                parse(text)
    assert not target.exists()


@pytest.mark.parametrize(
    ("code", "filters"),
    [
        ("lambda s: s.rstrip(string.punctuation)", ["rstrip_punctuation"]),
        ("lambda x: x.replace('\\n', ' ').strip()", ["remove_newlines", "strip"]),
        ('lambda x: x.rstrip(".").capitalize()', ["rstrip_period", "capitalize"]),
        ("lambda x: x.upper().lstrip().title()", ["upper", "lstrip", "title"]),
    ],
)
@pytest.mark.parametrize("text", ["  The END...\n", "it is.\nSo!", "", "a"])
def test_the_filters_told_do_what_the_lambda_does(code: str, filters: list[str], text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(f'{{"placeholder": "a", "post_processing": {code}}}')
    assert all(f'"{name}"' in str(caught.value.hint) for name in filters)
    wanted = eval(code, {"string": __import__("string")})(text)  # the test's own code
    assert apply(filters, text) == wanted


def test_filters_do_what_they_are_called() -> None:
    text = " «Oh no!\r\nIt IS»..\n"
    told = {name: apply([name], text) for name in FILTERS}
    assert told["remove_newlines"] == " «Oh no! It IS».. "
    assert told["collapse_spaces"] == "«Oh no! It IS».."
    assert apply(["strip", "strip_punctuation"], " (so!) ") == "so"
    assert apply(["upper_first"], "iPod") == "IPod" and apply(["lower_first"], "The A") == "the A"
    assert apply(["upper_first"], "") == apply(["lower_first"], "") == ""


def test_soft_tokens_have_rows_of_their_own_unless_they_say_so() -> None:
    template = parse(
        '{"soft": None, "duplicate": 3} {"soft": "Q:", "soft_id": 1} {"soft": "A", "duplicate": 2}'
        '{"soft": None, "duplicate": 4, "same": True, "soft_id": 2} {"soft_id": 1}{"soft_id": 2}'
    )
    stands = [[span.number for span in template.spans(place)] for place in range(6)]
    assert stands == [[0, 1, 2], [3], [4, 5], [6, 6, 6, 6], [3], [6, 6, 6, 6]]
    assert [span.word for span in template.soft] == [None] * 3 + ["Q:", "A", "A", None]
    assert [span.number for span in template.soft if span.shared] == [3, 6]


def test_a_template_knows_its_fields_and_masks() -> None:
    template = parse('{"placeholder":"a"} {"meta":"b"} {"mask"} {"placeholder":"a"} {"mask"}')
    assert template.fields == ("a", "b")
    assert template.masks == 2
    assert template.require_mask() is template


def test_a_template_without_a_mask_is_refused_where_one_is_needed() -> None:
    with pytest.raises(RecipeError, match=r'no {"mask"}'):
        parse("It was good.").require_mask()
    with pytest.raises(RecipeError) as caught:
        parse('It was {{"mask"}}.').require_mask()
    assert "one brace" in str(caught.value.hint)


def test_a_file_has_a_template_on_each_line(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_bytes('\ufeffA {"mask"}\r\n\r\n{"mask"} \u2028 B\n'.encode())
    assert read_file(file, 0) == parse('A {"mask"}')
    assert read_file(file, 2) == parse('{"mask"} \u2028 B')
    with pytest.raises(RecipeError, match=r"no choice 3.*has 3 templates, counted from 0"):
        read_file(file, 3)
    with pytest.raises(RecipeError, match="no choice -1"):
        read_file(file, -1)
    with pytest.raises(RecipeError, match=r":2: the line is empty.*3 templates"):
        read_file(file, 1)
    file.write_text('{"maks"}')
    with pytest.raises(RecipeError, match=r"templates\.txt:1, column 2"):
        read_file(file, 0)
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        read_file(file, 0)
    with pytest.raises(InputError, match="no such file"):
        read_file(tmp_path / "none.txt", 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ a }} {{ mask }", r"column 1: unexpected"),
        ("a\n{% if x %}\n{{ mask }}", r"jinja, line [23], column 1: "),
        ("{% nonsense %}", "nonsense"),
        ("{% include 'x' %}{{ a | nofilter }}", "nofilter"),
    ],
)
def test_a_jinja_template_that_is_none_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        from_jinja(text)


def test_a_jinja_template_needs_a_mask_too() -> None:
    template = from_jinja("{{ a }}: {% if b is defined %}{{ b }}{% endif %} {{ mask }}")
    assert template.require_mask().fields == ("a", "b")
    with pytest.raises(RecipeError, match=r"no {{ mask }}"):
        from_jinja("{{ a }} {masks} mask").require_mask()


ASK = {"role": "user", "content": 'Is "{"placeholder":"a"}" good?'}
ANSWER = {"role": "assistant", "content": 'It is {"mask"}.'}


def test_a_chat_becomes_what_the_chat_template_writes(tokenizer: Any) -> None:
    system = {"role": "system", "content": ' {"soft": "Judge", "soft_id": 1} it. '}
    chat = parse_chat([system, ASK, {**ANSWER, "content": '{"soft_id": 1}{"mask"}.'}])
    template = chat.require_mask().template(tokenizer)
    assert chat.fields == template.fields == ("a",)
    assert template.pieces == (
        Scaffold("<|im_start|>system\n"),
        Soft("Judge", soft_id=1),
        Text("it.", space=True),
        Scaffold("<|im_end|>\n<|im_start|>user\n"),
        Text('Is "'),
        Placeholder("a"),
        Text('" good?'),
        Scaffold("<|im_end|>\n<|im_start|>assistant\n"),
        Again(1),
        Mask(),
        Text("."),
    )
    assert [span.shared for span in template.soft] == [True]
    with pytest.raises(ValueError, match="chat template"):
        to_text(template)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([ASK], "not the assistant's"),
        ([ANSWER, ASK], r"chat\.0\.content: a mask can only be in the last"),
        ([{**ASK, "content": '{"mask"}'}], r"chat\.0\.content: a mask"),
        ([ASK, {**ANSWER, "content": '{"maks"}'}], r"chat\.1\.content, column 2.*`mask`"),
        ([{"role": "usr", "content": ""}], "did you mean `user`"),
        ([{"role": "user"}], "needs `role` and `content`"),
        ([], "not a list of messages"),
    ],
)
def test_a_chat_that_is_none_is_refused(messages: list[dict[str, str]], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_chat(messages)


def test_a_chat_without_a_mask_or_a_chat_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match=r'no {"mask"}'):
        parse_chat([ASK, {"role": "assistant", "content": "Yes."}]).require_mask()
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="no chat template"):
        parse_chat([ASK, ANSWER]).template(tokenizer)


@pytest.mark.parametrize(
    "chat_template",
    [
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_chat_template_that_changes_messages_is_refused(
    tokenizer: Any, chat_template: str
) -> None:
    tokenizer.chat_template = chat_template
    with pytest.raises(RecipeError, match="chat template"):
        parse_chat([ASK, ANSWER]).template(tokenizer)


def test_the_page_about_templates_says_what_there_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "templates.md").read_text(encoding="utf-8")
    recipes = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    told: dict[str, Any] = {k: v for recipe in recipes for k, v in recipe["template"].items()}
    assert parse(told["text"]).require_mask().fields == ("text_a",)
    assert from_jinja(told["jinja"]).require_mask().fields == ("text_a", "title")
    assert parse_chat(told["chat"]).require_mask().fields == ("text_a",)
    filters = page.split("### Filters")[1].split("##")[0]
    assert all(f"`{name}`" in filters for name in FILTERS)
    rows = page.split("### Trainable tokens")[1].split("### Filters")[0]
    shown = re.findall(r"^\| `(\{.*\})` \|", rows, re.MULTILINE)
    assert [len(parse(text).soft) for text in shown] == [2, 10, 1, 1, 2, 1]
    error = re.findall(r"```text\n(.*?)\n```", page, re.DOTALL)[0]
    with pytest.raises(RecipeError) as caught:
        parse(error.splitlines()[1].removeprefix("   | "))
    assert str(caught.value) == error


def test_reading_templates_loads_no_torch() -> None:
    names = "template jinja chat wrap encode"
    code = f"import sys; from bmkit.prompting import {', '.join(names.split())}; " + (
        "print([n for n in ('torch', 'transformers', 'jinja2', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_templates_are_equal_by_what_they_say_and_not_by_where_they_stand() -> None:
    assert parse("a", "here") == parse("a", "there") == Template((Text("a"),))
