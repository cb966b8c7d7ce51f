"""Run one stage: validate, plan, key, reuse or build."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import bmkit
from bmkit import artifact, builtin, env, hashes, place, plan, registry
from bmkit import recipe as recipes
from bmkit.artifact import NOTHING, Artifact, InputEntry, Step
from bmkit.data.tabular import split_files
from bmkit.errors import BmkitError, GateError, InputError, OutputTaken, UsageError, an_artifact
from bmkit.pipeline.resolve import find_asked, find_base, find_model, taught_rows, warn_foreign_base
from bmkit.plan import Estimate, Job, Outcome
from bmkit.prompt.kept import own_model
from bmkit.recipe import Document, Recipe
from bmkit.report import Reporter, Silent


@dataclass(frozen=True)
class Request:
    """One stage as the user asked for it: the words of a command line, or of a pipeline's item."""

    stage: str
    recipe: str | Document
    model: str = ""
    """What `-m` names; empty for a stage that takes nothing."""
    out: Path | None = None
    assign: tuple[str, ...] = ()
    data: str | None = None
    device: str | None = None
    seed: int | None = None
    threads: int | None = None
    gpu_memory: str | None = None
    cpu_memory: str | None = None
    adapters: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Further recipe keys that have a flag of their own, as `max_new_tokens`."""
    rows: int | None = None
    """How many prompts there are, if that is known."""
    longest: str | None = None
    """The text of the longest of them, if that is known."""
    part: str = ""
    """Which of a stage's engines does it, if its input doesn't tell."""
    force: bool = False
    folder: Path | None = None
    """What paths in `assign` are relative to, if not the working directory."""


@dataclass(frozen=True)
class Prepared:
    """A stage that has been checked: everything is known, nothing is done."""

    request: Request
    stage: registry.Stage
    recipe: Recipe
    name: str
    model: Artifact
    base: Artifact | None
    adapters: tuple[Artifact, ...]
    draft: Artifact | None
    models: Mapping[str, Artifact]
    phrases: Path | None
    files: Mapping[str, Path]
    inputs: Mapping[str, InputEntry]
    key: str
    out: Path
    done: Artifact | None
    """The result, if it is there already."""
    doc: Document | None = None
    """The recipe as it was written."""
    prompt: Artifact | None = None
    """The prompt that `-m` or an adapter names; `model` is what it was made on, or is asked on."""
    teacher: Artifact | None = None
    """What `-m` names, if it has labelled the rows to learn from; `model` is its base."""

    @property
    def engine(self) -> tuple[str, str]:
        """Return the `plan` and `run` of the engine that does it."""
        kind = "prompt" if self.prompt is not None else self.model.kind
        return self.stage.engine(self.request.part or kind)

    def job(self, out: Path, work: Path, reporter: Reporter) -> Job:
        """Return what the engine gets."""
        threads = self.request.threads
        parts = (self.recipe, self.model, self.base, self.files, out, work, reporter, threads)
        return Job(
            *parts,
            adapters=self.adapters,
            draft=self.draft,
            models=self.models,
            phrases=self.phrases,
            cpu_memory=self.budget("cpu"),
            gpu_memory=self.budget("gpu"),
            rows=self.request.rows,
            longest=self.request.longest,
            prompt=self.prompt,
        )

    def budget(self, where: str) -> int | None:
        """Return the budget in bytes of the flag, else of the recipe, for `cpu` or `gpu`."""
        name = f"{where}_memory"
        said = getattr(self.request, name) or getattr(self.recipe, name, None)
        return env.parse_bytes(said) if said else None


@dataclass(frozen=True)
class Result:
    """What a stage has left."""

    artifact: Artifact
    key: str
    reused: bool
    seconds: float
    unmet: tuple[str, ...] = ()
    """Bounds of `gates` that are not met."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """What the engine says of this run alone."""
    helped: bool = False
    """Whether it is for another process to tell of the artifact."""


def load_recipe(request: Request) -> tuple[Document, Recipe]:
    """Read, override and validate the recipe of `request`. Raises RecipeError, naming all faults.

    Precedence: recipe < `--set` < flag.
    """
    stage = registry.STAGES[request.stage]
    kind: type[Recipe] = registry.load(stage.recipe)
    if isinstance(request.recipe, str):
        text, source, name, folder = builtin.read(request.stage, request.recipe)
        doc = recipes.parse(text, source, name=name, folder=folder)
    else:
        doc = recipes.part(request.recipe)
    recipes.override(doc, request.assign)
    if request.data is not None:
        _take_data(doc, kind, request.data)
    flags = {"device": request.device, "seed": request.seed, **request.flags}
    for key, value in flags.items():
        if value is not None and isinstance(doc.data, dict):
            doc.data[key] = value
            doc.overrides[(key,)] = f"--{key.replace('_', '-')} {value}"
    recipes.resolve_files(doc, kind, builtin.directory(), said_in=request.folder)
    return doc, recipes.validate(doc, kind)


def check(request: Request) -> Request:
    """Validate the recipe before its model is known, and return the request as it was checked.

    A recipe from stdin is read here, so that it isn't read a second time.
    """
    for size in (request.gpu_memory, request.cpu_memory):
        if size is not None:
            env.parse_bytes(size)
    if request.recipe == "-":
        text, source, name, folder = builtin.read(request.stage, "-")
        doc = recipes.parse(text, source, name=name, folder=folder)
        request = replace(request, recipe=doc)
    load_recipe(request)
    return request


def _take_data(doc: Document, kind: type[Recipe], data: str) -> None:
    """Let `--data` take the place of `sources`, or of `data.train`, or of every split if it is a
    directory.

    Rows that are mixed in are no split: they stay, unless the directory has some.
    """
    if not kind.FILES:
        raise UsageError(f"--data has no meaning in `{doc.source}`")
    if "sources" in kind.model_fields and isinstance(doc.data, dict):
        doc.data["sources"] = [{"path": str(Path(data).expanduser().absolute())}]
        doc.overrides["sources",] = f"--data {data}"
        return
    if not isinstance(doc.data, dict) or not isinstance(doc.data.setdefault("data", {}), dict):
        return  # validate says what is wrong
    splits = [f.partition(".")[2] for f in kind.FILES if f.startswith("data.")]
    path = Path(data).expanduser()
    if (path / artifact.MANIFEST).is_file():
        given = artifact.open_artifact(path).kind
        if given != "data":
            raise InputError(f"--data {data} is {an_artifact(given)}, not data")
    found = {"train": path}
    if path.is_dir() and "test" in splits:
        found = split_files(path)
    elif path.is_dir():
        found = {s: path / f"{s}.jsonl" for s in splits if (path / f"{s}.jsonl").is_file()}
        if "train" not in found:
            raise InputError(f"{path} has no train.jsonl", hint="--data takes a file or splits")
    for split in splits:
        value = doc.data["data"].get(split)
        ours = isinstance(value, str) and value.startswith("builtin:")
        if split in found:
            doc.data["data"][split] = str(found[split].absolute())
            doc.overrides["data", split] = f"--data {data}"
        elif split != "mix" and (
            path.is_dir() or ours
        ):  # a split of bmkit's own set says nothing about other data
            doc.data["data"].pop(split, None)


def prepare(request: Request, reporter: Reporter, *, bring: bool = True) -> Prepared:
    """Check everything about a stage that can be checked before doing it.

    With `bring`, a model that is named but not here yet is pulled. No torch is imported.
    """
    doc, recipe = load_recipe(request)
    recipe = recipe.model_copy(update={"device": env.resolve_device(recipe.device)})
    stage = registry.STAGES[request.stage]
    model = NOTHING
    if request.model or "nothing" not in stage.takes:
        model = find_model(request.model, reporter, bring=bring)
    teacher = model if model.kind == stage.taught_by else None
    if teacher is not None:
        model = find_base(teacher, reporter, bring=bring)
        if request.data is None:
            rows = f"data.train={json.dumps(str(taught_rows(teacher)))}"
            request = replace(request, assign=(rows, *request.assign))
        doc, recipe = load_recipe(request)
        recipe = recipe.model_copy(update={"device": env.resolve_device(recipe.device)})
    files = _files(doc, recipe)
    if model.kind not in stage.takes:
        merge = "; merge it into its base first" if model.kind == "delta" else ""
        raise InputError(
            f"{model.path} is {an_artifact(model.kind)}; `bmkit {stage.name}` takes "
            f"{' or '.join(an_artifact(k) for k in stage.takes if k != NOTHING.kind)}{merge}",
            hint="`-s merge=true` makes `bmkit tune` write a model" if merge else None,
        )
    named = (*_adapters(doc, recipe, request), *request.adapters)
    adapters = tuple(find_model(a, reporter, bring=bring) for a in named)
    prompt, adapters = _prompt(stage, model, adapters)
    given = model
    if model.kind == "prompt":
        model = find_asked(model, reporter, bring=bring)
    elif prompt is not None:
        if own_model(prompt.path) is not None:
            raise InputError(
                f"--adapter {prompt.path} has a model of its own", hint=f"-m {prompt.path}"
            )
        warn_foreign_base(prompt, model, reporter)
    for number, found in enumerate(adapters):
        if any(found.path.resolve() == other.path.resolve() for other in adapters[:number]):
            raise UsageError(f"--adapter {found.path} is there twice")
        if found.kind != "delta":
            raise InputError(f"--adapter {found.path} is {an_artifact(found.kind)}, not a delta")
    base = find_base(model, reporter, bring=bring) if model.kind == "delta" else None
    for found in adapters:
        warn_foreign_base(found, base or model, reporter)
    inputs = {}
    if model is not NOTHING:
        config = plan.read_headers((base or model).path).config
        recipe = recipe.settled(config, files)
        inputs["model"] = given.entry()
    if prompt is not None and prompt is not given:
        inputs["prompt"] = prompt.entry()
    for i, found in enumerate(adapters):
        inputs[f"adapters.{i}"] = found.entry()
    draft = _draft(doc, recipe, request, base or model, reporter, bring=bring)
    if draft is not None:
        inputs["draft"] = draft.entry()
    models = _models(recipe, reporter, bring=bring)
    inputs |= {dotted: found.entry() for dotted, found in models.items()}
    phrases = _path(doc, request, "phrases", getattr(recipe, "phrases", None))
    with hashes.HashCache() as cache:
        for dotted, file in files.items():
            digest = cache.sha256(file)
            inputs[dotted] = InputEntry(kind="data", digest=digest, path=str(file))
    digests = {name: entry.digest for name, entry in inputs.items()}
    if env.process()[1] > 1:  # so many times as large a batch
        digests["processes"] = str(env.process()[1])
    if request.part:
        digests["part"] = request.part
    key = artifact.stage_key(stage.name, stage.version, _without_paths(recipe), digests)
    out, done = _destination(request, stage, doc.name, key)
    if stage.gives != "text":
        given_models = [found for found in (model, base) if found not in (None, NOTHING)]
        _refuse_overlap(out, [*given_models, *models.values()])
    return Prepared(
        request,
        stage,
        recipe,
        doc.name,
        model,
        base,
        adapters,
        draft,
        models,
        Path(phrases) if phrases else None,
        files,
        inputs,
        key,
        out,
        done,
        doc,
        prompt,
        teacher,
    )


def _prompt(
    stage: registry.Stage, model: Artifact, adapters: tuple[Artifact, ...]
) -> tuple[Artifact | None, tuple[Artifact, ...]]:
    """Return the prompt among what was named, and the adapters without it."""
    found = [given for given in (model, *adapters) if given.kind == "prompt"]
    if "prompt" not in stage.takes:
        found = []
    if len(found) > 1:
        raise InputError(f"{found[1].path} is a second prompt: one is asked at a time")
    return (found[0] if found else None), tuple(a for a in adapters if a not in found)


def _adapters(doc: Document, recipe: Recipe, request: Request) -> list[str]:
    """Return the deltas that a recipe names."""
    named: list[str] = getattr(recipe, "adapters", [])
    found = [_path(doc, request, "adapters", name) for name in named]
    return [name for name in found if name is not None]


def _path(doc: Document, request: Request, key: str, name: str | None) -> str | None:
    """Return what a recipe's key names: a path is relative to where it was said."""
    if name is None:
        return None
    on_line = (key,) in doc.overrides
    folder = (request.folder or Path.cwd()) if on_line else doc.folder
    new = key == "phrases"  # it may yet have to be made
    return str(folder / name) if new or (folder / name).exists() else name


