"""The registry: every stage and method is really there, in code, recipes, docs and tests."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from bmkit import builtin, registry
from bmkit.pipeline import chain
from bmkit.recipe import KINDS, Recipe
from bmkit.registry import Method, Stage

ROOT = Path(__file__).parents[2]
STAGES = list(registry.STAGES.values())
TAGS = ("method", "type")
OTHERS = ("learning_setting", "tune", "policy")
"""Keys whose `type` says how much is learned, or when to speak, or is a method of `tune`."""

each_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name)
each_method = pytest.mark.parametrize(
    "method", registry.METHODS, ids=lambda m: f"{m.stage}-{m.name}"
)


def tags_in_recipe(stage: Stage) -> set[str]:
    """Return the words that `method:` and `type:` may take in a stage's recipe, by its schema."""
    schema = registry.load(stage.recipe).model_json_schema()
    found: set[str] = set()
    apart = {"Policy"}  # when a duplex model speaks is no method
    if stage.name == "prompt":
        deltas = registry.load("bmkit.tune.recipe:TuneRecipe").model_json_schema()["$defs"]
        apart |= {"LearningSetting", *deltas}
    for name, model in (("", schema), *schema.get("$defs", {}).items()):
        for key, value in model.get("properties", {}).items():
            if key in TAGS and name not in apart:
                found |= {value["const"]} if "const" in value else set(value.get("enum", []))
    return found - {"none"}


def tagged(values: Any) -> Iterator[str]:
    """Yield the words of `method:` and `type:` anywhere in a recipe."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key in TAGS and isinstance(value, str) and value != "none":
                yield value
            if key not in OTHERS:
                yield from tagged(value)
    elif isinstance(values, list):
        for value in values:
            yield from tagged(value)


def methods_of(stage: Stage) -> set[str]:
    """Return the registered methods of a stage."""
    return {m.name for m in registry.METHODS if m.stage == stage.name}


@each_stage
def test_a_stage_names_code_that_is_there(stage: Stage) -> None:
    recipe = registry.load(stage.recipe)
    assert issubclass(recipe, Recipe)
    assert recipe.model_fields["kind"].annotation.__args__ == (stage.name,)
    for spec in (stage.plan, stage.run):
        assert len(inspect.signature(registry.load(spec)).parameters) == 1
    kinds = {"model", "delta", "prompt", "data", "phrases", "transcript", "nothing"}
    assert set(stage.takes) <= kinds
    assert stage.summary.endswith(".")


@each_stage
def test_a_stage_is_registered_by_its_name_and_known_everywhere(stage: Stage) -> None:
    from typer.main import get_command

    from bmkit_cli.main import app

    assert registry.STAGES[stage.name] is stage
    assert stage.name in KINDS
    assert stage.name in chain.WORDS
    assert stage.name in get_command(app).commands  # type: ignore[attr-defined]
    assert builtin.names(stage.name)


def test_no_builtin_recipe_belongs_to_a_stage_that_is_not_there() -> None:
    assert set(builtin.stages()) == {*registry.STAGES, "pipelines"}


@each_stage
def test_the_metrics_and_files_of_a_recipe_are_told_once(stage: Stage) -> None:
    recipe = registry.load(stage.recipe)
    for names in (recipe.METRICS, recipe.FILES):
        assert len(set(names)) == len(names)
    for dotted in recipe.FILES:
        model: Any = recipe
        for step in dotted.split("."):
            if step == "*":
                (model,) = get_args(model)
                continue
            assert step in model.model_fields, dotted
            model = model.model_fields[step].annotation


@each_method
def test_a_method_names_code_that_is_there(method: Method) -> None:
    code = registry.load(method.code)
    assert callable(code)
    assert inspect.getdoc(code)
    assert method.summary.endswith(".")
    assert method.source


@each_method
def test_a_method_has_a_builtin_recipe_that_uses_it(method: Method) -> None:
    text = (builtin.directory() / method.stage / f"{method.builtin}.yaml").read_text()
    assert method.name in set(tagged(yaml.safe_load(text)))


@each_method
def test_a_method_has_a_row_in_the_docs(method: Method) -> None:
    rows = [
        line
        for line in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
        if re.match(rf"\|[^|]*`{re.escape(method.name)}`[^|]*\|", line)
    ]
    assert rows, f"docs/recipes.md has no table row that begins with `{method.name}`"


@each_method
def test_a_method_has_a_line_in_the_test_matrix(method: Method) -> None:
    matrix = (ROOT / "tests" / "matrix" / "test_methods.py").read_text(encoding="utf-8")
    assert f'("{method.stage}", "{method.name}"): ' in matrix


def test_no_method_is_registered_twice_or_for_a_stage_that_is_not_there() -> None:
    names = [(m.stage, m.name) for m in registry.METHODS]
    assert len(set(names)) == len(names)
    assert {stage for stage, _ in names} <= set(registry.STAGES)


@each_stage
def test_the_words_of_a_recipe_are_the_registered_methods(stage: Stage) -> None:
    assert tags_in_recipe(stage) == methods_of(stage)


@each_stage
def test_the_methods_that_an_engine_runs_are_the_registered_methods(stage: Stage) -> None:
    engine = inspect.getmodule(registry.load(stage.run))
    assert set(getattr(engine, "METHODS", {})) == methods_of(stage)


def test_builtin_recipes_use_registered_methods_only() -> None:
    for stage in STAGES:
        for name in builtin.names(stage.name):
            text = (builtin.directory() / stage.name / f"{name}.yaml").read_text()
            assert set(tagged(yaml.safe_load(text))) <= methods_of(stage), name


def test_a_name_is_loaded_from_its_module() -> None:
    import math

    assert registry.load("math:tau") == math.tau
    with pytest.raises(AttributeError):
        registry.load("math:tow")
