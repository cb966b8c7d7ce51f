"""`infer`: open what was named, answer rows, report what it took."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bmkit import env, registry
from bmkit.data.rows import BadRow, Row
from bmkit.pipeline import stage
from bmkit.pipeline.stage import Prepared, Request
from bmkit.report import Reporter


@dataclass
class Answers:
    """The answers of one run, one at a time, and what the run took once they are all read."""

    rows: Iterator[Any]
    prepared: Prepared
    session: Any
    bad: list[BadRow] = field(default_factory=list)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield one JSON-ready object a good row, in order; bad rows go to `bad`."""
        for row in self.rows:
            if isinstance(row, BadRow):
                self.bad.append(row)
                continue
            answer = row.answer
            count = len(answer.token_ids)
            yield {
                "id": row.id,
                "prompt": row.prompt,
                "text": answer.text,
                "token_ids": answer.token_ids,
                "finish": answer.finish,
                "seconds": round(answer.seconds, 4),
                "tokens_per_second": round(count / max(answer.seconds, 1e-9), 2),
            }

    def report(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Return what `--report` holds."""
        session = self.session
        return {
            "stage": "infer",
            "peak_rss_bytes": env.peak_rss_bytes(),
            "rss_before_bytes": session.rss_before_bytes,
            "peak_gpu_bytes": session.peak_gpu_bytes(),
            "budget_bytes": {k: self.prepared.budget(k) for k in ("gpu", "cpu")},
            "tokens": session.tokens,
            "seconds": round(session.seconds, 4),
            "tokens_per_second": round(session.tokens / max(session.seconds, 1e-9), 2),
            "plan": plan,
        }


def open_answers(
    request: Request,
    given: Iterable[Row | BadRow],
    reporter: Reporter,
    *,
    write: Callable[[str], None] | None = None,
) -> Answers:
    """Check the request, load its model, and start answering `given` rows.

    Raises BmkitError before anything is loaded if the request is wrong.
    """
    prepared = stage.prepare(request, reporter)
    stage.check_fits(prepared, reporter)
    job = prepared.job(prepared.out, prepared.out, reporter)
    session = registry.load(prepared.stage.run)(job)
    return Answers(session.answer(given, write=write), prepared, session)
