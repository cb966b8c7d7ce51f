"""A pipeline: a YAML list of stages, the same thing as the shell's pipe, with the same words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from bmkit import builtin, recipe, registry
from bmkit.artifact import Artifact, Step
from bmkit.duplex import held_out
from bmkit.errors import InputError, RecipeError
from bmkit.pipeline import stage
from bmkit.pipeline.stage import Request
from bmkit.pull import run as pulls
from bmkit.recipe import Document, Model
from bmkit.report import Reporter


class _Pull(Model):
    pull: str
    out: str | None = None


class _Stage(Model):
    model: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    device: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**32)


class _Compress(_Stage):
    compress: str | dict[str, Any]
    out: str | None = None


class _Tune(_Stage):
    tune: str | dict[str, Any]
    out: str | None = None
    data: str | None = None


class _Prompt(_Stage):
    prompt: str | dict[str, Any]
    out: str | None = None
    data: str | None = None


class _Duplex(_Stage):
    duplex: str | dict[str, Any]
    out: str | None = None
    data: str | None = None


class _DuplexEval(_Stage):
    duplex_eval: str | dict[str, Any] = Field(alias="duplex-eval")
    out: str | None = None
    data: str | None = None


class _Answers(_Stage):
    prompt: str | list[str] | None = None
    input: str | None = None
    system: str | None = None
    raw: bool | None = None
    max_new_tokens: int | None = Field(default=None, ge=1)
    adapters: list[str] = Field(default_factory=list)


class _Infer(_Answers):
    infer: str | dict[str, Any]


class _SpecDecode(_Answers):
    spec_decode: str | dict[str, Any] = Field(alias="spec-decode")
    draft: str | None = None
    phrases: str | None = None


WORDS: dict[str, type[Model]] = {
    "pull": _Pull,
    "compress": _Compress,
    "tune": _Tune,
    "prompt": _Prompt,
    "infer": _Infer,
    "spec-decode": _SpecDecode,
    "duplex": _Duplex,
    "duplex-eval": _DuplexEval,
}
PARTS = {"duplex-eval": ("duplex", "eval")}
"""Words for a part of a stage: the stage, and the part."""


FLAGS = ("system", "raw", "max_new_tokens", "draft", "phrases")
"""Words of a stage that are keys of its recipe."""


@dataclass(frozen=True)
class Item:
    """One stage of a pipeline."""

    stage: str
    recipe: str | Document
    options: Mapping[str, Any]
    where: str
    folder: Path
    part: str = ""

    @property
    def word(self) -> str:
        """Return what a pipeline calls it."""
        return f"{self.stage}-{self.part}" if self.part else self.stage

    @property
    def makes_data(self) -> bool:
        """Tell whether it runs without a model: later stages take what it leaves as their data."""
        takes = () if self.stage == "pull" else registry.STAGES[self.stage].takes
        return "nothing" in takes and not self.part

    @property
    def shown(self) -> Any:
        """Return the recipe as JSON shows it: its name, or its keys."""
        return self.recipe if isinstance(self.recipe, str) else self.recipe.data


def read(name: str) -> list[Item]:
    """Read a pipeline: a file, a built-in name, or `-`. Raises RecipeError naming all faults."""
    text, source, short, folder = builtin.read("pipelines", name)
    doc = recipe.parse(text, source, name=short, folder=folder)
    if not isinstance(doc.data, list) or not doc.data:
        raise RecipeError(
            f"{source}: a pipeline is a list of stages", hint="as `- compress: int8` on each line"
        )
    problems = list(doc.problems)
    items = [item for i, entry in enumerate(doc.data) if (item := _item(doc, i, entry, problems))]
    for i, item in enumerate(items if len(items) == len(doc.data) else ()):
        answers = item.stage != "pull" and registry.STAGES[item.stage].gives == "text"
        if answers and i < len(items) - 1:
            said = f"`{item.stage}` writes text, so it comes last"
            problems.append(_said(doc, i, item.stage, said))
        if item.stage == "pull" and i > 0:
            problems.append(_said(doc, i, "pull", "`pull` comes first"))
        if item.makes_data and "model" in item.options:
            said = "`duplex` builds data here, and takes no model; `duplex-eval` measures one"
            problems.append(_said(doc, i, "duplex", said))
        first = all(before.makes_data for before in items[:i])
        if first and item.stage != "pull" and not item.makes_data and "model" not in item.options:
            problems.append(_said(doc, i, item.word, "the first stage needs `pull` or `model`"))
        if answers and ("prompt" in item.options) == ("input" in item.options):
            said = f"`{item.stage}` needs one of `prompt` and `input`"
            problems.append(_said(doc, i, item.stage, said))
    if problems:
        raise RecipeError(recipe.refused(doc, problems))
    return items


def _item(doc: Document, i: int, entry: Any, problems: list[str]) -> Item | None:
    if not isinstance(entry, dict):
        problems.append(_said(doc, i, None, "a stage is a mapping, as `compress: int8`"))
        return None
    names = [key for key in entry if key in WORDS]
    if len(names) > 1 and set(names) & {"infer", "spec-decode"}:
        names = [name for name in names if name != "prompt"]  # what is asked there
    if len(names) != 1:
        odd = [key for key in entry if difflib.get_close_matches(str(key), WORDS, n=1)]
        close = [difflib.get_close_matches(str(key), WORDS, n=1)[0] for key in odd]
        hint = f"; did you mean `{close[0]}`?" if close and not names else ""
        text = f"one of {', '.join(WORDS)} says what the stage is{hint}"
        problems.append(_said(doc, i, odd[0] if odd else None, text))
        return None
    name = names[0]
    found, checked = recipe.look_at(recipe.part(doc, (i,)), WORDS[name])
    problems += found
    if checked is None:
        return None
    own = name.replace("-", "_")
    kind, part = PARTS.get(name, (name, ""))
    options = checked.model_dump(exclude={own}, exclude_none=True, exclude_unset=True)
    _from_file(doc.folder, options)
    value = entry[name]
    if not isinstance(value, str):
        value = recipe.part(doc, (i, name), name="recipe")
        value.data = {"kind": kind, **value.data}
    elif (doc.folder / value).is_file() or (name == "pull" and (doc.folder / value).is_dir()):
        value = str(doc.folder / value)
    return Item(kind, value, options, f"{doc.source}, stage {i + 1}", doc.folder, part)


def _from_file(folder: Path, options: dict[str, Any]) -> None:
    """Make the paths of a pipeline file relative to the file, where something lies there."""

    def there(value: str) -> str:
        return str(folder / value) if (folder / value).exists() else value

    for key in {"model", "data", "input", "draft"} & options.keys():
        options[key] = there(options[key])
    if "adapters" in options:
        options["adapters"] = [there(value) for value in options["adapters"]]
    for key in {"out", "phrases"} & options.keys():
        options[key] = str(folder / options[key])


def _said(doc: Document, i: int, key: Any, text: str) -> str:
    return recipe.at(doc, (i,) if key is None else (i, key), text, on_key=key is not None)


def run(
    items: Sequence[Item],
    reporter: Reporter,
    answer: Callable[[Request, Mapping[str, Any]], None],
    *,
    force: bool = False,
) -> tuple[Path, stage.Result | None, Artifact] | None:
    """Run the stages in order, each on what the one before has left.

    `answer` runs a last stage that writes text instead of an artifact; the answer is
    then None. Raises what the stages raise, GateError included: later stages don't run.
    """
    last: tuple[Path, stage.Result | None, Artifact] | None = None
    model: str | None = None
    data: str | None = None
    for item in items:
        options = dict(item.options)
        out = Path(options["out"]) if options.get("out") else None
        if item.stage == "pull":
            found, _ = pulls.pull(str(item.recipe), reporter, out=out, force=force)
            last, model = (found.path, None, found), str(found.path)
            continue
        given = options.get("model") or model
        if given is None and not item.makes_data:
            raise InputError(f"{item.where}: no model")
        request = _request(item, "" if item.makes_data else str(given), force=force, data=data)
        if registry.STAGES[item.stage].gives == "text":
            answer(request, options)
            return None
        result = stage.run_stage(request, reporter)
        stage.require_gates(result)
        last = (result.artifact.path, result, result.artifact)
        if result.artifact.kind == "data":
            data = str(last[0].absolute())
        elif result.artifact.kind != "report":
            model = str(last[0])
    return last


def check(items: Sequence[Item]) -> None:
    """Validate every stage's recipe without running anything. Raises RecipeError for all faults."""
    said = []
    for item in items:
        if item.stage != "pull":
            try:
                stage.load_recipe(_request(item, ""))
            except RecipeError as exc:
                hint = f"\n   = {exc.hint}" if exc.hint else ""
                said.append(f"{item.where}: {exc}{hint}")
    if said:
        raise RecipeError("\n".join(said))


