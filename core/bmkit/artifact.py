"""An artifact: a directory whose `bmkit.json` says what it is and where it came from.

A plain checkpoint, a PEFT adapter or a `.gguf` file stands wherever an artifact does; it has no
manifest, and its digest is made from its files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bmkit import hashes
from bmkit.errors import InputError

MANIFEST = "bmkit.json"
SCHEMA = 1
Kind = Literal["model", "delta", "prompt", "data", "phrases", "report", "transcript"]

# What belongs to a checkpoint or adapter that has no manifest; all else in the folder is ignored.
CONTENT = {".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf", ".tiktoken"}
EXPERTS = "experts.safetensors"
"""Which of its neurons a token needs: beside the weights of a model that is divided so."""
# What a loader looks for beside the weights; a checkpoint's copy takes these along.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "preprocessor_config.json",
    "processor_config.json",
    "frequent_tokens.json",  # the rows of its head that a draft uses
    "duplex.json",  # how a duplex model's slices are marked
    EXPERTS,
)
DELTAS = "adapters"
"""Where an artifact of several deltas has them, each an adapter by itself."""
ORDER = "deltas.json"
"""Their names, in the order in which they are put on the model."""
EVENTS = "events.out.tfevents"
"""What a file for TensorBoard begins its name with."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Either holds or names a model's weights; the first wins, as in transformers."""
QUANTO = "quanto_qmap.json"
"""Which modules optimum-quanto has quantised, and how."""
_LOADED = (*SIDE_FILES, QUANTO, "*.safetensors", "*.safetensors.index.json", "adapter_*.json")
Sha256 = Field(pattern="^[0-9a-f]{64}$")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Part):
    """One file of an artifact."""

    sha256: str = Sha256
    bytes: int = Field(ge=0)
    content: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """What enters the digest in the place of `sha256`, where the file also names a place."""


class InputEntry(_Part):
    """One input of a stage, by content; `path` and `name` say where it was found."""

    kind: str
    digest: str = Sha256
    path: str | None = None
    name: str | None = None


class Step(_Part):
    """One stage that has led to an artifact."""

    stage: str
    name: str
    key: str
    recipe: dict[str, Any]
    inputs: dict[str, InputEntry] = {}


class Manifest(_Part):
    """What `bmkit.json` holds. `kind` and `files` decide the digest; the rest is provenance."""

    schema_: Literal[1] = Field(alias="schema")
    bmkit: str
    kind: Kind
    key: str
    digest: str = Sha256
    steps: list[Step] = Field(min_length=1)
    base: InputEntry | None = None
    files: dict[str, FileEntry]
    metrics: dict[str, float | int | str] = {}
    loads_in: list[str] = []
    table: list[dict[str, float | int | str]] = []

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            parts = PurePosixPath(name).parts
            if not parts or name == MANIFEST or "\\" in name or name.startswith("/"):
                raise ValueError(f"a file is called `{name}`")
            if ".." in parts or "\0" in name:
                raise ValueError(f"the path `{name}` leaves the artifact's directory")
        return files


@dataclass(frozen=True)
class Artifact:
    """Something on disk that a stage can read."""

    path: Path
    kind: str
    digest: str
    manifest: Manifest | None = None
    name: str | None = None

    @property
    def metrics(self) -> Mapping[str, float | int | str]:
        """Return what was measured when it was made."""
        return self.manifest.metrics if self.manifest else {}

    @property
    def steps(self) -> list[Step]:
        """Return the stages that have led here, oldest first."""
        return list(self.manifest.steps) if self.manifest else []

    def entry(self) -> InputEntry:
        """Return how another manifest names this artifact."""
        path = str(self.path.absolute())
        return InputEntry(kind=self.kind, digest=self.digest, path=path, name=self.name)


NOTHING = Artifact(Path(), "nothing", "")
"""The model of a stage that takes none."""


def open_artifact(path: Path) -> Artifact:
    """Open what lies at `path`, checking its content against its manifest.

    Files are hashed once and remembered while they don't change, so that a second look costs no
    reading. A file that a loader would read, but the manifest doesn't name, counts as damage.
    Raises InputError if nothing usable is there, or if it is damaged.
    """
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        _check_files(path, manifest)
        name = manifest.steps[-1].recipe.get("name") if manifest.steps[-1].stage == "pull" else None
        return Artifact(path, manifest.kind, manifest.digest, manifest, name)
    kind = _foreign_kind(path)
    with hashes.HashCache() as cache:
        files = {
            name: _without_place(file) or cache.sha256(file)
            for name, file in sorted(content_files(path).items())
        }
    return Artifact(path, kind, content_digest(kind, files))


