"""Parse, dispatch, report errors. Nothing here imports torch, nor do `--help` and `--version`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from bmkit_cli import stopping
from bmkit_cli.commands import books, brought, duplex, infer, prompt, spec_decode, stages, tune

app = typer.Typer(
    name="bmkit",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(asked: bool) -> None:
    if asked:
        from bmkit import __version__

        typer.echo(f"bmkit {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress, tune and run language models on small hardware, one command at a time."""


app.command()(stages.pull)
app.command()(stages.compress)
app.command()(tune.tune)
app.command()(tune.merge)
app.command()(prompt.prompt)
app.command()(infer.infer)
app.command()(spec_decode.spec_decode)
app.command()(spec_decode.phrases)
app.add_typer(duplex.app, name="duplex")
app.add_typer(brought.brought, name="import")
app.command()(books.run)
app.command()(books.ls)
app.command()(books.show)
app.command()(books.cp)
app.command()(books.validate)
app.command()(books.schema)
app.command()(books.log)
app.command()(books.verify)
app.command()(books.doctor)
app.add_typer(books.cache, name="cache")


def main() -> None:
    """Run the command; whatever ends it becomes one message and an exit code."""
    _open_what_is_closed()
    stopping.listen()
    try:
        code = _run()
    except (KeyboardInterrupt, SystemExit):  # a second one, while the first was being handled
        code = 1
    stopping.ignore()
    if stopping.asked and code:
        left = stopping.kept or "nothing half-written is left"
        code = _say(f"stopped; {left}", None, 128 + stopping.asked)
    exec("")  # a stop inside an import's `exec` makes CPython end by the signal, until the next one
    sys.exit(code)


def _open_what_is_closed() -> None:
    """Give a process that was started with a closed stdin, stdout or stderr an empty one.

    Else the next file that is opened would take its number, and get what is meant for it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def _run() -> int:
    from bmkit.errors import BmkitError
    from bmkit_cli.output import ReaderGoneError

    try:
        return int(app(standalone_mode=False) or 0)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ReaderGoneError:
        return 0
    except BmkitError as exc:
        _trace()
        return _say(str(exc), exc.hint, exc.exit_code)
    except MemoryError:
        return _say("this machine ran out of memory", "take a smaller model or batch", 4)
    except Exception as exc:
        return _unexpected(exc)


def _unexpected(exc: Exception) -> int:
    """Report what no command has foreseen: a wrong command line, a refusing system, or a bug."""
    if hasattr(exc, "format_message") and hasattr(exc, "exit_code"):  # typer's usage errors
        text = str(exc.format_message())
        if type(exc).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(f"{text}\n")
            return int(exc.exit_code)
        context = getattr(exc, "ctx", None)
        hint = f"see `{context.command_path} --help`" if context is not None else None
        return _say(text, hint, int(exc.exit_code))
    _trace()
    from bmkit.errors import machine_refusal

    where = getattr(exc, "filename2", None) or getattr(exc, "filename", None)
    if isinstance(exc, OSError) and exc.errno is not None and where is not None:
        return _say(f"cannot use {os.fsdecode(where)}: {os.strerror(exc.errno)}", None, 4)
    if (said := machine_refusal(exc)) == "out of memory":
        return _say("this machine ran out of memory", "take a smaller model or batch", 4)
    if said is not None:
        return _say(f"the machine refused: {said}", "free some space, or look at -v", 4)
    hint = "this is a bug in bmkit; -v shows where"
    return _say(f"{type(exc).__name__}: {exc}", hint, 1)


def _say(text: str, hint: str | None, code: int) -> int:
    sys.stderr.write(f"error: {text}\n")
    if hint:
        sys.stderr.write(f" help: {hint}\n")
    sys.stderr.flush()
    return code


def _trace() -> None:
    """Print the traceback of the error being handled, if -v was given."""
    from bmkit_cli import session

    if session.verbose:
        import traceback

        traceback.print_exc()
