"""The commands that look things up: recipes, artifacts, pipelines, the cache, the machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bmkit_cli import session, stopping
from bmkit_cli.options import (
    ForceOpt,
    JsonOpt,
    PlanOpt,
    Progress,
    ProgressOpt,
    QuietOpt,
    SetOpt,
    VerboseOpt,
)

ArtifactArg = Annotated[Path, typer.Argument(help="An artifact's directory.")]
NameArg = Annotated[str, typer.Argument(help="A recipe: a file, NAME or STAGE/NAME.")]

cache = typer.Typer(
    help="See and shrink what BMKIT_HOME holds.", no_args_is_help=True, rich_markup_mode=None
)


def run(
    pipeline: Annotated[str, typer.Argument(help="A pipeline file, a built-in name, or -.")],
    plan: PlanOpt = False,
    as_json: JsonOpt = False,
    force: ForceOpt = False,
    how: ProgressOpt = Progress.auto,
    verbose: VerboseOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Run the stages of a pipeline, one after the other."""
    reporter = session.start(how, quiet=quiet, loud=verbose)
    from bmkit.pipeline import chain
    from bmkit_cli.answering import answer
    from bmkit_cli.commands.stages import describe, show_plan
    from bmkit_cli.output import out as stdout

    stream = stdout()
    items = chain.read(pipeline)
    chain.check(items)
    if plan:
        plans = chain.describe(items, reporter)
        if as_json:
            stream.json(plans)
        for values in () if as_json else plans:
            if "key" in values:
                show_plan(values, as_json=False)
            else:
                where = values["path"] or "(known once what comes before it is there)"
                stream.text(f"{values['stage']} {values['recipe']}\n  out          {where}")
        return

    def respond(request: Any, options: Any) -> None:
        answer(request, {**options, "as_json": as_json}, reporter)

    with stopping.telling():
        left = chain.run(items, reporter, respond, force=force)
    if left is None:
        return
    path, result, found = left
    if not as_json:
        stream.text(str(path))
    elif result is not None:
        stream.json(describe(result, str(path)))
    else:
        stream.json({"path": str(path), "kind": found.kind, "digest": found.digest})


