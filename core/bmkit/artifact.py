"""An artifact: a directory whose `bmkit.json` says what it is and where it came from.

A plain checkpoint, a PEFT adapter or a `.gguf` file stands wherever an artifact does; it has no
manifest, and its digest is made from its files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bmkit import env
from bmkit.errors import InputError, OutputTaken, ResourceError

MANIFEST = "bmkit.json"
SCHEMA = 1
Kind = Literal["model", "delta", "prompt", "data", "phrases", "report", "transcript"]

# What belongs to a checkpoint or adapter that has no manifest; all else in the folder is ignored.
CONTENT = {".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf", ".tiktoken"}
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


def open_artifact(path: Path) -> Artifact:
    """Open what lies at `path`, checking its content against its manifest.

    Files are hashed once and remembered by size and modification time, so that a second look costs
    no reading. Raises InputError if nothing usable is there, or if it is damaged.
    """
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        _check_files(path, manifest)
        name = manifest.steps[-1].recipe.get("name") if manifest.steps[-1].stage == "pull" else None
        return Artifact(path, manifest.kind, manifest.digest, manifest, name)
    kind = _foreign_kind(path)
    with HashCache() as cache:
        files = {
            name: _without_place(file) or cache.sha256(file)
            for name, file in sorted(content_files(path).items())
        }
    return Artifact(path, kind, content_digest(kind, files))


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


def _check_files(path: Path, manifest: Manifest) -> None:
    root = path.resolve()
    with HashCache() as cache:
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
        elif hash_file(file) != entry.sha256:
            wrong.append(f"{name} has other content")
    return wrong


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
        if any(path.glob("*.safetensors")):
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
    """Hash an adapter's config without the path of its base; None for any other file."""
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


def occupied(out: Path, key: str, *, force: bool) -> Artifact | None:
    """Return the finished artifact of `key` at `out`, or None if `out` may be written.

    Raises OutputTaken if something else is there; `force` allows replacing another artifact, never
    a directory that bmkit did not make.
    """
    aside = _aside(out)
    if aside.is_dir() and not out.exists():
        os.rename(aside, out)  # a run was killed between the two renames of `_replace`
    if not out.exists() and not out.is_symlink():
        return None
    if not out.is_dir():
        raise OutputTaken(f"{out} is a file", hint="name another --out")
    if not any(out.iterdir()):
        return None
    if not (out / MANIFEST).is_file():
        raise OutputTaken(
            f"{out} is not empty, and bmkit did not make it", hint="name another --out"
        )
    if force:
        _refuse_strangers(out)
        return None
    if read_manifest(out).key != key:
        raise OutputTaken(
            f"{out} holds the result of another recipe or input",
            hint="name another --out, or replace it with --force",
        )
    return open_artifact(out)


def _refuse_strangers(out: Path) -> None:
    """Raise OutputTaken if `out` holds files that its manifest doesn't name: a user's own."""
    try:
        known = {MANIFEST, *read_manifest(out).files}
    except InputError:
        return  # its manifest is damaged: --force is the way to mend it
    found = {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()}
    if strangers := sorted(found - known):
        raise OutputTaken(
            f"{out} also holds {strangers[0]}, which bmkit did not make",
            hint="move it away, or name another --out",
        )


@contextmanager
def create(out: Path, *, wait: bool = False) -> Iterator[Path]:
    """Give a scratch directory to fill, beside `out`; when the block ends well, it becomes `out`.

    The scratch directory is locked while its writer lives; one that a killed run has left is
    wiped and used again. Raises OutputTaken if another run is writing the same `out` (with `wait`,
    waits for it), ResourceError if the file system refuses.
    """
    here, there = Path.cwd(), out.resolve()
    if there == here or there in here.parents:
        raise OutputTaken(
            f"{out} is the working directory, or around it", hint="name another --out"
        )
    scratch = out.parent / f".{out.name}.partial"
    with _refusals(out), hold(scratch, str(out), wait=wait):
        for left in scratch.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield scratch
            _make_readable(scratch)
            _replace(scratch, out)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


