"""`bmkit import`: what other programs have written, for bmkit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bmkit_cli import session
from bmkit_cli.options import ForceOpt, JsonOpt, Progress, ProgressOpt, QuietOpt, VerboseOpt

brought = typer.Typer(
    help="Convert what other programs have written.", no_args_is_help=True, rich_markup_mode=None
)


@brought.command("openprompt")
def openprompt(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="An experiment of OpenPrompt.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the recipe goes; else to stdout.")
    ] = None,
    as_json: JsonOpt = False,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite the file if it is there.")
    ] = False,
    how: ProgressOpt = Progress.auto,
    verbose: VerboseOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Make a prompt recipe of an experiment of OpenPrompt, and say what is left out."""
    reporter = session.start(how, quiet=quiet, loud=verbose)
    from bmkit import place
    from bmkit.errors import OutputTaken
    from bmkit.pipeline import convert
    from bmkit_cli.output import out as stdout

    stream = stdout()
    if out is not None and out.exists() and not force:
        raise OutputTaken(f"{out} is there already", hint="name another, or use --force")
    recipe, text, notes = convert.openprompt(file)
    for note in notes:
        reporter.warn(note)
    if out is not None:
        place.write_text(out, text)
    if as_json:
        stream.json({"path": None if out is None else str(out), "recipe": recipe, "notes": notes})
    else:
        stream.text(text if out is None else str(out), end="" if out is None else "\n")


@brought.command("dataset")
def dataset(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A dataset on the Hugging Face Hub, or a folder or file of one."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the rows go, a file a split.")],
    subset: Annotated[
        str | None, typer.Option("--subset", help="Which of its subsets: `sst2` of `glue`.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit on the Hub.")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option("--split", help="A split to take; may be given again.  [default: all]"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Rows of a split at most.")
    ] = None,
    as_json: JsonOpt = False,
    force: ForceOpt = False,
    how: ProgressOpt = Progress.auto,
    verbose: VerboseOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Make rows that `--data` takes of a dataset of the `datasets` library."""
    reporter = session.start(how, quiet=quiet, loud=verbose)
    import time

    from bmkit.pipeline import brought as pipeline
    from bmkit_cli.output import out as stdout

    stream = stdout()
    start = time.monotonic()
    found, reused = pipeline.dataset(
        *(name, out, reporter),
        subset=subset,
        revision=revision,
        splits=tuple(split or ()),
        limit=limit,
        force=force,
    )
    if as_json:
        assert found.manifest is not None  # as what bmkit makes has
        stream.json(
            {
                "path": str(out),
                "kind": found.kind,
                "digest": found.digest,
                "key": found.manifest.key,
                "reused": reused,
                "metrics": dict(found.metrics),
                "seconds": round(time.monotonic() - start, 3),
            }
        )
    else:
        stream.text(str(out))