def describe(items: Sequence[Item], reporter: Reporter) -> list[dict[str, Any]]:
    """Return each stage's plan, as far as what comes before it is there already."""
    plans: list[dict[str, Any]] = []
    last: str | None = None
    data: str | None = None
    waits = False  # for data that aren't there yet
    for item in items:
        if item.stage == "pull":
            found = pulls.find(str(item.recipe))
            last = str(found.path) if found else None
            said = {"stage": "pull", "recipe": item.recipe, "path": last, "reused": bool(found)}
            plans.append(said)
            continue
        model = "" if item.makes_data else item.options.get("model") or last
        if model is None or (waits and _takes_data(item)):
            last = last if item.part else None
            plans.append({"stage": item.stage, "recipe": item.shown, "path": None, "reused": False})
            continue
        request = _request(item, str(model), data=data)
        prepared = stage.prepare(request, reporter, bring=False)
        plans.append(stage.describe_plan(prepared, reporter))
        left = str(prepared.out.absolute()) if prepared.done is not None else None
        if item.makes_data:
            data, waits = left, left is None
        elif not item.part:
            last = left
    return plans


def _takes_data(item: Item) -> bool:
    """Tell whether a stage is given what one before it has built, if that is data."""
    return item.stage in ("tune", "prompt") and "data" not in item.options


