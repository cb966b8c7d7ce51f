"""Recipes: YAML in, a validated frozen model out, and errors that point at the line.

PyYAML's YAML 1.1 reads `1e-4` as text, `on` as true, `012` as ten and `1:30` as ninety, and lets a
duplicate key win silently. The loader here reads YAML 1.2 scalars and refuses duplicates.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from bmkit.errors import RecipeError, counted, did_you_mean

Key = str | int
KeyPath = tuple[Key, ...]

MAX_NODES = 20_000


class Model(BaseModel):
    """Base of every recipe model: no unknown keys, no mutation, no silent coercion."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Bound(Model):
    """A bound that a metric must meet, else the run ends with exit code 5."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Bound:
        if self.min is None and self.max is None:
            raise ValueError("a gate needs `min` or `max`")
        return self


class Recipe(Model):
    """What every stage's recipe may say."""

    METRICS: ClassVar[tuple[str, ...]] = ()
    """Names that `gates` may bound."""
    FILES: ClassVar[tuple[str, ...]] = ()
    """Dotted keys that hold a path: relative to the recipe file, or `builtin:` for bmkit's own;
    `*` stands for each item of a list."""
    MODELS: ClassVar[tuple[str, ...]] = ()
    """Dotted keys that name a further model, as `-m` does; `*` stands for each item of a list."""

    kind: str
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of every random draw.")
    device: str = Field(
        default="auto", description="`auto` takes the GPU if there is one; or `cpu`, `cuda:1`, …"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="`auto` computes in the stored dtype where the device can, else in float32.",
    )
    gates: dict[str, Bound] = Field(
        default_factory=dict, description="Bounds on metrics, as `{metric: {min: …, max: …}}`."
    )

    @model_validator(mode="after")
    def _device_has_a_name(self) -> Recipe:
        if not re.fullmatch(r"auto|cpu(:0)?|(cuda|mps|xpu)(:\d+)?", self.device):
            text = f"`{self.device}` is not a device; write auto, cpu, cuda, cuda:1 or mps"
            raise contradiction("device", text)
        return self

    def settled(self, config: Mapping[str, Any], files: Mapping[str, Path]) -> Self:
        """Return what is meant by it on this machine, for a model with this `config.json`.

        `files` has what `FILES` name. What a result depends on is so told by its key.
        """
        return self


def contradiction(key: str, text: str) -> PydanticCustomError:
    """Return what a validator of several keys raises, so that the error points at `key`.

    The key of a part is dotted, as `train.max_steps`.
    """
    return PydanticCustomError("contradiction", "{text}", {"text": text, "key": key})


M = TypeVar("M", bound=Model)
T = TypeVar("T")