def write_order(path: Path, names: Iterable[str]) -> None:
    """Say which deltas an artifact has, in their order."""
    text = json.dumps({"deltas": list(names)}, indent=1) + "\n"
    (path / ORDER).write_text(text, encoding="utf-8")


def deltas(path: Path) -> list[Path]:
    """Return the adapters of a delta artifact, in the order in which they go on the model.

    Raises InputError for an order that names what isn't there.
    """
    if not (path / ORDER).is_file():
        return [path]
    try:
        names = json.loads((path / ORDER).read_text(encoding="utf-8"))["deltas"]
        found = [path / DELTAS / PurePosixPath(name).name for name in names]
    except (ValueError, KeyError, TypeError) as exc:
        raise InputError(f"{path / ORDER} is damaged: {exc}") from None
    for folder in found:
        if not (folder / "adapter_config.json").is_file():
            raise InputError(f"{path}: it names the delta {folder.name}, which isn't there")
    return found


def read_manifest(path: Path) -> Manifest:
    """Read and validate the manifest in directory `path`, without looking at the files it names."""
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_text(encoding="utf-8"))
    except ValidationError as exc:
        problem = exc.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the whole"
        raise InputError(
            f"{path / MANIFEST} is damaged: {where}: {problem['msg']}",
            hint="build the artifact again, with --force",
        ) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"{path / MANIFEST} cannot be read: {exc}") from None
    if _digest(manifest.kind, manifest.files) != manifest.digest:
        raise InputError(
            f"{path / MANIFEST} is damaged: its digest does not belong to its files",
            hint="build the artifact again, with --force",
        )
    return manifest


def _strays(path: Path, manifest: Manifest) -> list[str]:
    """Return the files that a loader would read, but that the manifest doesn't name."""
    found = []
    for file in path.iterdir():
        names = [file.name]
        if file.is_dir():  # transformers reads named templates from there
            if file.name != "additional_chat_templates":
                continue
            names = [f"{file.name}/{f.name}" for f in file.iterdir()]
        elif file.suffix not in CONTENT or not any(fnmatchcase(file.name, p) for p in _LOADED):
            continue
        found += [name for name in names if name not in manifest.files]
    return sorted(found)


def _check_files(path: Path, manifest: Manifest) -> None:
    root = path.resolve()
    if strays := _strays(path, manifest):
        raise InputError(
            f"{path} is damaged: it holds {strays[0]}, which its manifest doesn't name",
            hint="move that file away",
        )
    with hashes.HashCache() as cache:
        for name, entry in manifest.files.items():
            file = path / name
            if not file.resolve().is_relative_to(root):
                raise InputError(f"{file} is a link that leads out of the artifact")
            if not file.is_file():
                raise InputError(f"{path} is damaged: {name} is missing", hint=_REBUILD)
            size = file.stat().st_size
            if size != entry.bytes:
                raise InputError(
                    f"{path} is damaged: {name} has {size} bytes, its manifest says {entry.bytes}",
                    hint=_REBUILD,
                )
            if cache.sha256(file) != entry.sha256 or (
                entry.content is not None and entry.content != _without_place(file)
            ):
                raise InputError(
                    f"{path} is damaged: the content of {name} is not what its manifest says",
                    hint=_REBUILD,
                )


def differences(path: Path, manifest: Manifest) -> list[str]:
    """Read every byte of an artifact, and say what is not as its manifest has it."""
    wrong = []
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != entry.bytes:
            wrong.append(f"{name} has {file.stat().st_size} bytes instead of {entry.bytes}")
        elif hashes.hash_file(file) != entry.sha256 or (
            entry.content is not None and entry.content != _without_place(file)
        ):
            wrong.append(f"{name} has other content")
    return wrong + [f"{name} is not in the manifest" for name in _strays(path, manifest)]


_REBUILD = "build it again (the same command with --force), or fetch it again"