def _request(item: Item, model: str, *, force: bool = False, data: str | None = None) -> Request:
    options = item.options
    assign = tuple(f"{k}={_yaml(v)}" for k, v in (options.get("set") or {}).items())
    given = options.get("data") or (data if _takes_data(item) else None)
    if item.part and given is not None:
        assign += (f"eval.data={_yaml(str(held_out.find(Path(given)).absolute()))}",)
        given = None
    return Request(
        part=item.part,
        stage=item.stage,
        recipe=item.recipe,
        model=model,
        out=Path(options["out"]) if options.get("out") else None,
        assign=assign,
        data=given,
        device=options.get("device"),
        seed=options.get("seed"),
        adapters=tuple(options.get("adapters") or ()),
        flags={k: options[k] for k in FLAGS if k in options},
        force=force,
        folder=item.folder,
    )


def lineage(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return the pipeline that made an artifact, ready to be written as YAML and run again.

    Raises InputError for steps that no pipeline has, as `merge`.
    """
    items: list[dict[str, Any]] = []
    if foreign := [step.stage for step in steps if step.stage not in WORDS]:
        raise InputError(
            f"`bmkit {foreign[0]}` has made this, which is no stage of a pipeline",
            hint="`--format tree` shows it all; what a tune merges (`merge: true`) has a pipeline",
        )
    for step in steps:
        if step.stage == "pull":
            items.append({"pull": step.recipe["name"]})
            continue
        values = {k: v for k, v in step.recipe.items() if k != "kind"}
        given = step.inputs.get("model")
        evaluates = step.stage == "duplex" and given is not None
        item: dict[str, Any] = {"duplex-eval" if evaluates else step.stage: values}
        if not items and given is not None:
            item["model"] = given.path
        items.append(item)
    return items


def to_yaml(items: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> str:
    """Write a pipeline or recipe so that bmkit's own loader reads the same values back."""
    whole = dict(items) if isinstance(items, Mapping) else list(items)
    return yaml.dump(whole, Dumper=_Dumper, sort_keys=False, width=10**6)


class _Dumper(yaml.SafeDumper):
    """Quotes all text that is not a plain word, and writes every value out in full."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value again where it stands again: readers need no anchors."""
        return True


_WORD = re.compile(r"[A-Za-z_][\w ./-]*(?<! )", re.ASCII)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    plain = _WORD.fullmatch(value) and recipe.scalar(value) == value
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    written = repr(value)
    if "e" in written and "." not in written:  # YAML 1.1 takes 1e-05 for a word
        written = written.replace("e", ".0e", 1)
    return dumper.represent_scalar("tag:yaml.org,2002:float", written)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(float, _float)


def _yaml(value: Any) -> str:
    return (
        yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6)
        .removesuffix("...\n")
        .strip()
    )
