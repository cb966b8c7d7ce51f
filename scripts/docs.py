"""Write the generated parts of the docs, or with --check tell which files are out of date.

A part lies between `<!-- generated: NAME -->` and `<!-- /generated -->`; the text around it is
written by hand and stays. Everything comes from the code: `--help`, the recipe models, the
registry, the first lines of the built-in recipes. No torch is imported.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.main import get_command

from bmkit import builtin, registry
from bmkit.recipe import Recipe
from bmkit.runtime.recipe import GenerateRecipe
from bmkit_cli.main import app

ROOT = Path(__file__).parents[1]
HELP_COLUMNS = 78  # what is left of a terminal of 80 columns
WORDS = {str: "text", int: "integer", float: "number", bool: "boolean"}
PLURALS = {"integer": "integers", "number": "numbers"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

Row = tuple[str, ...]


def help_pages() -> str:
    """Return what `--help` prints for every command, on a terminal of 80 columns."""
    return "\n\n".join(_help_pages(get_command(app), "bmkit", None))


def _help_pages(command: Any, name: str, parent: Any) -> Iterator[str]:
    settings = {"parent": parent, "resilient_parsing": True, "terminal_width": HELP_COLUMNS}
    context = command.make_context(name, [], **settings)
    text = "\n".join(line.rstrip() for line in command.get_help(context).strip().splitlines())
    yield f"### `{context.command_path}`\n\n```text\n{text}\n```"
    for word, part in getattr(command, "commands", {}).items():
        yield from _help_pages(part, word, context)


def builtin_recipes() -> str:
    """Return a table of the built-in recipes and pipelines, by their first lines."""
    rows = []
    for stage in builtin.stages():
        for name in builtin.names(stage):
            text, _, command = builtin.first_line(stage, name).partition("   ")
            rows.append((f"`{stage}/{name}`", text, f"`{command.strip()}`" if command else ""))
    return table(("recipe", "what it does", "command"), rows)


def methods() -> str:
    """Return a table of the registered methods."""
    rows = [
        (f"`{m.name}`", f"`{m.stage}`", f"`{m.stage}/{m.builtin}`", m.summary, m.source)
        for m in registry.METHODS
    ]
    return table(("method", "stage", "built-in recipe", "what it does", "source"), rows)


def recipe_keys() -> str:
    """Return the keys of every stage's recipe: those that all have, then each stage's own."""
    shared = set(Recipe.model_fields)
    rows = [row for row in _rows(Recipe, "", ()) if row[0] != "`kind`"]
    parts = ["### Every recipe", _key_table(rows)]
    texts = [s.name for s in registry.STAGES.values() if s.gives == "text"]
    parts.append(f"### {' and '.join(f'`{name}`' for name in texts)}")
    parts.append(_key_table(_rows(GenerateRecipe, "", shared)))
    for stage in registry.STAGES.values():
        recipe = registry.load(stage.recipe)
        known = set(GenerateRecipe.model_fields) if stage.gives == "text" else set()
        other = {
            name for name in shared if _description(recipe, name) != _description(Recipe, name)
        }
        told = (shared | known) - other - {"kind"}
        own = _rows(recipe, "", told, TOLD if stage.name != "tune" else ())
        parts += [f"### `{stage.name}`", _key_table(own)]
        metrics = ", ".join(f"`{name}`" for name in recipe.METRICS) or "none"
        parts.append(f"Metrics that `gates` may bound: {metrics}.")
        if recipe.FILES:
            files = ", ".join(f"`{name}`" for name in recipe.FILES)
            parts.append(f"Keys that hold a path: {files}.")
        if recipe.MODELS:
            models = ", ".join(f"`{name}`" for name in recipe.MODELS)
            parts.append(f"Keys that name a further model, as `-m` does: {models}.")
    return "\n\n".join(parts)


def _description(recipe: type[Recipe], name: str) -> str | None:
    return recipe.model_fields[name].description


def _key_table(rows: Iterable[Row]) -> str:
    return table(("key", "value", "default", "meaning"), rows)


TOLD = ("tune.deltas", "ensemble.members.0.template", "ensemble.members.0.verbalizer")
"""Keys whose own keys are told elsewhere: in another stage's table, or further up."""


