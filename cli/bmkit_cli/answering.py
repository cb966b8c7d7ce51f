"""Rows in, answers out: what `infer` and `spec-decode` have in common."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from bmkit.report import Reporter
from bmkit_cli import session, stopping

CHAT = "What was said so far, and is remembered. " * 100
"""Of a chat, so much is planned for in a budget; what doesn't fit is forgotten."""


class Shown(Protocol):
    """How answers look, where a command has its own idea of it."""

    live: bool
    """Whether text may be written while it is made."""

    def flags(self) -> dict[str, Any]:
        """Return what it was told on the command line, by option."""

    def line(self, found: Any) -> str:
        """Return an answer as text."""

    def after(self, session: Any, reporter: Reporter) -> None:
        """Say what is to be said once all is answered."""


class Plain:
    """Answers as they are."""

    live = True

    def flags(self) -> dict[str, Any]:
        """Return nothing: it was told nothing."""
        return {}

    def line(self, found: Any) -> str:
        """Return an answer's text."""
        return str(found.line())

    def after(self, session: Any, reporter: Reporter) -> None:
        """Say nothing."""


def run(
    stage: str,
    words: Mapping[str, Any],
    flags: Mapping[str, Any],
    *,
    chats: bool = False,
    shown: Shown | None = None,
) -> None:
    """Run a command that answers rows: `words` are its options, `flags` keys of its recipe."""
    reporter = session.start(words["how"], quiet=words["quiet"], loud=words["verbose"])
    from bmkit import place
    from bmkit.errors import UsageError
    from bmkit.pipeline import generate
    from bmkit.pipeline import stage as stages
    from bmkit_cli import chat
    from bmkit_cli.commands.stages import show_plan
    from bmkit_cli.output import out as stdout

    model, recipe, plan = words["model"], words["recipe"], words["plan"]
    prompt, source, out = words["prompt"], words["source"], words["out"]
    at_terminal = chat.is_possible()
    stdout()
    if out is not None and source not in {None, "-"} and out.resolve() == Path(source).resolve():
        raise UsageError(f"-o and -i both name {out}")
    if out is not None and not plan:
        place.refuse_existing(out, force=words["force"])
    place.refuse_report(words["report"])
    if prompt and source:
        raise UsageError("-p and -i exclude each other")
    talk = chats and not prompt and not source and not plan and out is None
    talk = talk and not words["as_json"] and model != "-" and recipe != "-" and at_terminal
    if not prompt and not source and not plan and not talk:
        raise UsageError("there is nothing to answer", hint="give -p TEXT or -i FILE.jsonl")
    if [model, source, recipe].count("-") > 1:
        raise UsageError("only one of the recipe, -m and -i can be stdin")
    request = stages.Request(
        stage=stage,
        recipe=recipe,
        model="",
        assign=tuple(words["assign"] or ()),
        device=words["device"],
        seed=words["seed"],
        threads=words["threads"],
        gpu_memory=words["gpu_memory"],
        cpu_memory=words["cpu_memory"],
        adapters=tuple(words["adapter"] or ()),
        flags=flags,
    )
    checked = stages.check(request)
    request = replace(checked, model=session.model_path(model))
    if plan:
        if prompt or source:
            with asked(request, prompt, source) as given:
                request = replace(request, rows=given.total, longest=given.longest)
        prepared = stages.prepare(request, reporter, bring=False)
        show_plan(stages.describe_plan(prepared, reporter, measure=True), as_json=words["as_json"])
        stages.check_fits(prepared, reporter)
        return
    if talk:
        wanted = {"--report": words["report"], "--compare": flags.get("compare")}
        wanted |= {"--verify-exact": flags.get("verify_exact")} | (shown.flags() if shown else {})
        for name, value in wanted.items():
            if value:
                raise UsageError(f"{name} is not for a chat", hint="give -p TEXT or -i FILE.jsonl")
        if stages.prepare(request, reporter).prompt is not None:
            raise UsageError("a prompt doesn't chat", hint="give -p TEXT or -i FILE.jsonl")
        _, opened = generate.open_session(replace(request, rows=1, longest=CHAT), reporter)
        chat.Chat(opened, reporter, stdout()).run()
        return
    options = {"prompt": prompt, "input": source}
    options |= {key: words[key] for key in ("as_json", "report", "out", "force")}
    answer(request, options, reporter, shown=shown)


def answer(
    request: Any, options: Mapping[str, Any], reporter: Reporter, *, shown: Shown | None = None
) -> None:
    """Answer what the options name, writing to stdout or to a file."""
    prompts = options.get("prompt")
    if isinstance(prompts, str):
        prompts = [prompts]
    source = options.get("input")
    with asked(request, prompts, source) as given:
        if given.total == 0:
            _refuse_nothing(source or "-p")
        request = replace(request, rows=given.total, longest=given.longest)
        _write(request, given, options, source or "-p", reporter, shown or Plain())