def _draft(
    doc: Document,
    recipe: Recipe,
    request: Request,
    target: Artifact,
    reporter: Reporter,
    *,
    bring: bool,
) -> Artifact | None:
    """Return the model that a recipe's `draft` names; `self` is the target."""
    name = _path(doc, request, "draft", getattr(recipe, "draft", None))
    if name is None or name == "self":
        return target if name else None
    found = find_model(name, reporter, bring=bring)
    if found.kind != "model":
        raise InputError(f"--draft {found.path} is {an_artifact(found.kind)}, not a model")
    plan.read_headers(found.path)
    return found


def _models(recipe: Recipe, reporter: Reporter, *, bring: bool) -> dict[str, Artifact]:
    """Return the further models that a recipe names, by dotted key."""
    found = {}
    values = recipe.model_dump(mode="json")
    for pattern in recipe.MODELS:
        for path, holder in recipes.holders(values, pattern):
            dotted = ".".join(map(str, path))
            found[dotted] = find_model(holder[path[-1]], reporter, bring=bring)
            if found[dotted].kind != "model":
                here = found[dotted]
                raise InputError(f"{dotted}: {here.path} is {an_artifact(here.kind)}, not a model")
            plan.read_headers(found[dotted].path)
    return found


def estimate(prepared: Prepared, reporter: Reporter) -> Estimate:
    """Say what the stage will do and need, from headers alone."""
    job = prepared.job(prepared.out, prepared.out, reporter)
    with placed_errors(prepared):
        found: Estimate = registry.load(prepared.engine[0])(job)
    return found


