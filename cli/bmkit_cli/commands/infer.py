"""`bmkit infer`: text out of a model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple

import typer

from bmkit.report import Reporter
from bmkit_cli import session
from bmkit_cli.options import (
    CpuOpt,
    DeviceOpt,
    GpuOpt,
    JsonOpt,
    ModelOpt,
    PlanOpt,
    Progress,
    ProgressOpt,
    QuietOpt,
    ReportOpt,
    SeedOpt,
    SetOpt,
    ThreadsOpt,
    VerboseOpt,
)

CHAT_BYTES = 4096
"""Of what was said, so much is planned for in a budget; what doesn't fit is forgotten."""


def infer(
    model: ModelOpt,
    recipe: Annotated[
        str, typer.Argument(help="A recipe file or a built-in name: greedy, sample.")
    ] = "greedy",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--input", "-i", help="JSON lines with `prompt` or `messages`; - is stdin."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write JSON lines to this file instead.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send the prompt as it is, without chat template.")
    ] = False,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="A delta to put on the model.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")
    ] = None,
    quant: Annotated[
        Literal["int8", "int4", "w8a8"] | None,
        typer.Option("--quant", help="Round weights while they are loaded, for this run."),
    ] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Answer nothing; tell how likely the text is.")
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", min=0, help="Add log-probabilities, of so many top tokens."),
    ] = None,
    assign: SetOpt = None,
    device: DeviceOpt = None,
    seed: SeedOpt = None,
    threads: ThreadsOpt = None,
    gpu_memory: GpuOpt = None,
    cpu_memory: CpuOpt = None,
    plan: PlanOpt = False,
    as_json: JsonOpt = False,
    report: ReportOpt = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file that -o names, if it is there.")
    ] = False,
    how: ProgressOpt = Progress.auto,
    verbose: VerboseOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Generate text; without -p and -i, on a terminal, chat."""
    reporter = session.start(how, quiet=quiet, loud=verbose)
    from bmkit import place
    from bmkit.errors import UsageError
    from bmkit.pipeline import generate
    from bmkit.pipeline import stage as stages
    from bmkit_cli import chat
    from bmkit_cli.commands.stages import show_plan
    from bmkit_cli.output import out as stdout

    at_terminal = chat.is_possible()
    stdout()
    if out is not None and source not in {None, "-"} and out.resolve() == Path(source).resolve():
        raise UsageError(f"-o and -i both name {out}")
    if out is not None and not plan:
        place.refuse_existing(out, force=force)
    if prompt and source:
        raise UsageError("-p and -i exclude each other")
    talk = not prompt and not source and not plan and out is None and not as_json
    talk = talk and model != "-" and recipe != "-" and at_terminal
    if not prompt and not source and not plan and not talk:
        raise UsageError("there is nothing to answer", hint="give -p TEXT or -i FILE.jsonl")
    if [model, source, recipe].count("-") > 1:
        raise UsageError("only one of the recipe, -m and -i can be stdin")
    request = stages.Request(
        stage="infer",
        recipe=recipe,
        model="",
        assign=tuple(assign or ()),
        device=device,
        seed=seed,
        threads=threads,
        gpu_memory=gpu_memory,
        cpu_memory=cpu_memory,
        adapters=tuple(adapter or ()),
        flags={
            "system": system,
            "raw": raw or None,
            "max_new_tokens": max_new_tokens,
            "quant": quant,
            "score": score or None,
            "logprobs": logprobs,
        },
    )
    checked = stages.check(request)
    request = replace(checked, model=session.model_path(model))
    if plan:
        if prompt or source:
            with _rows(prompt, source) as asked:
                request = replace(request, rows=asked.total, longest=asked.longest)
        prepared = stages.prepare(request, reporter, bring=False)
        show_plan(stages.describe_plan(prepared, reporter, measure=True), as_json=as_json)
        stages.check_fits(prepared, reporter)
        return
    if talk:
        _, opened = generate.open_session(replace(request, rows=1, longest=CHAT_BYTES), reporter)
        chat.Chat(opened, reporter, stdout()).run()
        return
    options = {"prompt": prompt, "input": source, "as_json": as_json, "report": report}
    options |= {"out": out, "force": force}
    answer(request, options, reporter)


def answer(request: Any, options: Mapping[str, Any], reporter: Reporter) -> None:
    """Answer what the options name, writing to stdout or to a file."""
    prompts = options.get("prompt")
    if isinstance(prompts, str):
        prompts = [prompts]
    source = options.get("input")
    with _rows(prompts, source) as asked:
        request = replace(request, rows=asked.total, longest=asked.longest)
        _write(request, asked, options, source or "-p", reporter)


class Asked(NamedTuple):
    """The rows to answer, and what is known of them."""

    rows: Iterable[Any]
    total: int | None = None
    digest: str | None = None
    longest: int | None = None
    """The bytes of the longest."""


@contextmanager
def _rows(prompts: list[str] | None, source: str | None) -> Iterator[Asked]:
    """Give the rows to answer, opened."""
    from bmkit.data import rows
    from bmkit.errors import InputError

    if prompts:
        given = [rows.Row(i, {"prompt": text}) for i, text in enumerate(prompts, 1)]
        text = json.dumps(prompts).encode()
        longest = max(len(text.encode(errors="replace")) for text in prompts)
        yield Asked(given, len(given), hashlib.sha256(text).hexdigest(), longest)
    elif source == "-":
        yield Asked(rows.read(_lines_of(0)))
    else:
        path = Path(source or "")
        try:
            stream: IO[bytes] = path.open("rb")
        except OSError as exc:
            raise InputError(f"{path} cannot be read: {exc.strerror}") from None
        with stream:
            digest, total, longest = hashlib.sha256(), 0, 0
            for line in stream:
                digest.update(line)
                total += bool(line.strip())
                longest = max(longest, len(line))
            stream.seek(0)
            yield Asked(rows.read(stream), total or None, digest.hexdigest(), longest)


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
    asked: Asked,
    options: Mapping[str, Any],
    source: str,
    reporter: Reporter,
) -> None:
    from bmkit import place, report
    from bmkit.errors import InputError
    from bmkit.pipeline import generate
    from bmkit.pipeline import stage as stages
    from bmkit_cli.output import out as stdout

    stream, out, as_json = stdout(), options.get("out"), bool(options.get("as_json"))
    live = stream.terminal and not as_json and out is None
    write = (lambda piece: stream.text(piece, end="")) if live else None
    force = bool(options.get("force"))
    key = None
    if out is not None and asked.digest:
        key = generate.resume_key(request, reporter, asked.digest)
    new = place.resumed_file(out, key, force=force) if out else nullcontext((None, 0))
    with new as (file, done):
        if done:
            reporter.info(f"infer: {done} rows are done, going on with the next")
        answers = generate.open_answers(request, asked.rows, reporter, write=write, done=done)
        plan = stages.describe_plan(answers.prepared, reporter)
        left = (asked.total or 0) - done
        several = left > 1 and not live
        count = done
        task = report.task(reporter, "infer", left, "prompts") if several else nullcontext()
        with task as bar:
            for found in answers:
                count += 1
                if file is not None:
                    file.write(json.dumps(found.values(), ensure_ascii=False) + "\n")
                    file.flush()
                elif as_json:
                    stream.json(found.values())
                else:
                    written = live and found.streamed
                    stream.text("" if written else found.line())
                if bar is not None:
                    bar.advance()
    if out is not None:
        stream.text(str(out))
    if options.get("report"):
        figures = json.dumps(answers.report(plan), indent=1)
        place.write_text(Path(options["report"]), figures + "\n")
    if answers.bad:
        for row in answers.bad[1:]:
            reporter.warn(f"{source}:{row.line}: {row.problem}")
        first = answers.bad[0]
        more = f" (and {len(answers.bad) - 1} more)" if len(answers.bad) > 1 else ""
        others = "1 other was" if count == 1 else f"{count} others were"
        raise InputError(f"{source}:{first.line}: {first.problem}{more}; {others} done")
    if count == 0:
        raise InputError(f"{source} holds no rows", hint="it takes one JSON object a line")