def _foreign_kind(path: Path) -> str:
    if path.is_file():
        if path.suffix == ".gguf":
            return "model"
        raise InputError(f"{path} is a file, not an artifact", hint=_what_is_wanted(path))
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if (path / "adapter_config.json").is_file():
        if (path / "adapter_model.safetensors").is_file():
            return "delta"
        raise InputError(f"{path}: adapter_model.safetensors is missing", hint=_no_pickle(path))
    if (path / "config.json").is_file():
        if any((path / name).is_file() for name in WEIGHTS):
            return "model"
        raise InputError(f"{path}: no model.safetensors", hint=_no_pickle(path))
    raise InputError(
        f"{path} is neither an artifact (no {MANIFEST}) nor a checkpoint (no config.json)",
        hint="a checkpoint is a directory with config.json and *.safetensors",
    )


def _what_is_wanted(path: Path) -> str:
    if path.suffix == ".safetensors":
        return f"name the directory that holds it, with its config.json: {path.parent}"
    return "name a directory with an artifact or a checkpoint, or a .gguf file"


def _no_pickle(path: Path) -> str:
    pickled = [p.name for p in path.glob("*.bin")] + [p.name for p in path.glob("*.pt")]
    if pickled:
        return f"{pickled[0]} is a pickle, which can run code; convert it to safetensors first"
    return "the weights must be safetensors; was the download complete?"


def content_files(path: Path) -> dict[str, Path]:
    """Return the files that make up a checkpoint or adapter without a manifest, by name."""
    if path.is_file():
        return {"model.gguf": path}
    return {
        p.name: p
        for p in path.iterdir()
        if p.suffix in CONTENT and not p.name.startswith(".") and p.name != MANIFEST and p.is_file()
    }


def _digest(kind: str, files: Mapping[str, FileEntry]) -> str:
    return content_digest(kind, {name: e.content or e.sha256 for name, e in files.items()})


def _without_place(file: Path) -> str | None:
    """Hash an adapter's config without the path of its base, and events, which hold the time, as
    nothing; None for any other file.
    """
    if file.name.startswith(EVENTS):
        return _sha256(b"")
    if file.name != "adapter_config.json":
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values.pop("base_model_name_or_path", None)
    except (OSError, ValueError, AttributeError):
        return None
    return _sha256(json.dumps(values, sort_keys=True).encode())


def content_digest(kind: str, files: Mapping[str, str]) -> str:
    """Hash content only: equal bytes give an equal digest, however and wherever they were made."""
    return _sha256(json.dumps([kind, sorted(files.items())]).encode())


def stage_key(stage: str, version: int, recipe: object, inputs: Mapping[str, str]) -> str:
    """Name the result of a stage before running it: same key, same bytes."""
    return _sha256(json.dumps([SCHEMA, stage, version, recipe, inputs], sort_keys=True).encode())


def write_manifest(
    scratch: Path,
    *,
    version: str,
    kind: Kind,
    steps: list[Step],
    base: InputEntry | None = None,
    metrics: Mapping[str, float | int | str] | None = None,
    loads_in: Iterable[str] = (),
    table: Iterable[Mapping[str, float | int | str]] = (),
) -> Manifest:
    """Hash what lies in `scratch` and write its `bmkit.json`."""
    entries = {}
    for file in sorted(p for p in scratch.rglob("*") if p.is_file()):
        name = file.relative_to(scratch).as_posix()
        entries[name] = FileEntry(
            sha256=hashes.hash_file(file), bytes=file.stat().st_size, content=_without_place(file)
        )
    digest = _digest(kind, entries)
    manifest = Manifest(
        schema=1,
        bmkit=version,
        kind=kind,
        key=steps[-1].key,
        digest=digest,
        steps=steps,
        base=base,
        files=entries,
        metrics=dict(metrics or {}),
        loads_in=list(loads_in),
        table=[dict(line) for line in table],
    )
    text = manifest.model_dump_json(indent=1, by_alias=True)
    (scratch / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def scan(folder: Path, pattern: str = "*") -> Iterator[tuple[Path, Manifest]]:
    """Yield the artifacts in `folder` and their manifests; what can't be read is passed over."""
    for file in sorted(folder.glob(f"{pattern}/{MANIFEST}")):
        with suppress(InputError):
            yield file.parent, read_manifest(file.parent)


def remember(path: Path, manifest: Manifest) -> None:
    """Note the hashes of an artifact that was just written, so that opening it reads nothing."""
    with hashes.HashCache() as cache:
        for name, entry in manifest.files.items():
            cache.note(path / name, entry.sha256)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
