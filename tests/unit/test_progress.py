"""Lines of progress."""

from __future__ import annotations

import pytest

from bmkit_cli.options import Progress
from bmkit_cli.progress import reporter


def test_what_a_stopped_run_had_done_is_shown_without_a_rate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = reporter(Progress.lines, quiet=False).begin("train", 10, "steps")
    task.advance(3)
    task.advance(1, loss=2.0)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "train:  30 % (3/10 steps)"
    assert "steps/s" in second and second.endswith("loss 2")


def test_rates_are_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    task = reporter(Progress.lines, quiet=False).begin("train", 2, "steps")
    task.advance(1, loss=2.0, tokens_per_second=12345.6)
    task.advance(1, tokens_per_second=1.234)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("loss 2, 12346 tokens/s") and second.endswith(" left, 1.23 tokens/s")