@contextmanager
def placed_errors(prepared: Prepared) -> Iterator[None]:
    """Show in the recipe what an error of the block is about, if it names a key."""
    try:
        yield
    except BmkitError as exc:
        if exc.key is None or prepared.doc is None:
            raise
        path = tuple(int(step) if step.isdigit() else step for step in exc.key.split("."))
        where = recipes.at(prepared.doc, path, str(exc))
        raise type(exc)(where.strip().removeprefix("--> "), hint=exc.hint) from None


def describe_plan(
    prepared: Prepared, reporter: Reporter, *, measure: bool = False
) -> dict[str, Any]:
    """Return what `--plan` shows; how fast it should be only with `measure`, which takes memory."""
    found = estimate(prepared, reporter)
    return {
        "stage": prepared.stage.name,
        "recipe": prepared.name,
        "inputs": {name: entry.model_dump() for name, entry in prepared.inputs.items()},
        "steps": found.steps,
        "key": prepared.key,
        "path": str(prepared.out) if prepared.stage.gives != "text" else None,
        "reused": prepared.done is not None,
        "peak": {
            "ram_bytes": found.peak.ram_bytes,
            "gpu_bytes": found.peak.gpu_bytes,
            "disk_bytes": found.peak.disk_bytes,
        },
        **({"expected": dict(found.rates())} if measure and found.rates else {}),
    }


