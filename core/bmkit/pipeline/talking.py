"""Models that listen while they speak: checked, then opened for a number of sessions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bmkit import registry
from bmkit.data.slices.stored import Stored
from bmkit.duplex.trained import known_of
from bmkit.errors import RecipeError
from bmkit.pipeline import stage
from bmkit.pipeline.stage import Prepared, Request
from bmkit.report import Reporter


def prepare(
    request: Request,
    reporter: Reporter,
    *,
    check: Callable[[Stored], None] | None = None,
    bring: bool = True,
) -> Prepared:
    """Check a request of the stage `duplex` that names a model; `check` may refuse its scheme.

    Raises BmkitError before anything is loaded.
    """
    prepared = stage.prepare(request, reporter, bring=bring)
    known, _ = known_of(prepared.job(prepared.out, prepared.out, reporter))
    asked = prepared.recipe
    scheme = getattr(asked, "scheme", known.scheme)
    if "scheme" in asked.model_fields_set and scheme != known.scheme:
        raise RecipeError(
            f"scheme: it is `{scheme}`, and the model was trained with `{known.scheme}`",
            hint="leave it out: the model says its own",
        )
    if check is not None:
        check(known)
    return prepared


def open_sessions(prepared: Prepared, reporter: Reporter) -> Any:
    """Open the model of what was prepared: a `bmkit.duplex.opening.Opened`."""
    stage.check_fits(prepared, reporter)
    job = prepared.job(prepared.out, prepared.out, reporter)
    return registry.load(prepared.engine[1])(job)
