"""The options that commands share, each written once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

RecipeArg = Annotated[
    str, typer.Argument(help="A recipe file, a built-in name, or - for stdin.", show_default=False)
]
ModelOpt = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="An artifact, checkpoint, .gguf file, name or hub id; - reads its path from stdin.",
        show_default=False,
    ),
]
OutOpt = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Where the artifact goes; if not given, into BMKIT_HOME."),
]
SetOpt = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a key of the recipe."),
]
DataOpt = Annotated[
    str | None, typer.Option("--data", help="Rows to train on, or a directory of splits.")
]
DeviceOpt = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.", show_default=False)
]
SeedOpt = Annotated[
    int | None, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of every random draw.")
]
ThreadsOpt = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads to use.")
]
GpuOpt = Annotated[
    str | None, typer.Option("--gpu-memory", metavar="SIZE", help="Budget on the GPU, as 6GiB.")
]
CpuOpt = Annotated[
    str | None, typer.Option("--cpu-memory", metavar="SIZE", help="Budget in RAM, as 16GiB.")
]
PlanOpt = Annotated[
    bool, typer.Option("--plan", help="Say what would be done and what it needs; do nothing.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
ReportOpt = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.json", help="Write what was measured.")
]
ForceOpt = Annotated[
    bool, typer.Option("--force", help="Build again, replacing what bmkit made there.")
]
PromptOpt = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")
]
InputOpt = Annotated[
    str | None,
    typer.Option(
        "--input", "-i", help="JSON lines with `prompt` or `messages`, or CSV or TSV; - is stdin."
    ),
]
LinesOpt = Annotated[
    Path | None, typer.Option("--out", "-o", help="Write JSON lines to this file instead.")
]
SystemOpt = Annotated[str | None, typer.Option("--system", help="A system prompt.")]
RawOpt = Annotated[
    bool, typer.Option("--raw", help="Send the prompt as it is, without chat template.")
]
AdapterOpt = Annotated[
    list[str] | None, typer.Option("--adapter", help="A delta to put on the model.")
]
TokensOpt = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")
]
QuantOpt = Annotated[
    Literal["int8", "int4", "w8a8"] | None,
    typer.Option("--quant", help="Round weights while they are loaded, for this run."),
]
LogprobsOpt = Annotated[
    int | None,
    typer.Option("--logprobs", min=0, help="Add log-probabilities, of so many top tokens."),
]
ReplaceOpt = Annotated[
    bool, typer.Option("--force", help="Replace the file that -o names, if it is there.")
]
VerboseOpt = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the libraries' own messages, and tracebacks.")
]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]


class Progress(StrEnum):
    """How progress is shown on stderr."""

    auto = "auto"
    bar = "bar"
    lines = "lines"
    json = "json"
    none = "none"


ProgressOpt = Annotated[
    Progress,
    typer.Option(
        "--progress", help="A bar on a terminal, a line per 10 % elsewhere, JSON events, or none."
    ),
]