def run_stage(request: Request, reporter: Reporter) -> Result:
    """Run one stage that writes an artifact, or find its result.

    Raises BmkitError; whatever happens, `out` holds a whole artifact or is as it was. Unmet gates
    are in the result: call `require_gates` to make an error of them.
    """
    start = time.monotonic()
    rank, world = env.process()
    if request.stage == "tune" and env.started_alone():
        raise UsageError(
            "accelerate was asked for several processes, and has started one",
            hint="`accelerate launch --multi_gpu` starts all, on a CPU, too; so does torchrun",
        )
    prepared = prepare(request, reporter)
    if prepared.done is not None:
        reporter.info(f"{prepared.stage.name}: unchanged, {prepared.out} is reused")
        same = _result(prepared.done, prepared, reused=True, start=start)
        return replace(same, helped=rank > 0)
    if world > 1 and prepared.stage.name != "tune":
        raise UsageError(f"`bmkit {prepared.stage.name}` runs in one process, not {world}")
    check_fits(prepared, reporter)
    work = env.home() / "work" / prepared.key[:16]
    what = f"the same {prepared.name}, perhaps under another --out, in {work},"
    if rank:
        return _help(prepared, work)
    waits = request.out is None
    again = "wait for it to end, then give this command again"
    held = place.hold(work, what, wait=waits, hint=again)
    with (
        held,
        place.create(
            prepared.out, key=prepared.key, force=request.force, wait=request.out is None
        ) as scratch,
    ):
        if request.out is None and not request.force:
            found = _destination(request, prepared.stage, prepared.name, prepared.key)[1]
            if found is not None:  # another process has built it while this one waited
                return _result(found, prepared, reused=True, start=start)
        if request.force and work.is_dir():
            for left in work.iterdir():  # «build again» means from the start
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        job = prepared.job(scratch, work, reporter)
        with placed_errors(prepared), _told(work):
            outcome: Outcome = registry.load(prepared.engine[1])(job)
        step = Step(
            stage=prepared.stage.name,
            name=prepared.name,
            key=prepared.key,
            recipe=_portable(prepared.recipe),
            inputs=dict(prepared.inputs),
        )
        manifest = artifact.write_manifest(
            scratch,
            version=bmkit.__version__,
            kind=outcome.kind,  # type: ignore[arg-type]
            steps=[*(prepared.teacher or prepared.model).steps, step],
            base=prepared.model.entry() if outcome.kind in {"delta", "prompt"} else None,
            metrics=outcome.metrics,
            loads_in=outcome.loads_in,
            table=outcome.table,
        )
        shutil.rmtree(work, ignore_errors=True)
    artifact.remember(prepared.out, manifest)
    built = Artifact(prepared.out, manifest.kind, manifest.digest, manifest)
    result = _result(built, prepared, reused=False, start=start)
    return replace(result, report=outcome.report)


