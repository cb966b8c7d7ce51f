"""`bmkit spec-decode`: the same text in fewer forwards; `bmkit phrases`: a pool of phrases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bmkit.report import Reporter
from bmkit_cli import answering, session
from bmkit_cli.options import (
    AdapterOpt,
    CpuOpt,
    DeviceOpt,
    ForceOpt,
    GpuOpt,
    InputOpt,
    JsonOpt,
    LinesOpt,
    LogprobsOpt,
    ModelOpt,
    PlanOpt,
    Progress,
    ProgressOpt,
    PromptOpt,
    QuantOpt,
    QuietOpt,
    RawOpt,
    ReplaceOpt,
    ReportOpt,
    SeedOpt,
    SetOpt,
    SystemOpt,
    ThreadsOpt,
    TokensOpt,
    VerboseOpt,
)

COLOURS = {
    "draft": "34",  # blue
    "prompt": "32",  # green
    "answers": "36",  # cyan
    "history": "35",  # magenta
    "window": "33",  # yellow
}
"""ANSI colours of where tokens came from; what the target said itself is plain."""


def spec_decode(
    model: ModelOpt,
    recipe: Annotated[
        str, typer.Argument(help="A recipe file or a built-in name: ouroboros.")
    ] = "ouroboros",
    draft: Annotated[
        str | None,
        typer.Option("--draft", "-d", help="A smaller model that guesses; `self` is the target."),
    ] = None,
    phrases: Annotated[
        str | None,
        typer.Option("--phrases", metavar="DIR", help="A phrase pool to read and to add to."),
    ] = None,
    prompt: PromptOpt = None,
    source: InputOpt = None,
    out: LinesOpt = None,
    system: SystemOpt = None,
    raw: RawOpt = False,
    adapter: AdapterOpt = None,
    max_new_tokens: TokensOpt = None,
    quant: QuantOpt = None,
    logprobs: LogprobsOpt = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="NAMES",
            help="Run others on the same prompts, in turns: greedy, transformers, assisted, "
            "prompt-lookup, lookahead.",
        ),
    ] = None,
    verify_exact: Annotated[
        bool, typer.Option("--verify-exact", help="Answer again without guesses, and compare.")
    ] = False,
    origins: Annotated[
        bool, typer.Option("--origins", help="Colour the text by where each token came from.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.svg", help="Draw the tokens of each forward."),
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
    force: ReplaceOpt = False,
    how: ProgressOpt = Progress.auto,
    verbose: VerboseOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Generate what infer would, in fewer forwards."""
    words = {**locals()}
    flags = {
        "draft": draft,
        "phrases": phrases,
        "system": system,
        "raw": raw or None,
        "max_new_tokens": max_new_tokens,
        "quant": quant,
        "logprobs": logprobs,
        "compare": [name.strip() for name in compare.split(",")] if compare else None,
        "verify_exact": verify_exact or None,
    }
    answering.run("spec-decode", words, flags, chats=True, shown=Spoken(origins, plot))


class Spoken:
    """Answers with, if it is wanted, where their tokens came from; and how it went."""

    def __init__(self, origins: bool, plot: Path | None) -> None:
        self.origins, self.plot = origins, plot
        self.live = not origins

    def flags(self) -> dict[str, Any]:
        """Return what it was told, by option."""
        return {"--origins": self.origins, "--plot": self.plot}

    def line(self, found: Any) -> str:
        """Return an answer's text, coloured."""
        if not self.origins:
            return str(found.line())
        said = []
        for piece, origin in zip(found.pieces(), found.origins, strict=True):
            colour = COLOURS.get(origin)
            said.append(f"\x1b[{colour}m{piece}\x1b[0m" if colour and piece else piece)
        return "".join(said)

    def after(self, session: Any, reporter: Reporter) -> None:
        """Tell on stderr how many forwards it took, and draw them if that is wanted."""
        from bmkit import picture, place
        from bmkit.errors import GateError

        if self.origins:
            legend = [f"\x1b[{colour}m{name}\x1b[0m" for name, colour in COLOURS.items()]
            reporter.info(f"origins: {', '.join(legend)}; plain is the target's own")
        for line in session.told():
            reporter.info(line)
        rounds = session.rounds()
        if self.plot is not None:
            title = "Tokens of each forward of the target"
            place.write_text(self.plot, picture.bars(rounds, title, "forward", "tokens"))
        if rounds:
            reporter.info(f"tokens a forward: {picture.sparkline(rounds)}")
        if session.exactness is not None:
            wrong = len(session.exactness.differences) - session.exactness.ties
            if wrong:
                raise GateError(f"{wrong} answers differ from the target's own by more than a tie")


def phrases(
    corpus: Annotated[
        Path,
        typer.Argument(help="JSON lines with `text`, `messages`, or `prompt` and `completion`."),
    ],
    model: ModelOpt,
    out: Annotated[Path, typer.Option("--out", "-o", help="The pool: made, or added to.")],
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Most tokens that the pool holds.")
    ] = None,
    as_json: JsonOpt = False,
    force: ForceOpt = False,
    how: ProgressOpt = Progress.auto,
    verbose: VerboseOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Make or extend a phrase pool from text."""
    reporter = session.start(how, quiet=quiet, loud=verbose)
    import time

    from bmkit.pipeline import pools
    from bmkit_cli.output import out as stdout

    stream = stdout()
    start = time.monotonic()
    found = pools.build(corpus, session.model_path(model), out, reporter, limit=limit, force=force)
    if as_json:
        assert found.manifest is not None  # pools have one
        stream.json(
            {
                "path": str(out),
                "kind": found.kind,
                "digest": found.digest,
                "key": found.manifest.key,
                "reused": False,
                "metrics": dict(found.metrics),
                "seconds": round(time.monotonic() - start, 3),
            }
        )
    else:
        stream.text(str(out))