def _rows(
    model: type[BaseModel], prefix: str, skipped: Iterable[str], told: Iterable[str] = ()
) -> Iterator[Row]:
    tags = {"method", "type"}  # they come first: they say whose keys follow
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] not in tags):
        if name in skipped:
            continue
        key = f"{prefix}{name}"
        inner = _models(field.annotation)
        listed = get_origin(field.annotation) is list
        value = _value(field, nested=bool(inner))
        yield (f"`{key}`", value, _default(field, nested=bool(inner)), _meaning(model, field))
        if get_origin(field.annotation) is dict or key in told:
            continue
        for part in inner:
            yield from _rows(part, f"{key}.0." if listed else f"{key}.", (), told)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the recipe models inside an annotation: the variants of a list's items, say."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models(arg)]


def _value(field: FieldInfo, *, nested: bool) -> str:
    listed = get_origin(field.annotation) is list
    text = ("list" if listed else "mapping") if nested else _type(field.annotation)
    limits = {name: value for m in field.metadata for name, value in _limits(m)}
    bounds = [f"{BOUNDS[k]} {v}" for k, v in limits.items() if k in BOUNDS]
    least, most = limits.get("min_length"), limits.get("max_length")
    if least is not None and least == most:
        bounds.append(f"{least} item" if least == 1 else f"{least} items")
    elif least is not None:
        bounds.append(f"{least} or more items")
    return ", ".join([text, *bounds])


def _limits(constraint: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a constraint such as `Ge(ge=0)` bounds."""
    for name in (*BOUNDS, "min_length", "max_length"):
        if (value := getattr(constraint, name, None)) is not None:
            yield name, value


def _type(annotation: Any) -> str:
    """Say in words what values an annotation allows."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is NoneType:
        return "none"
    if origin is Annotated:
        return _type(args[0])
    if origin is Literal:
        return _either([f"`{value}`" for value in args])
    if origin in {Union, UnionType}:
        return _either([_type(arg) for arg in args])
    if origin is tuple:
        return f"[{', '.join(_type(arg) for arg in args)}]"
    if origin is list:
        item = _type(args[0])
        return f"list of {PLURALS.get(item, item)}"
    if origin is dict:
        item = _type(args[1])
        return f"mapping of {PLURALS.get(item, item)}"
    return WORDS[annotation]


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _default(field: FieldInfo, *, nested: bool) -> str:
    if field.is_required():
        return "required"
    if nested:
        return "optional"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "none" if value is None else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _meaning(model: type[BaseModel], field: FieldInfo) -> str:
    """Return a field's description, else what its model, or the model it belongs to, says."""
    if field.description:
        return field.description
    inner = _models(field.annotation)
    return (inspect.getdoc(inner[0] if inner else model) or "").splitlines()[0]


def table(heads: Row, rows: Iterable[Row]) -> str:
    """Return a Markdown table."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "docs/cli.md": {"help": help_pages},
    "docs/recipes.md": {
        "keys": recipe_keys,
        "builtin": builtin_recipes,
        "methods": methods,
    },
}


def renew(text: str, parts: dict[str, Callable[[], str]], name: str) -> str:
    """Return a page's text with its generated parts made anew. Raises SystemExit without them."""
    for part, make in parts.items():
        begin, end = f"<!-- generated: {part} -->\n", "<!-- /generated -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed or begin in after:
            raise SystemExit(f"{name} must hold the part `{part}` once: {begin.strip()} … {end}")
        text = f"{before}{begin}\n{make()}\n\n{end}{after}"
    if unknown := set(re.findall(r"<!-- generated: (\S+) -->", text)) - set(parts):
        raise SystemExit(f"{name}: nothing generates the part `{min(unknown)}`")
    return text


def main() -> int:
    """Rewrite the pages, or with --check compare them; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    check = parser.parse_args().check
    stale = []
    for name, parts in PAGES.items():
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = renew(old, parts, name)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name} is out of date: run scripts/docs.py" if check else f"{name} rewritten")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
