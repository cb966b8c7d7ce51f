"""The SHA-256 of files, streamed once and remembered."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
from contextlib import suppress
from pathlib import Path

from bmkit import env
from bmkit.errors import InputError


class HashCache:
    """The SHA-256 of files, remembered under BMKIT_HOME until a file changes.

    A file counts as unchanged while its path, inode, size, modification time and change time are
    what they were: a copy that keeps the old modification time (`cp -p`, `rsync`) is still seen.
    Each answer is stored at once, so no lock is held while a large file is read. Without a
    writable BMKIT_HOME it still answers, by reading the file each time.
    """

    def __init__(self) -> None:
        self.database: sqlite3.Connection | None = None
        with suppress(OSError, sqlite3.Error):
            env.home().mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(
                env.home() / "hashes.sqlite", timeout=10, isolation_level=None
            )
            database.execute(
                "CREATE TABLE IF NOT EXISTS seen (path TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT)"
            )
            self.database = database

    def __enter__(self) -> HashCache:
        return self

    def __exit__(self, *_: object) -> None:
        if self.database is not None:
            self.database.close()

    def sha256(self, file: Path) -> str:
        """Return the hash of `file`, reading it only if it has changed since last time."""
        real = file.resolve()
        info = real.stat()
        if self.database is not None:
            with suppress(sqlite3.Error):
                row = self.database.execute(
                    "SELECT sha256 FROM seen WHERE path = ? AND stamp = ?",
                    (str(real), _stamp(info)),
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
                    "INSERT OR REPLACE INTO seen VALUES (?, ?, ?)",
                    (str(real), _stamp(info), sha256),
                )


def _stamp(info: os.stat_result) -> str:
    return f"{info.st_ino} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"


def hash_file(file: Path) -> str:
    """Hash a file by streaming. Raises InputError if it can't be read."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise InputError(f"{file} is not a plain file")
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as exc:
        raise InputError(f"{file} cannot be read: {exc.strerror}") from None
