"""Rows put into templates: what text comes out, in which parts, and which rows are refused."""

from __future__ import annotations

from typing import Any

import pytest

from bmkit.errors import InputError
from bmkit.prompting.jinja import from_jinja
from bmkit.prompting.template import parse
from bmkit.prompting.wrap import Part, show, wrap

ROW = {
    "text_a": "A fine film!",
    "text_b": "it  was",
    "meta": {"word": "film"},
    "n": 3,
    "half": 0.5,
    "yes": True,
    "empty": "",
}

# A template -> the prompt that the row above makes of it.
SHOWN = {
    '{"placeholder":"text_a"} It was {"mask"}.': "A fine film! It was <mask>.",
    ' {"placeholder":"text_b"}  {"placeholder":"text_a"}': " it  was A fine film!",
    '{"meta":"word"}s {"mask"}{"mask"}': "films <mask><mask>",
    '{"meta":"text_b"}': "it  was",
    '{"placeholder":"n"}/{"placeholder":"half"} {"placeholder":"yes"}': "3/0.5 true",
    'a {"placeholder":"empty"} b': "a b",
    '{"placeholder":"text_a","post_processing":["rstrip_punctuation","lower"]}?': "a fine film?",
    '{"soft"} {"soft":"Q:"} {"special":"<eos>"} {"text":"{"}': "<soft> <soft:Q:> <eos> {",
    '{"soft":None,"duplicate":2} {"soft":None,"duplicate":2,"same":True}': (
        "<soft><soft> <soft><soft>"
    ),
    "Line\n{{x}}": "Line\n{x}",
}


@pytest.mark.parametrize("text", SHOWN)
def test_a_row_makes_this_prompt(text: str) -> None:
    assert show(wrap(parse(text), ROW, 1)) == SHOWN[text]


def test_parts_say_what_they_are() -> None:
    text = (
        '{"placeholder":"text_a"} {"meta":"word"} {"text":"so","shortenable":True} {"mask"}{"mask"}'
    )
    assert wrap(parse(text), ROW, 1) == [
        Part("placeholder", "A fine film!", False, True, 0),
        Part("meta", "film", True, False, 1),
        Part("text", "so", True, True, 2),
        Part("mask", "", True, piece=3, mask=0),
        Part("mask", "", False, piece=4, mask=1),
    ]


@pytest.mark.parametrize(
    ("text", "row", "words"),
    [
        ('{"placeholder":"text_c"}', {"text_a": "", "label": 1}, "row 7 has no `text_c`.*`label`"),
        ('{"meta":"b"}', {"meta": {"a": "x"}, "c": ""}, "row 7 has no `b`"),
        ('{"placeholder":"a"}', {}, "it has nothing"),
        ('{"placeholder":"a"}', {"a": None}, "row 7: `a`: it is null"),
        ('{"placeholder":"a"}', {"a": ["x"]}, "row 7: `a`: it is a list"),
        ('{"meta":"a"}', {"meta": {"a": {"b": 1}}}, "row 7: `a`: it is an object"),
        ('{"placeholder":"a"}', {"a": "\ud800"}, "row 7: `a`: it holds half a character"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_key(
    text: str, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        wrap(parse(text), row, 7)


def test_a_misspelt_key_gets_a_guess() -> None:
    with pytest.raises(InputError) as caught:
        wrap(parse('{"placeholder":"text_a"}'), {"texta": ""}, 1)
    assert caught.value.hint == "did you mean `texta`?"


JINJA = {
    "{{ text_a }} It was {{ mask }}.": "A fine film! It was <mask>.",
    "{{ text_b | upper }}  {{ n }} {{ yes }}": "IT  WAS  3 true",
    "{% if n > 2 %}\nMany: {{ mask }}\n{% else %}\nFew\n{% endif %}": "Many: <mask>\n",
    "A\n  {% if yes %}\nB\n  {% endif %}\nC": "A\nB\nC",
    "{% for w in text_b.split() %}{{ w }}, {% endfor %}{{ mask }}": "it, was, <mask>",
    "{{ 'It: ' ~ mask }}{{ empty }}": "It: <mask>",
    "{% macro say(x) %}<{{ x }}>{% endmacro %}{{ say(text_b) }} {{ mask }}": "<it  was> <mask>",
    "{{ meta.word }}{{ mask }}{{ mask }}": "film<mask><mask>",
}


@pytest.mark.parametrize("text", JINJA)
def test_a_row_makes_this_prompt_in_jinja(text: str) -> None:
    parts = wrap(from_jinja(text), ROW, 1)
    assert show(parts) == JINJA[text]
    assert [p.mask for p in parts if p.role == "mask"] == list(range(text.count("mask")))


def test_a_macro_keeps_words_and_fields_apart() -> None:
    text = "{% macro say(x) %}<{{ x }}>{% endmacro %}{{ say(n) }}{{ 'Is' ~ mask }}"
    parts = wrap(from_jinja(text), ROW, 1)
    assert [(p.role, p.text) for p in parts] == [
        ("text", "<"),
        ("placeholder", "3"),
        ("text", ">Is"),
        ("mask", ""),
    ]


def test_what_an_expression_shows_may_be_shortened() -> None:
    assert wrap(from_jinja("Say {{ text_b }}: {{ mask }}"), ROW, 1) == [
        Part("text", "Say", False, False, 0),
        Part("placeholder", "it  was", True, True, 1),
        Part("text", ":", False, False, 2),
        Part("mask", "", True, piece=3, mask=0),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ text_c }} {{ mask }}", "row 5: 'text_c' is undefined; it has `text_a`"),
        ("{{ meta.wrd }}", "row 5: .*'wrd'"),
        ("{{ text_a + n }}", "row 5: the template fails"),
        ("{{ n / 0 }}", "row 5: .*division"),
        ("{{ meta }}", "row 5: .*an object"),
        ("{{ text_a.__class__.__mro__ }}", "row 5: "),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "row 5: .*[Rr]ange"),
    ],
)
def test_a_jinja_template_that_fails_names_the_row(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        wrap(from_jinja(text), ROW, 5)


def test_a_row_can_not_put_in_a_mask() -> None:
    for value in ("{{ mask }}", '{"mask"}', "<mask>"):
        assert [p.role for p in wrap(from_jinja("{{ a }}"), {"a": value}, 1)] == ["placeholder"]
        parts = wrap(parse('{"placeholder":"a"}'), {"a": value}, 1)
        assert [p.role for p in parts] == ["placeholder"]
    with pytest.raises(InputError, match="row 1 has a character"):
        wrap(from_jinja("{{ a }}"), {"a": "\ufdd2"}, 1)