@contextmanager
def _told(work: Path) -> Iterator[None]:
    """Note on what stops the block that a checkpoint is kept, if there is one."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if any(work.glob("checkpoint-*/bmkit-whole")):
            stop.add_note("the last checkpoint is kept, and the same command goes on from there")
        raise


def _help(prepared: Prepared, work: Path) -> Result:
    """Do the part of a stage that the first of several processes isn't to do alone.

    What it leaves is that one's: nothing of this is kept.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome: Outcome = registry.load(prepared.stage.run)(
            prepared.job(Path(folder), work, Silent())
        )
    entry = prepared.model
    found = Artifact(prepared.out, outcome.kind, entry.digest)
    return Result(found, prepared.key, False, time.monotonic() - start, helped=True)


def check_fits(prepared: Prepared, reporter: Reporter) -> None:
    """Raise ResourceError if the machine, or the request's budgets, can't hold the stage."""
    if prepared.budget("gpu") is not None and prepared.recipe.device == "cpu":
        reporter.warn("--gpu-memory bounds nothing here: this runs on the CPU")
    plan.check_fits(
        estimate(prepared, reporter).peak,
        prepared.out,
        env.home() / "work",
        ram_limit=prepared.budget("cpu"),
        gpu_limit=prepared.budget("gpu"),
    )


