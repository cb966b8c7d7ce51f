"""Where a result goes: free or taken, locked while it is written, whole or not there at all."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bmkit.artifact import MANIFEST, Artifact, open_artifact, read_manifest
from bmkit.errors import BmkitError, InputError, OutputTaken, ResourceError, machine_refusal

OTHER_DISK = "free some, or name an --out on another disk"
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


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
    except InputError as exc:
        raise OutputTaken(
            f"{out} can't be told from your own files: {exc}", hint="remove it yourself"
        ) from None
    found = {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()}
    if strangers := sorted(found - known):
        raise OutputTaken(
            f"{out} also holds {strangers[0]}, which bmkit did not make",
            hint="move it away, or name another --out",
        )


@contextmanager
def create(
    out: Path, *, key: str | None = None, force: bool = False, wait: bool = False
) -> Iterator[Path]:
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
    again = "the same command goes on behind what is done"
    with refusals(out, again), hold(scratch, str(out), wait=wait):
        for left in scratch.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield scratch
            if not any(scratch.iterdir()):  # the writer has found that there is nothing to do
                scratch.rmdir()
                return
            _make_readable(scratch)
            if key is not None:  # much may have come to `out` while this run was at work
                occupied(out, key, force=force)
            _replace(scratch, out)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


@contextmanager
def refusals(
    out: Path, kept: str = "nothing half-written is left", way: str = OTHER_DISK
) -> Iterator[None]:
    """Make a ResourceError of what the machine refuses while `out` is written.

    Its hint says a `way` out, and what is `kept`. Running out of memory is no matter of `out`.
    """
    try:
        yield
    except BmkitError:
        raise
    except Exception as exc:
        said = machine_refusal(exc)
        if said in (None, "out of memory"):
            raise
        where = getattr(exc, "filename", None) or out
        if said not in FULL:
            way = way.removeprefix("free some, or ")
        raise ResourceError(
            f"cannot write {where}: {said}",
            hint=f"{way}; {kept}",
        ) from None


@contextmanager
def new_file(file: Path, *, force: bool = False) -> Iterator[IO[str]]:
    """Give a text file to fill; when the block ends well, it becomes `file`.

    It is locked while its writer lives. Raises OutputTaken if `file` is there (unless `force`), or
    if another run is writing it; ResourceError if the machine refuses.
    """
    refuse_existing(file, force=force)
    file = file.resolve()
    scratch = file.with_name(f".{file.name}.partial")
    with refusals(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("a", encoding="utf-8") as stream:
            _lock(stream, file)
            try:
                stream.truncate(0)
                yield stream
                stream.flush()
                refuse_existing(file, force=force)
                scratch.replace(file)
            except BaseException:
                scratch.unlink(missing_ok=True)
                raise


@contextmanager
def resumed_file(
    file: Path, key: str | None, *, force: bool = False
) -> Iterator[tuple[IO[str], int]]:
    """Do as `new_file`, going on where an earlier run of the same `key` was stopped.

    Gives the file, and how many whole lines it holds already. What was written stays beside `file`
    when the block fails, for the same command to go on with; without a key nothing stays.
    """
    refuse_existing(file, force=force)
    file = file.resolve()
    scratch = file.with_name(f".{file.name}.partial")
    note = file.with_name(f".{file.name}.partial-key")
    with refusals(file, "the same command goes on with the rows that are done"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("a+b") as raw:
            _lock(raw, file)
            done = _whole_lines(raw) if key is not None and _text(note) == key else 0
            if not done:
                raw.truncate(0)
            if key is not None:
                note.write_text(key)
            stream = io.TextIOWrapper(raw, encoding="utf-8", newline="\n")
            try:
                yield stream, done
                stream.flush()
                refuse_existing(file, force=force)
                scratch.replace(file)
                note.unlink(missing_ok=True)
            except BaseException:
                with suppress(OSError):
                    stream.flush()
                if key is None or not _whole_lines(raw):
                    scratch.unlink(missing_ok=True)
                    note.unlink(missing_ok=True)
                raise
            finally:
                with suppress(ValueError, OSError):
                    stream.detach()


def _lock(stream: IO[Any], file: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputTaken(
            f"{file} is being written by another bmkit", hint="name another -o"
        ) from None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _whole_lines(stream: IO[bytes]) -> int:
    """Cut off a last line that isn't whole; return how many there are."""
    stream.seek(0)
    count = end = 0
    for line in stream:
        if not line.endswith(b"\n"):
            break
        count, end = count + 1, end + len(line)
    stream.truncate(end)
    stream.seek(0, os.SEEK_END)
    return count


def refuse_existing(file: Path, *, force: bool) -> None:
    """Raise OutputTaken if `file` is there (unless `force`), or a directory or a device."""
    if file.is_dir():
        raise OutputTaken(f"{file} is a directory", hint="-o takes a file")
    if file.exists() and not file.is_file():
        raise OutputTaken(f"{file} is no plain file", hint="-o takes a file; `>` redirects stdout")
    if file.exists() and not force:
        raise OutputTaken(f"{file} is there already", hint="name another -o, or use --force")


def refuse_directory(file: Path | None) -> None:
    """Raise OutputTaken if a report is to go where a directory is."""
    if file is not None and file.is_dir():
        raise OutputTaken(f"{file} is a directory", hint="name a file")


def refuse_report(file: Path | None) -> None:
    """Raise InputError if a report is to go where no directory is, OutputTaken if it is one."""
    refuse_directory(file)
    if file is not None and not file.parent.is_dir():
        raise InputError(
            f"there is no directory {file.parent} for the report", hint="make it, or name another"
        )


def write_text(file: Path, text: str) -> None:
    """Write a small file in one rename; a device or pipe is written to.

    Raises OutputTaken for a directory, ResourceError if the machine refuses.
    """
    refuse_directory(file)
    file = file.resolve()  # of a link, what it points to
    with refusals(file):
        if file.exists() and not file.is_file():
            file.write_text(text, encoding="utf-8")
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)


@contextmanager
def hold(
    folder: Path,
    what: str,
    *,
    wait: bool = False,
    hint: str = "wait for it, or name another --out",
) -> Iterator[None]:
    """Own `folder` while the block runs: it is made if missing, and locked against other runs.

    The lock is the operating system's, so a killed run leaves none behind. Raises OutputTaken,
    naming `what`, if another run owns it, with `hint`; with `wait`, waits for it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OutputTaken(f"{folder.parent} is a file", hint="name another --out") from None
    except FileNotFoundError:  # where the kernel makes the names, as in /proc
        raise ResourceError(
            f"no directory can be made at {folder.parent}", hint="name another --out or BMKIT_HOME"
        ) from None
    while True:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            raise OutputTaken(
                f"{what} is being written by another bmkit",
                hint=hint,
            ) from None
        # The folder may have been renamed away between the two calls: then take a new one.
        if folder.exists() and os.fstat(handle).st_ino == folder.stat().st_ino:
            break
        os.close(handle)
    try:
        yield
    finally:
        with suppress(OSError):  # one that holds something, or is gone
            folder.rmdir()
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
