"""Stages that answer: open what was named, answer rows, report what it took."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmkit import env, registry
from bmkit.data.rows import BadRow, Row
from bmkit.data.tabular import read_table
from bmkit.pipeline import stage
from bmkit.pipeline.stage import Prepared, Request
from bmkit.prompt import tables
from bmkit.report import Reporter, Silent


@dataclass
class Answers:
    """The answers of one run, one at a time, and what the run took once they are all read."""

    rows: Iterator[Any]
    prepared: Prepared
    session: Any
    bad: list[BadRow] = field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:
        """Yield what each good row gave, in order; bad rows go to `bad`.

        It has `values()`, ready for JSON, and `line()`, for people.
        """
        for row in self.rows:
            if isinstance(row, BadRow):
                self.bad.append(row)
                continue
            yield row

    def close(self) -> None:
        """Stop answering: what the session keeps of its work, it keeps now."""
        if isinstance(self.rows, Generator):
            self.rows.close()

    def report(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Return what `--report` holds."""
        session = self.session
        return {
            "stage": self.prepared.stage.name,
            "peak_rss_bytes": env.peak_rss_bytes(),
            "rss_before_bytes": session.rss_before_bytes,
            "peak_gpu_bytes": session.peak_gpu_bytes(),
            "budget_bytes": {k: self.prepared.budget(k) for k in ("gpu", "cpu")},
            "tokens": session.tokens,
            "seconds": round(session.seconds, 4),
            "tokens_per_second": round(session.tokens / max(session.seconds, 1e-9), 2),
            **session.figures(),
            "plan": plan,
        }


def table_rows(request: Request, path: Path) -> list[Row]:
    """Return the rows of a CSV or TSV, or of a compressed file: by a prompt's columns if it is one.

    Raises BmkitError if the request is wrong, or the file can't be read.
    """
    prompt = stage.prepare(request, Silent(), bring=False).prompt
    if prompt is not None:
        return tables.rows(prompt.path, path)
    return [Row(record.line, record.values) for record in read_table(path).records]


def open_session(request: Request, reporter: Reporter) -> tuple[Prepared, Any]:
    """Check the request and load its model. Raises BmkitError before anything is loaded."""
    prepared = stage.prepare(request, reporter)
    stage.check_fits(prepared, reporter)
    job = prepared.job(prepared.out, prepared.out, reporter)
    return prepared, registry.load(prepared.engine[1])(job)


def resume_key(request: Request, reporter: Reporter, content: str) -> str:
    """Return what tells two runs apart: the stage's key, and the digest of what they answer."""
    key = stage.prepare(request, reporter).key
    return hashlib.sha256(f"{key} {content}".encode()).hexdigest()


def open_answers(
    request: Request,
    given: Iterable[Row | BadRow],
    reporter: Reporter,
    *,
    write: Callable[[str], None] | None = None,
    done: int = 0,
) -> Answers:
    """Check the request, load its model, and start answering `given` rows.

    The first `done` rows that can be used are passed over.

    Raises BmkitError before anything is loaded if the request is wrong.
    """
    prepared, session = open_session(request, reporter)
    return Answers(session.answer(given, write=write, done=done), prepared, session)
