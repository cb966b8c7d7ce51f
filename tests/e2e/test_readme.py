"""The README's own blocks, run as a newcomer would: in an empty folder, one after the other."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"<!-- runs -->\n```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
pytestmark = pytest.mark.model


def test_there_are_blocks_and_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(BLOCKS) >= 2
    assert "scripts/quickstart" in text
    assert re.search(r"<!-- test command -->\n```sh\nscripts/test\n```", text)


def test_every_block_runs(
    sh: Callable[..., subprocess.CompletedProcess[str]], smollm2: Path
) -> None:
    for block in BLOCKS:
        done = sh(block, timeout=400)
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"