@dataclass
class Document:
    """Parsed YAML, with the place of every key and value."""

    data: Any
    source: str
    name: str
    """Short name for paths and headings: `int8`."""
    folder: Path
    """What relative paths in the document are relative to."""
    lines: list[str] = field(default_factory=list)
    key_marks: dict[KeyPath, yaml.Mark] = field(default_factory=dict)
    value_marks: dict[KeyPath, yaml.Mark] = field(default_factory=dict)
    overrides: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-4` is a number; `on`, `yes`, `012` and `1:30` are text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*|(?=[eE])))(?:[eE][-+]?[0-9]+)?",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )


def parse(text: str, source: str, *, name: str = "recipe", folder: Path | None = None) -> Document:
    """Parse `text`; `source` names it in errors.

    Raises RecipeError if it is not YAML. Duplicate keys are kept as problems for `validate`, so
    that one run names everything that is wrong.
    """
    doc = Document(None, source, name, folder or Path.cwd(), text.splitlines())
    loader = None
    try:
        loader = _Loader(text)  # scans the first token already
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{source} is empty")
        _mark(node, (), doc, loader)
        doc.data = _plain(loader.construct_document(node))
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        raise RecipeError(f"{source}: not valid YAML\n{_point(doc, mark, _yaml(exc))}") from None
    except yaml.YAMLError as exc:
        raise RecipeError(f"{source}: not valid YAML: {exc}") from None
    except (RecursionError, ValueError, LookupError, TypeError, AttributeError) as exc:
        # PyYAML's constructors, given `!!int x` and the like
        raise RecipeError(f"{source}: not valid YAML: {type(exc).__name__}: {exc}") from None
    finally:
        if loader is not None:
            loader.dispose()
    return doc


def _yaml(exc: yaml.MarkedYAMLError) -> str:
    return ", ".join(part for part in (exc.context, exc.problem) if part) or "not valid YAML"


def _plain(value: Any) -> Any:
    """Return `value` with every key as text, as JSON has it; keys that can't be are left out."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if _is_key(k)}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _is_key(key: object) -> bool:
    return isinstance(key, str | int) and not isinstance(key, bool)


def _mark(node: yaml.Node, path: KeyPath, doc: Document, loader: _Loader) -> None:
    doc.value_marks[path] = node.start_mark
    if len(doc.value_marks) > MAX_NODES or len(path) > 40:
        raise RecipeError(f"{doc.source}: too large for a recipe")
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            found = loader.construct_object(key_node, deep=True)
            if not _is_key(found):
                doc.problems.append(_point(doc, key_node.start_mark, "a key must be text"))
                continue
            key = str(found)
            if (*path, key) in doc.key_marks:
                first = doc.key_marks[(*path, key)].line + 1
                text = f"`{key}` is already set on line {first}"
                doc.problems.append(_point(doc, key_node.start_mark, text))
                continue
            doc.key_marks[(*path, key)] = key_node.start_mark
            _mark(value_node, (*path, key), doc, loader)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _mark(item, (*path, i), doc, loader)
    elif node.tag.endswith(":float") and not math.isfinite(loader.construct_object(node)):
        raise RecipeError(refused(doc, [_point(doc, node.start_mark, "a number must be finite")]))
    if node.tag not in TAGS_OF_JSON:
        tag = node.tag.rpartition(":")[2]
        text = f"not valid YAML for a recipe: `{tag}` is not text, a number, true, false or null"
        raise RecipeError(refused(doc, [_point(doc, node.start_mark, text)]))


def scalar(text: str) -> Any:
    """Return what `text` means as a YAML value; text that isn't YAML means itself."""
    try:
        return parse(text, "text").data
    except RecipeError:
        return text


def part(doc: Document, path: KeyPath = (), *, name: str | None = None) -> Document:
    """Return a copy of what `doc` holds at `path`, which still points at the lines of `doc`."""
    data = doc.data
    for step in path:
        data = data[step]

    def inside(marks: Mapping[KeyPath, T]) -> dict[KeyPath, T]:
        return {p[len(path) :]: mark for p, mark in marks.items() if p[: len(path)] == path}

    return replace(
        doc,
        data=copy.deepcopy(data),
        name=name or doc.name,
        key_marks=inside(doc.key_marks),
        value_marks=inside(doc.value_marks),
        overrides=inside(doc.overrides),
        problems=list(doc.problems) if not path else [],
    )


def override(doc: Document, assignments: Sequence[str], *, flag: str = "--set ") -> None:
    """Apply `a.b.0.c=value` assignments in place; the value is YAML.

    What is wrong with an assignment becomes a problem of `doc`, named by `validate` with the rest.
    """
    for text in assignments:
        label = f"{flag}{text}"
        dotted, sep, value = text.partition("=")
        if not sep or not dotted.strip():
            hint = "expected KEY=VALUE, as --set train.max_steps=10"
            doc.problems.append(f"  --> {label}\n   = {hint}")
            continue
        path: KeyPath = tuple(
            int(p) if p.isascii() and p.isdigit() else p for p in dotted.strip().split(".")
        )
        parsed = None
        try:
            if value.strip():
                found = parse(value, label)
                parsed = found.data
                doc.problems += found.problems
        except RecipeError as exc:
            said = str(exc).splitlines()[0].removeprefix(f"{label}: ")
            doc.problems.append(f"  --> {label}\n   = {said}; text in quotes is: '{dotted}=\"…\"'")
            continue
        if problem := _assign(doc.data, path, parsed):
            doc.problems.append(f"  --> {label}\n   = {problem}")
        else:
            doc.overrides[path] = label


def _assign(data: Any, path: KeyPath, value: Any) -> str | None:
    target = data
    for i, step in enumerate(path):
        shown = ".".join(map(str, path[: i + 1]))
        last = i == len(path) - 1
        if isinstance(target, list):
            if not isinstance(step, int) or step > len(target) - (not last):
                items = "1 item" if len(target) == 1 else f"{len(target)} items"
                return f"no `{shown}`: the list has {items}, counted from 0"
            if last:
                target[step : step + 1] = [value]
        elif isinstance(target, dict):
            step = str(step)
            if last:
                target[step] = value
            elif target.get(step) is None:
                target[step] = {}
        else:
            return f"`{'.'.join(map(str, path[:i])) or 'the recipe'}` holds no keys"
        if not last:
            target = target[step]
    return None


def resolve_files(
    doc: Document, model: type[Recipe], builtin_folder: Path, *, said_in: Path | None = None
) -> None:
    """Make the paths of `model.FILES` absolute, in place.

    A path in the file is relative to the file, one from the command line to the working directory
    (one from a pipeline's `set:` to `said_in`), and `builtin:data/x.jsonl` names a file that ships
    with bmkit.
    """
    for dotted in model.FILES:
        for path, holder in holders(doc.data, dotted):
            value = holder[path[-1]]
            if value.startswith("builtin:"):
                holder[path[-1]] = str(builtin_folder / value.removeprefix("builtin:"))
                continue
            on_line = any(path[: len(o)] == o for o in doc.overrides)
            base = (said_in or Path.cwd()) if on_line else doc.folder
            holder[path[-1]] = str((base / Path(value).expanduser()).absolute())
    for dotted in model.MODELS:
        for place, holder in holders(doc.data, dotted):
            on_line = any(place[: len(o)] == o for o in doc.overrides)
            base = (said_in or Path.cwd()) if on_line else doc.folder
            there = base / Path(holder[place[-1]]).expanduser()
            if holder[place[-1]] and there.exists():
                holder[place[-1]] = str(there.absolute())


def holders(data: Any, dotted: str) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the paths of all text in `data` that `dotted` means, each with what holds its key.

    `*` stands for each item of a list.
    """
    step, _, rest = dotted.partition(".")
    keys: list[Key] = [step]
    if step == "*":
        keys = list(range(len(data))) if isinstance(data, list) else []
    for key in keys:
        inside = isinstance(data, list) or (isinstance(data, dict) and key in data)
        if not inside:
            continue
        if rest:
            yield from (((key, *path), holder) for path, holder in holders(data[key], rest))
        elif isinstance(data[key], str):
            yield (key,), data


def validate(doc: Document, model: type[M]) -> M:
    """Check `doc` against `model`. Every problem is reported at once, each at its line."""
    problems, checked = look_at(doc, model)
    if problems or checked is None:
        raise RecipeError(refused(doc, problems))
    return checked


def look_at(doc: Document, model: type[M]) -> tuple[list[str], M | None]:
    """Check `doc` against `model`; return all problems, and what it means if there are none."""
    problems = list(doc.problems)
    if not isinstance(doc.data, dict):
        problems.append(at(doc, (), "a recipe is a mapping of `key: value` lines"))
        return problems, None
    wanted = get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()
    found = doc.data.get("kind")
    if wanted and isinstance(found, str) and found not in wanted and found in KINDS:
        text = f"this is a `{found}` recipe; it runs with `bmkit {found}`"
        return [*problems, at(doc, ("kind",), text)], None
    problems += _unknown_gates(doc, model)
    try:
        # JSON mode + strict is the data model of YAML: "4" is not 4, a list may become a tuple.
        checked = model.model_validate_json(json.dumps(doc.data), strict=True)
    except ValidationError as exc:
        found = exc.errors(include_url=False)
        problems += dict.fromkeys(_explain_all(doc, model, found))
        problems += _behind_wrong_tags(doc, model, found, problems)
    return problems, None if problems else checked


def _behind_wrong_tags(
    doc: Document, model: type[M], found: Sequence[Any], told: Sequence[str]
) -> list[str]:
    """Return what else is wrong where a `method` or `type` is misspelt: as if it were not."""
    data, guessed = json.loads(json.dumps(doc.data)), False
    for problem in found:
        if problem["type"] != "union_tag_invalid":
            continue
        tag = problem["ctx"]["discriminator"].strip("'")
        allowed = _choices(problem["ctx"]["expected_tags"])
        close = difflib.get_close_matches(str(problem["ctx"]["tag"]), allowed, n=1, cutoff=0.55)
        here = data
        for step in _resolve(doc, model, problem["loc"])[0]:
            here = here[step]
        if close:
            here[tag], guessed = close[0], True
    if not guessed:
        return []
    try:
        model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as exc:
        again = _explain_all(replace(doc, data=data), model, exc.errors(include_url=False))
        return [text for text in dict.fromkeys(again) if text not in told]
    return []


KINDS = ("compress", "tune", "prompt", "infer", "spec-decode", "duplex")


TAGS_OF_JSON = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")
}


def refused(doc: Document, problems: Sequence[str]) -> str:
    """Return the message that names every problem of `doc`."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{doc.source}: {count}", *problems])


def _unknown_gates(doc: Document, model: type[Model]) -> list[str]:
    metrics = getattr(model, "METRICS", ())
    gates = doc.data.get("gates")
    problems = []
    for name in gates if isinstance(gates, dict) else ():
        if name not in metrics:
            known = ", ".join(metrics) or "none in this stage"
            hint = did_you_mean(name, metrics, otherwise=f"known: {known}")
            text = f"no metric is called `{name}`; {hint}"
            problems.append(at(doc, ("gates", name), text, on_key=True))
    return problems


def _explain_all(doc: Document, model: type[Model], problems: Sequence[Any]) -> list[str]:
    """Explain each problem; those of a union's branches, where every branch failed, in one."""
    said = []
    branches: dict[KeyPath, list[str]] = {}
    for problem in problems:
        loc = problem["loc"]
        plain = problem["type"] in {"missing", "extra_forbidden", "contradiction"}
        if plain or _inside(doc.data, loc):
            said.append(_explain(doc, model, problem))
            continue
        expected = problem.get("ctx", {}).get("expected") or problem["msg"].partition("be ")[2]
        branches.setdefault(_resolve(doc, model, loc[:-1])[0], []).append(expected.strip("'"))
    for path, wanted in branches.items():
        value: Any = doc.data
        for step in path:
            value = value[step]
        close = did_you_mean(str(value), wanted)
        ways = " or ".join(w.replace("a valid array", "a list") for w in wanted)
        text = f"`{path[-1]}` should be {ways}, not `{json.dumps(value)}`"
        said.append(at(doc, path, text + (f"; {close}" if close else "")))
    return said


def _inside(data: Any, loc: Sequence[Key]) -> bool:
    """Tell whether the last step of `loc` is a place in `data`, and not a union's branch."""
    here = data
    for i, step in enumerate(loc):
        there = isinstance(here, dict) and step in here
        there |= isinstance(here, list) and isinstance(step, int) and step < len(here)
        if not there and i == len(loc) - 1:
            return False
        here = here[step] if there else here
    return True


def _explain(doc: Document, model: type[Model], problem: Any) -> str:
    kind, ctx = problem["type"], problem.get("ctx", {})
    if kind == "contradiction":
        part = _resolve(doc, model, problem["loc"])[0] if problem["loc"] else ()
        keys = (*part, *(int(k) if k.isdigit() else k for k in ctx["key"].split(".")))
        absent = "" if _inside(doc.data, keys) else f"`{'.'.join(map(str, keys))}`: "
        return at(doc, keys, absent + problem["msg"])
    path, known = _resolve(doc, model, problem["loc"])
    name = str(path[-1]) if path else doc.source
    if kind == "extra_forbidden":
        close = did_you_mean(name, known, otherwise=f"known keys: {', '.join(known)}")
        return at(doc, path, f"unknown key `{name}`; {close}", on_key=True)
    if kind == "missing":
        return at(doc, path[:-1], f"`{name}` is required", on_key=True)
    if kind == "union_tag_not_found":
        tag = ctx["discriminator"].strip("'")
        return at(doc, path, f"`{tag}` is required", on_key=True)
    if kind in {"literal_error", "union_tag_invalid"}:
        allowed = _choices(ctx.get("expected") or ctx["expected_tags"])
        got = problem["input"] if kind == "literal_error" else ctx["tag"]
        if kind == "union_tag_invalid":
            path = (*path, ctx["discriminator"].strip("'"))
        if isinstance(got, str) and got in allowed:
            return at(doc, path, f"{got!r} is text here; write {got}")
        close = did_you_mean(str(got), allowed)
        text = f"`{got}` is not one of {', '.join(allowed)}" + (f"; {close}" if close else "")
        return at(doc, path, text)
    if kind in {"too_short", "string_too_short"}:
        what = ("item", "items") if kind == "too_short" else ("sign", "signs")
        return at(doc, path, f"`{name}` needs {counted(ctx['min_length'], *what)} at least")
    if kind == "string_pattern_mismatch":
        said = f"`{name}` can't be `{problem['input']}`: it has to match {ctx['pattern']}"
        return at(doc, path, said)
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    for theirs, ours in (("a valid array", "a list"), ("an object", "a mapping")):
        message = message.replace(f"should be {theirs}", f"should be {ours}")
    if message.startswith("should"):
        message = f"`{name}` {message}, not `{json.dumps(problem['input'])}`"
    return at(doc, path, message)


def _choices(text: str) -> list[str]:
    found = re.findall(r"'[^']*'|[^\s,']+", text.replace(" or ", ", "))
    return [word.strip("'") for word in found]


def _resolve(doc: Document, model: type[Model], loc: Sequence[Key]) -> tuple[KeyPath, list[str]]:
    """Drop the union tags that pydantic puts in a loc, and find the keys known there."""
    path: list[Key] = []
    here: Any = doc.data
    current: Any = model
    for i, step in enumerate(loc):
        last = i == len(loc) - 1
        fields = _fields(current)
        inside = isinstance(here, dict) and step in here
        inside |= isinstance(here, list) and isinstance(step, int) and step < len(here)
        if not inside and not last:
            current = _variant(current, str(step)) or current
            continue
        path.append(step)
        if last:
            break
        here = here[step]
        if step in fields:
            current = fields[step].annotation
    return tuple(path), sorted(_fields(current))


def _fields(annotation: Any) -> dict[Any, Any]:
    """Return the fields of the model inside `annotation`, looking through list, dict and union."""
    if found := getattr(annotation, "model_fields", None):
        return dict(found)
    merged: dict[Any, Any] = {}
    for arg in get_args(annotation):
        merged.update(_fields(arg))
    return merged


def _variant(annotation: Any, tag: str) -> Any:
    """Find the member of a (possibly nested) tagged union that `tag` selects."""
    for arg in get_args(annotation):
        fields = getattr(arg, "model_fields", {})
        if any(tag in get_args(f.annotation) for n, f in fields.items() if n in TAGS):
            return arg
        if found := _variant(arg, tag):
            return found
    return None


TAGS = ("method", "type")


def at(doc: Document, path: KeyPath, text: str, *, on_key: bool = False) -> str:
    """Say `text` at the place of `path` in `doc`: file:line:col, the line, a caret."""
    for cut in range(len(path), -1, -1):
        if path[:cut] in doc.overrides:
            return f"  --> {doc.overrides[path[:cut]]}\n   = {text}"
    for changed, label in doc.overrides.items():
        if path and changed[: len(path)] == path:
            return f"  --> {label}\n   = {text}"
    while path and path not in doc.value_marks:
        path = path[:-1]
    mark = doc.key_marks.get(path) if on_key else None
    return _point(doc, mark or doc.value_marks.get(path), text)


def _point(doc: Document, mark: yaml.Mark | None, text: str) -> str:
    if mark is None or not doc.lines:
        return f"  --> {doc.source}\n   = {text}"
    row, column = mark.line, mark.column
    if row >= len(doc.lines):  # the end of the text: point behind its last line
        row, column = len(doc.lines) - 1, len(doc.lines[-1])
    line = doc.lines[row]
    word = re.match(r"[^\s:,\]}#]*", line[column:])
    width = max(len(word.group()) if word else 0, 1)
    n = str(row + 1)
    pad = " " * len(n)
    lead = re.sub(r"[^\t]", " ", line[:column])
    return (
        f"  --> {doc.source}:{row + 1}:{column + 1}\n"
        f" {pad} |\n {n} | {line}\n {pad} | {lead}{'^' * width} {text}"
    )