@contextmanager
def _refusals(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if not is_refusal(exc):
            raise
        where = exc.filename or out
        raise ResourceError(
            f"cannot write {where}: {os.strerror(exc.errno or 0)}",
            hint="free some space or name an --out on another disk; nothing was kept",
        ) from None


def is_refusal(exc: OSError) -> bool:
    """Tell whether the file system refused: full, read-only, not permitted, too large, bad."""
    import errno

    names = (
        "ENOSPC",
        "EROFS",
        "EACCES",
        "EPERM",
        "EFBIG",
        "EDQUOT",
        "EIO",
        "ENOTDIR",
        "ENAMETOOLONG",
    )
    return exc.errno in {getattr(errno, n) for n in names}


@contextmanager
def hold(folder: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Own `folder` while the block runs: it is made if missing, and locked against other runs.

    The lock is the operating system's, so a killed run leaves none behind. Raises OutputTaken,
    naming `what`, if another run owns it; with `wait`, waits for it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OutputTaken(f"{folder.parent} is a file", hint="name another --out") from None
    while True:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            raise OutputTaken(
                f"{what} is being written by another bmkit",
                hint="wait for it, or name another --out",
            ) from None
        # The folder may have been renamed away between the two calls: then take a new one.
        if folder.exists() and os.fstat(handle).st_ino == folder.stat().st_ino:
            break
        os.close(handle)
    try:
        yield
    finally:
        os.close(handle)


def _make_readable(scratch: Path) -> None:
    """Give files the mode that a plain `open` would have given; some writers choose 0600."""
    mask = os.umask(0)
    os.umask(mask)
    for path in scratch.rglob("*"):
        if path.is_symlink():
            continue
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _aside(out: Path) -> Path:
    return out.parent / f".{out.name}.replaced"


def _replace(scratch: Path, out: Path) -> None:
    if not out.exists():
        os.rename(scratch, out)
        return
    aside = _aside(out)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(out, aside)
    try:
        os.rename(scratch, out)
    except BaseException:
        os.rename(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_manifest(
    scratch: Path,
    *,
    version: str,
    kind: Kind,
    steps: list[Step],
    base: InputEntry | None = None,
    metrics: Mapping[str, float | int | str] | None = None,
    loads_in: Iterable[str] = (),
) -> Manifest:
    """Hash what lies in `scratch` and write its `bmkit.json`."""
    entries = {}
    for file in sorted(p for p in scratch.rglob("*") if p.is_file()):
        name = file.relative_to(scratch).as_posix()
        entries[name] = FileEntry(
            sha256=hash_file(file), bytes=file.stat().st_size, content=_without_place(file)
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
    )
    text = manifest.model_dump_json(indent=1, by_alias=True)
    (scratch / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def remember(path: Path, manifest: Manifest) -> None:
    """Note the hashes of an artifact that was just written, so that opening it reads nothing."""
    with HashCache() as cache:
        for name, entry in manifest.files.items():
            cache.note(path / name, entry.sha256)


class HashCache:
    """The SHA-256 of files, remembered by path, size and modification time under BMKIT_HOME.

    Without a writable BMKIT_HOME it still answers, by reading the file each time.
    """

    def __init__(self) -> None:
        self.database: sqlite3.Connection | None = None
        with suppress(OSError, sqlite3.Error):
            env.home().mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(env.home() / "hashes.sqlite", timeout=10)
            database.execute(
                "CREATE TABLE IF NOT EXISTS files"
                " (path TEXT PRIMARY KEY, bytes INTEGER, mtime_ns INTEGER, sha256 TEXT)"
            )
            self.database = database

    def __enter__(self) -> HashCache:
        return self

    def __exit__(self, *_: object) -> None:
        if self.database is not None:
            with closing(self.database), suppress(sqlite3.Error):
                self.database.commit()

    def sha256(self, file: Path) -> str:
        """Return the hash of `file`, reading it only if it has changed since last time."""
        real = file.resolve()
        info = real.stat()
        if self.database is not None:
            with suppress(sqlite3.Error):
                row = self.database.execute(
                    "SELECT sha256 FROM files WHERE path = ? AND bytes = ? AND mtime_ns = ?",
                    (str(real), info.st_size, info.st_mtime_ns),
                ).fetchone()
                if row:
                    return str(row[0])
        found = hash_file(real)
        self._store(real, info, found)
        return found

    def note(self, file: Path, sha256: str) -> None:
        """Remember a hash that is known already."""
        real = file.resolve()
        self._store(real, real.stat(), sha256)

    def _store(self, real: Path, info: os.stat_result, sha256: str) -> None:
        if self.database is not None:
            with suppress(sqlite3.Error):
                self.database.execute(
                    "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)",
                    (str(real), info.st_size, info.st_mtime_ns, sha256),
                )


def hash_file(file: Path) -> str:
    """Hash a file by streaming. Raises InputError if it can't be read."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise InputError(f"{file} is not a plain file")
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as exc:
        raise InputError(f"{file} cannot be read: {exc.strerror}") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