def ls(
    stage: Annotated[str | None, typer.Argument(help="Only this stage's recipes.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """List the built-in recipes and pipelines, and the models that can be pulled."""
    from bmkit import builtin
    from bmkit.errors import UsageError, did_you_mean
    from bmkit.pull.source import NAMED
    from bmkit_cli.output import out as stdout

    known = builtin.stages()
    if stage is not None and stage not in known:
        hint = did_you_mean(stage, known, otherwise=f"there are: {', '.join(known)}")
        raise UsageError(f"no recipes for `{stage}`", hint=hint)
    listing = {
        s: {n: builtin.first_line(s, n) for n in builtin.names(s)}
        for s in known
        if stage in {None, s}
    }
    if stage is None:
        listing["pull"] = {m.name: f"{m.package} {m.version}, {m.licence}" for m in NAMED.values()}
    if as_json:
        stdout().json(listing)
        return
    lines = [
        f"{s + '/' + n:24} {text}" for s, names in listing.items() for n, text in names.items()
    ]
    stdout().text("\n".join(lines))


def show(
    name: Annotated[str, typer.Argument(help="A recipe (file, NAME or STAGE/NAME) or artifact.")],
    as_json: JsonOpt = False,
) -> None:
    """Show a recipe with its comments, or what an artifact is."""
    from bmkit import artifact
    from bmkit.env import format_bytes
    from bmkit.errors import InputError
    from bmkit.pull import run as pulls
    from bmkit.pull.source import NAMED
    from bmkit_cli.output import out as stdout

    path = Path(name)
    if name in NAMED and not path.exists():
        pulled = pulls.find(name)
        if pulled is None:
            raise InputError(f"{name} is not here yet", hint=f"bring it with: bmkit pull {name}")
        path = pulled.path
    if not path.is_dir():
        text, _, _ = _recipe(name)
        if as_json:
            from bmkit import recipe

            stdout().json(recipe.parse(text, name).data)
        else:
            stdout().text(text, end="")
        return
    from bmkit import tables
    from bmkit.prompt import stored

    found = artifact.open_artifact(path)
    if as_json:
        values: dict[str, Any] = {"path": name, "kind": found.kind, "digest": found.digest}
        if found.manifest is not None:
            values |= found.manifest.model_dump(mode="json", by_alias=True)
        if found.kind == "prompt":
            values["prompt"] = stored.read(path).model_dump(mode="json")
        stdout().json(values)
        return
    lines = [f"kind     {found.kind}", f"digest   {found.digest}"]
    if (manifest := found.manifest) is not None:
        lines.append(f"made by  {' | '.join(map(_called, manifest.steps))}")
        if manifest.base is not None:
            lines.append(f"base     {manifest.base.path}  ({manifest.base.digest[:12]}…)")
        if found.kind == "prompt":
            lines += stored.described(stored.read(path))
        lines += [f"metric   {key} = {value}" for key, value in manifest.metrics.items()]
        lines += [f"loads in {name}" for name in manifest.loads_in]
        lines += [f"table    {line}" for line in tables.lines(manifest.table)]
        lines += [f"file     {n}  {format_bytes(e.bytes)}" for n, e in manifest.files.items()]
    stdout().text("\n".join(lines))


def cp(
    name: NameArg,
    target: Annotated[Path, typer.Argument(help="Where the copy goes: a file or a directory.")],
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite the file if it is there.")
    ] = False,
) -> None:
    """Copy a built-in recipe, to change it."""
    from bmkit import place
    from bmkit.errors import OutputTaken
    from bmkit_cli.output import out as stdout

    text, stage, short = _recipe(name)
    if target.is_dir():
        target = target / f"{short}.yaml"
    if target.exists() and not force:
        raise OutputTaken(f"{target} is there already", hint="name another, or use --force")
    place.write_text(target, text)
    duplex = "duplex replay TRANSCRIPT.jsonl" if short == "talk" else "duplex build"
    command = {"pipelines": "run", "duplex": duplex}.get(stage, stage)
    sys.stderr.write(f"{stage}/{short} copied; run it with: bmkit {command} {target}\n")
    stdout().text(str(target))


def validate(
    name: NameArg,
    assign: SetOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Check a recipe or pipeline without running it."""
    from bmkit.pipeline import chain, stage
    from bmkit_cli.output import out as stdout

    _, kind, _ = _recipe(name)
    if kind == "pipelines":
        items = chain.read(name.removeprefix("pipelines/"))
        chain.check(items)
        values: Any = [{"stage": i.stage, "recipe": i.shown} for i in items]
    else:
        source = name.removeprefix(f"{kind}/") if not Path(name).is_file() else name
        request = stage.Request(kind, source, "", assign=tuple(assign or ()))
        values = stage.load_recipe(request)[1].model_dump(mode="json")
    if as_json:
        stdout().json(values)
    else:
        stdout().text(f"{name} is valid")


def schema(
    stage: Annotated[
        str, typer.Argument(help="compress, tune, prompt, infer, spec-decode or duplex.")
    ],
) -> None:
    """Print a recipe's JSON schema, for editors."""
    import json

    from bmkit import registry
    from bmkit.errors import UsageError, did_you_mean
    from bmkit_cli.output import out as stdout

    if stage not in registry.STAGES:
        hint = did_you_mean(stage, registry.STAGES, otherwise=", ".join(registry.STAGES))
        raise UsageError(f"`{stage}` is not a stage", hint=hint)
    model = registry.load(registry.STAGES[stage].recipe)
    stdout().text(json.dumps(model.model_json_schema(), indent=1))


def log(
    path: ArtifactArg,
    form: Annotated[
        Literal["tree", "yaml", "json"],
        typer.Option("--format", help="`yaml` is a pipeline that makes it again."),
    ] = "tree",
) -> None:
    """Show how an artifact came to be."""
    from bmkit import artifact
    from bmkit.errors import InputError
    from bmkit.pipeline import chain
    from bmkit_cli.output import out as stdout

    if not (path / artifact.MANIFEST).is_file():
        raise InputError(f"{path} has no {artifact.MANIFEST}: bmkit did not make it")
    manifest = artifact.read_manifest(path)
    if form == "yaml":
        stdout().text(chain.to_yaml(chain.lineage(manifest.steps)), end="")
    elif form == "json":
        stdout().json([s.model_dump(mode="json") for s in manifest.steps])
    else:
        lines = [f"{path}  ({manifest.kind}, {manifest.digest[:12]}…)"]
        for depth, step in enumerate(reversed(manifest.steps)):
            lines.append(f"{'   ' * depth}└─ {_called(step)}  key {step.key[:12]}…")
            for name, entry in step.inputs.items():
                if name != "model":
                    lines.append(f"{'   ' * (depth + 1)}   {name}  {entry.path}")
        stdout().text("\n".join(lines))


def verify(path: ArtifactArg, as_json: JsonOpt = False) -> None:
    """Read an artifact's every byte and compare it with its manifest."""
    from bmkit import artifact
    from bmkit.errors import InputError
    from bmkit_cli.output import out as stdout

    if not (path / artifact.MANIFEST).is_file():
        raise InputError(f"{path} has no {artifact.MANIFEST}: there is nothing to compare with")
    manifest = artifact.read_manifest(path)
    wrong = artifact.differences(path, manifest)
    if as_json:
        stdout().json({"path": str(path), "digest": manifest.digest, "wrong": wrong})
    if wrong:
        raise InputError(
            f"{path} is damaged: {'; '.join(wrong)}", hint="build it again with --force"
        )
    if not as_json:
        stdout().text(f"{path} is whole: {len(manifest.files)} files, {manifest.digest}")


def doctor(as_json: JsonOpt = False) -> None:
    """Look at this machine and installation, and say what is missing."""
    session.start(Progress.none, quiet=True, loud=False)
    from bmkit_cli import checkup
    from bmkit_cli.output import out as stdout

    found = checkup.look()
    if as_json:
        stdout().json(found)
    else:
        stdout().text("\n".join(f"{key:16} {value}" for key, value in checkup.flat(found)))
    checkup.complain(found)


@cache.command("ls")
def cache_ls(as_json: JsonOpt = False) -> None:
    """List what BMKIT_HOME holds, with sizes."""
    from bmkit.env import format_bytes
    from bmkit_cli import shelf
    from bmkit_cli.output import out as stdout

    found = shelf.contents()
    if as_json:
        stdout().json(found)
    else:
        total = sum(entry["bytes"] for entry in found)
        lines = [f"{format_bytes(e['bytes']):>10}  {e['kind']:8} {e['path']}" for e in found]
        stdout().text("\n".join([*lines, f"{format_bytes(total):>10}  in all"]))


@cache.command("prune")
def cache_prune(
    everything: Annotated[bool, typer.Option("--all", help="Pulled models as well.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Remove cached artifacts, kernels and leftovers; pulled models stay unless --all."""
    from bmkit.env import format_bytes
    from bmkit_cli import shelf
    from bmkit_cli.output import out as stdout

    removed = shelf.prune(models=everything)
    freed = sum(entry["bytes"] for entry in removed)
    if as_json:
        stdout().json({"removed": [entry["path"] for entry in removed], "bytes": freed})
    else:
        stdout().text(f"removed {len(removed)} entries, {format_bytes(freed)}")


def _called(step: Any) -> str:
    """Return a step's stage and its recipe's name, a word once if both are the same."""
    return str(step.stage if step.stage == step.name else f"{step.stage} {step.name}")


def _recipe(name: str) -> tuple[str, str, str]:
    """Return a recipe's text, its stage (`pipelines` for a pipeline) and its short name."""
    from bmkit import builtin, recipe
    from bmkit.errors import InputError, RecipeError, did_you_mean

    path = Path(name)
    if path.suffix in {".yaml", ".yml"} and not path.is_file():
        raise InputError(f"no recipe file `{name}`", hint="`bmkit ls` lists the built-in ones")
    if path.is_file():
        text, source, short, _ = builtin.read("compress", name)
        data = recipe.parse(text, source).data
        if isinstance(data, list):
            return text, "pipelines", short
        kind = data.get("kind") if isinstance(data, dict) else None
        from bmkit import registry

        if kind not in registry.STAGES:
            hint = did_you_mean(str(kind), registry.STAGES, otherwise=", ".join(registry.STAGES))
            raise RecipeError(f"{name}: `kind` names no stage", hint=hint)
        return text, str(kind), short
    stages = builtin.stages()
    stage, slash, short = name.partition("/")
    found = [
        s
        for s in stages
        if (not slash or s == stage) and (short if slash else name) in builtin.names(s)
    ]
    if len(found) == 1:
        short = short if slash else name
        return builtin.read(found[0], short)[0], found[0], short
    every = [n for s in stages for n in (f"{s}/{x}" for x in builtin.names(s))]
    if found:
        raise RecipeError(f"`{name}` is in {', '.join(found)}", hint=f"write {found[0]}/{name}")
    plain = [n.partition("/")[2] for n in every]
    hint = did_you_mean(name, every + plain, otherwise="`bmkit ls` lists them")
    raise RecipeError(f"no file and no built-in recipe is called `{name}`", hint=hint)
