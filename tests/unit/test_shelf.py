"""What `bmkit cache` shows and removes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmkit_cli import shelf


def test_compiled_kernels_are_listed_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BMKIT_HOME", str(tmp_path))
    kernels = tmp_path / "kernels" / "0a1b2c"
    kernels.mkdir(parents=True)
    (kernels / "block.nbc").write_bytes(bytes(100))
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    found = {e["kind"]: e["bytes"] for e in shelf.contents()}
    assert found == {"kernels": 100, "damaged": 0}
    assert [Path(e["path"]) for e in shelf.prune(models=False)] == [kernels]
    assert model.is_dir() and not kernels.exists()