def require_gates(result: Result) -> None:
    """Raise GateError if a bound is not met."""
    if result.unmet:
        raise GateError(
            f"{result.artifact.path} is built, but {'; '.join(result.unmet)}",
            hint="the artifact is kept; loosen the gate or change the recipe",
        )


def _result(found: Artifact, prepared: Prepared, *, reused: bool, start: float) -> Result:
    unmet = []
    for name, bound in prepared.recipe.gates.items():
        value = found.metrics.get(name)
        if not isinstance(value, int | float):
            unmet.append(f"{name} was not measured")
        elif bound.max is not None and not value <= bound.max:
            unmet.append(f"{name} is {value}, above {bound.max}")
        elif bound.min is not None and not value >= bound.min:
            unmet.append(f"{name} is {value}, below {bound.min}")
    seconds = round(time.monotonic() - start, 3)
    return Result(found, prepared.key, reused, seconds, tuple(unmet))


def _files(doc: Document, recipe: Recipe) -> dict[str, Path]:
    """Return the recipe's data files by dotted key. Raises InputError for one that isn't there."""
    found = {}
    values = recipe.model_dump(mode="json")
    for pattern in recipe.FILES:
        for keys, holder in recipes.holders(values, pattern):
            dotted, path = ".".join(map(str, keys)), Path(holder[keys[-1]])
            if not path.is_file():
                what = "a directory" if path.is_dir() else "not there"
                hint = "name yours by `--data`" if dotted == "data.train" else None
                raise InputError(f"{doc.source}: {dotted}: {path} is {what}", hint=hint)
            found[dotted] = path
    return found


def _without_paths(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe as it enters the key: content counts, places don't."""
    values = recipe.model_dump(mode="json", exclude={"gates"})
    values["device"] = recipe.device.partition(":")[0]  # which of two GPUs doesn't matter
    _map_files(recipe, values, lambda _: None)
    for pattern in recipe.MODELS:
        for path, holder in list(recipes.holders(values, pattern)):
            holder[path[-1]] = None
    return values


def _portable(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe for a manifest, bmkit's own files by `builtin:`."""
    ours = builtin.directory()

    def name(path: str) -> str:
        if Path(path).is_relative_to(ours):
            return f"builtin:{Path(path).relative_to(ours).as_posix()}"
        return path

    values = recipe.model_dump(mode="json")
    _map_files(recipe, values, name)
    return values


def _map_files(recipe: Recipe, values: dict[str, Any], change: Any) -> None:
    for pattern in recipe.FILES:
        for keys, holder in list(recipes.holders(values, pattern)):
            holder[keys[-1]] = change(holder[keys[-1]])


def _destination(
    request: Request, stage: registry.Stage, name: str, key: str
) -> tuple[Path, Artifact | None]:
    """Return where the result goes, and the result if it lies there already."""
    if stage.gives == "text":
        return request.out or Path(), None
    if request.out is not None:
        return request.out, place.occupied(request.out, key, force=request.force)
    folder = env.home() / "artifacts"
    out = folder / f"{stage.name}-{name}-{key[:8]}"
    if not request.force:
        for other, manifest in artifact.scan(folder, f"{stage.name}-*-{key[:8]}"):
            if manifest.key == key:
                return other, artifact.open_artifact(other)
    return out, place.occupied(out, key, force=request.force)


def _refuse_overlap(out: Path, inputs: list[Artifact]) -> None:
    here = out.resolve()
    for given in inputs:
        there = given.path.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise OutputTaken(f"--out {out} and the input {given.path} lie in each other")
