"""What bmkit writes as YAML it reads back as the same values, of the same types."""

from __future__ import annotations

import json
from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bmkit import recipe
from bmkit.errors import RecipeError
from bmkit.pipeline import chain
from bmkit.pipeline.stage import Request, load_recipe

WORDS = (
    "1 -1 +1 012 0o17 0x1f 1e-4 1E5 .5 5. 1.5 1_000 1:30 190:20:30 .inf .nan -.INF inf nan "
    "true True on off yes No y null ~ NULL 2026-01-31 << = - ? : # & * ! | > % @ ` , [ ] { } "
    "{a:1} [1] &a *a !!int !!bool !!str --- ... a:b a#b"
)
SPACES = " ", "a: b", "a #b", "- a", "? a", " a", "a ", "\n", "a\n", "\na", "a\n\nb", "\t", "a\tb"
ODD = "", "'", '"', "it's", "\\", "\\n", "\r", "a\r\nb", "\x00", "\x07", "\x7f", "a\x85b", "\xa0"
WIDE = "\u2028", "a\u2029b", "\ufeff", "\ufeffa", "\ufffd", "\U0001f600", "caf\xe9 " * 40, "x" * 200
LOOKALIKES = st.sampled_from([*WORDS.split(), *SPACES, *ODD, *WIDE])
TEXT = st.text(max_size=120) | LOOKALIKES
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
MAPPINGS = st.dictionaries(TEXT, VALUES, max_size=5)


def exact(value: Any) -> str:
    """Write a value so that 1, 1.0, true and "1" all differ."""
    return json.dumps(value, sort_keys=True)


@given(MAPPINGS)
@settings(max_examples=250, deadline=None)
@example({"rate": 1e-4, "huge": 1e300, "small": 5e-324, "whole": 1e16, "minus": -0.0})
@example({"on": "on", "1": "1", "1e-4": "1e-4", "null": "null", "": ""})
def test_what_is_written_is_read_back_equal(values: dict[str, Any]) -> None:
    text = chain.to_yaml([{"compress": values}])
    assert exact(recipe.parse(text, "pipeline.yaml").data) == exact([{"compress": values}])


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_a_value_that_stands_in_two_places_is_read_back_twice(value: Any) -> None:
    text = chain.to_yaml([{"compress": {"a": value, "b": [value, value]}}])
    assert exact(recipe.parse(text, "pipeline.yaml").data) == exact(
        [{"compress": {"a": value, "b": [value, value]}}]
    )


@given(TEXT)
@settings(max_examples=150, deadline=None)
def test_text_reaches_a_recipe_through_set_as_it_is(text: str) -> None:
    written = chain._yaml(text)
    found = load_recipe(Request("infer", "greedy", "", assign=(f"system={written}",)))[1]
    assert found.system == text  # type: ignore[attr-defined]


BMP = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=40)


@given(st.dictionaries(BMP, BMP | st.lists(SCALARS.filter(lambda v: not isinstance(v, str)))))
@settings(max_examples=100, deadline=None)
def test_json_is_read_as_json_says(values: dict[str, Any]) -> None:
    text = json.dumps(values)
    assert exact(recipe.parse(text, "recipe.json").data) == exact(json.loads(text))


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | LOOKALIKES)
@settings(max_examples=250, deadline=None)
def test_any_text_is_parsed_or_refused_but_never_crashes(text: str) -> None:
    for trial in (text, f"kind: infer\nsystem: {text}\n"):
        try:
            doc = recipe.parse(trial, "r.yaml")
            recipe.validate(doc, recipe.Recipe)
        except RecipeError:
            pass


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.floats(0.001, 1e9)))
@settings(max_examples=100, deadline=None)
def test_plain_yaml_reads_the_same_numbers_from_what_is_written(values: dict[str, float]) -> None:
    text = chain.to_yaml([values])
    assert yaml.safe_load(text) == [values]
