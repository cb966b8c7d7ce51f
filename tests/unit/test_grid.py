"""Sweeps: all runs are planned before the first is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmkit.errors import RecipeError
from bmkit.pipeline import grid
from bmkit.pipeline.stage import Request


@pytest.mark.parametrize(
    ("method", "word", "name"),
    [("lora", "deltas.0.r=4,64", "r=64"), ("oft", "deltas.0.oft_block_size=8,7", "size=7")],
)
def test_a_value_that_its_plan_refuses_is_told_before_any_run(
    tiny: Path, chats: Path, home: Path, method: str, word: str, name: str
) -> None:
    request = Request("tune", method, str(tiny), data=str(chats))
    grid.check(grid.requests(request, [word.rpartition(",")[0]]))
    with pytest.raises(RecipeError, match=f"{name}: .*nothing was trained"):
        grid.check(grid.requests(request, [word]))
    assert not (home / "artifacts").exists()
