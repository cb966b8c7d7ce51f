"""What `--inspect` shows of a recipe: what is put beside the base is a delta, not the base."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmkit.deltas.view import to_json
from bmkit.pipeline import stage
from bmkit.report import Silent
from bmkit.tune import inspect

BOTTLENECKS = ("adapter", "parallel_adapter", "compacter", "low_rank_adapter")


@pytest.mark.parametrize("method", [*BOTTLENECKS, "bitfit", "lora"])
def test_what_stands_beside_the_base_is_a_delta(tiny: Path, chats: Path, method: str) -> None:
    width = ", bottleneck_dim: 8" if method in BOTTLENECKS else ""
    assign = (f"deltas=[{{type: {method}{width}}}]",)
    request = stage.Request("tune", "lora", str(tiny), assign=assign, data=str(chats))
    prepared = stage.prepare(request, Silent())
    root = to_json(inspect.tree(prepared.job(prepared.out, prepared.out, Silent())))["root"]
    assert root["trainable"] == 0 < root["delta"]
    assert root["state"] == "delta"
