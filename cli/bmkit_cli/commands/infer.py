"""`bmkit infer`: text out of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from bmkit_cli import answering
from bmkit_cli.options import (
    AdapterOpt,
    CpuOpt,
    DeviceOpt,
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


def infer(
    model: ModelOpt,
    recipe: Annotated[
        str, typer.Argument(help="A recipe file or a built-in name: greedy, sample.")
    ] = "greedy",
    prompt: PromptOpt = None,
    source: InputOpt = None,
    out: LinesOpt = None,
    system: SystemOpt = None,
    raw: RawOpt = False,
    adapter: AdapterOpt = None,
    max_new_tokens: TokensOpt = None,
    quant: QuantOpt = None,
    score: Annotated[
        bool, typer.Option("--score", help="Answer nothing; tell how likely the text is.")
    ] = False,
    logprobs: LogprobsOpt = None,
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
    """Generate text; without -p and -i, on a terminal, chat."""
    words = {**locals()}
    flags = {
        "system": system,
        "raw": raw or None,
        "max_new_tokens": max_new_tokens,
        "quant": quant,
        "score": score or None,
        "logprobs": logprobs,
    }
    answering.run("infer", words, flags, chats=True)