class Asked(NamedTuple):
    """The rows to answer, and what is known of them."""

    rows: Iterable[Any]
    total: int | None = None
    digest: str | None = None
    longest: str | None = None
    """The text of the longest."""


@contextmanager
def asked(request: Any, prompts: list[str] | None, source: str | None) -> Iterator[Asked]:
    """Give the rows to answer, opened; a prompt says how a table is read."""
    from bmkit.data import rows, tabular
    from bmkit.errors import InputError
    from bmkit.pipeline import generate

    if prompts:
        given = [rows.Row(i, {"prompt": text}) for i, text in enumerate(prompts, 1)]
        text = json.dumps(prompts).encode()
        largest = max(prompts, key=lambda text: len(text.encode(errors="replace")))
        yield Asked(given, len(given), hashlib.sha256(text).hexdigest(), largest)
    elif source == "-":
        yield Asked(rows.read(_lines_of(0)))
    else:
        path = Path(source or "")
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe: `-i <(command)`
            handle = os.open(path, os.O_RDONLY)
            try:
                yield Asked(rows.read(_lines_of(handle)))
            finally:
                os.close(handle)
            return
        try:
            stream: IO[bytes] = path.open("rb")
        except OSError as exc:
            raise InputError(f"{path} cannot be read: {exc.strerror}") from None
        if tabular.is_table(path):
            with stream:
                digest = hashlib.sha256(stream.read())
            found = generate.table_rows(request, path)
            whole = (" ".join(map(str, row.values.values())) for row in found)
            yield Asked(found, len(found), digest.hexdigest(), max(whole, key=len))
            return
        with stream:
            digest, total, longest = hashlib.sha256(), 0, b""
            for line in stream:
                digest.update(line)
                total += bool(line.strip())
                longest = max(longest, line, key=len)
            stream.seek(0)
            said = rows.text_of(longest)
            yield Asked(rows.read(stream), total, digest.hexdigest(), said)


def _lines_of(number: int) -> Iterator[bytes]:
    """Yield the lines of an open file by its number, as they come.

    Python's own buffered reader would be locked by the thread that waits in it, and a run that is
    stopped meanwhile couldn't end in peace.
    """
    rest = b""
    while piece := os.read(number, 2**16):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _write(
    request: Any,
    given: Asked,
    options: Mapping[str, Any],
    source: str,
    reporter: Reporter,
    shown: Shown,
) -> None:
    from bmkit import place, report
    from bmkit.errors import InputError
    from bmkit.pipeline import generate
    from bmkit.pipeline import stage as stages
    from bmkit_cli.output import out as stdout

    stream, out, as_json = stdout(), options.get("out"), bool(options.get("as_json"))
    live = stream.terminal and not as_json and out is None and shown.live
    write = (lambda piece: stream.text(piece, end="")) if live else None
    force = bool(options.get("force"))
    key = None
    if out is not None and given.digest:
        key = generate.resume_key(request, reporter, given.digest)
    new = place.resumed_file(out, key, force=force) if out else nullcontext((None, 0))
    with new as (file, done):
        if key is not None:
            stopping.kept = "the same command goes on with the rows that are done"
        if done:
            reporter.info(f"{request.stage}: {done} rows are done, going on with the next")
        answers = generate.open_answers(request, given.rows, reporter, write=write, done=done)
        plan = stages.describe_plan(answers.prepared, reporter)
        left = (given.total or 0) - done
        several = left > 1 and not live
        count = done
        task = report.task(reporter, request.stage, left, "prompts") if several else nullcontext()
        with task as bar, closing(answers):
            for found in answers:
                count += 1
                if file is not None:
                    file.write(json.dumps(found.values(), ensure_ascii=False) + "\n")
                    file.flush()
                elif as_json:
                    stream.json(found.values())
                else:
                    written = live and found.streamed
                    stream.text("" if written else shown.line(found))
                if bar is not None:
                    bar.advance()
    if out is not None:
        stream.text(str(out))
    if options.get("report"):
        figures = json.dumps(answers.report(plan), indent=1)
        place.write_text(Path(options["report"]), figures + "\n")
    shown.after(answers.session, reporter)
    if answers.bad:
        for row in answers.bad[1:]:
            reporter.warn(f"{source}:{row.line}: {row.problem}")
        first = answers.bad[0]
        more = f" (and {len(answers.bad) - 1} more)" if len(answers.bad) > 1 else ""
        others = "1 other was" if count == 1 else f"{count} others were"
        raise InputError(f"{source}:{first.line}: {first.problem}{more}; {others} done")
    if count == 0:
        _refuse_nothing(source)


def _refuse_nothing(source: str) -> None:
    from bmkit.errors import InputError

    what = "stdin" if source == "-" else source
    raise InputError(f"{what} holds no rows", hint="it takes one JSON object a line")
