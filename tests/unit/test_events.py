"""What a run leaves for TensorBoard. Where that isn't installed, a writer stands in its place."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bmkit import artifact
from bmkit.artifact import Step
from bmkit.tune.written import write_events

HISTORY = [
    {"step": 1, "epoch": 0.5, "loss": 2.5, "learning_rate": 0.1},
    {"step": 2, "epoch": 1.0, "loss": 2.0, "learning_rate": 0.05},
    {"step": 2, "dev_loss": 1.5},
]
TOLD = {
    "train/loss": [(1, 2.5), (2, 2.0)],
    "train/learning_rate": [(1, 0.1), (2, 0.05)],
    "dev/loss": [(2, 1.5)],
}
there = importlib.util.find_spec("tensorboard") is not None


class Writer:
    """As torch's SummaryWriter: a file that is named by the time, one event a call."""

    def __init__(self, log_dir: str) -> None:
        self.file = Path(log_dir) / "events.out.tfevents.1700000000.host.1.0"
        self.lines: list[str] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.lines.append(f"{tag} {global_step} {scalar_value}\n")

    def close(self) -> None:
        self.file.write_text("".join(self.lines))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)


@pytest.mark.usefixtures("stand_in")
def test_every_figure_is_told_by_its_step(tmp_path: Path) -> None:
    write_events(tmp_path, HISTORY)
    (file,) = tmp_path.iterdir()
    assert file.name == "events.out.tfevents.bmkit"
    told: dict[str, list[tuple[int, float]]] = {}
    for line in file.read_text().splitlines():
        tag, step, value = line.split()
        told.setdefault(tag, []).append((int(step), float(value)))
    assert told == TOLD


@pytest.mark.skipif(not there, reason="tensorboard isn't installed")
def test_tensorboard_reads_it(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_events(tmp_path, HISTORY)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    for tag, wanted in TOLD.items():
        assert [e.step for e in found.Scalars(tag)] == [step for step, _ in wanted]
        assert [e.value for e in found.Scalars(tag)] == pytest.approx([v for _, v in wanted])


def test_when_events_were_written_is_no_part_of_the_digest(tmp_path: Path) -> None:
    digests = []
    step = Step(stage="tune", name="x", key="0" * 64, recipe={}, inputs={})
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "events.out.tfevents.bmkit").write_text(f"at {number}")
        manifest = artifact.write_manifest(
            folder, version="1", kind="delta", steps=[step], base=None, metrics={}, loads_in=()
        )
        digests.append(manifest.digest)
        assert artifact.differences(folder, manifest) == []
    assert digests[0] == digests[1]
