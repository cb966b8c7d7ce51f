"""A session whose process is killed goes on where it was: nothing of its log is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from bmkit.data.slices import stored
from bmkit.data.slices.layout import Layout
from bmkit.data.slices.stored import Stored
from bmkit.duplex.journal import EVENTS, LOG, Journal
from bmkit.duplex.opening import Opened
from bmkit.pipeline import talking
from bmkit.pipeline.stage import Request
from bmkit.report import Silent

TALKS = """
import sys
from pathlib import Path
from bmkit.duplex.journal import Journal
from bmkit.pipeline import talking
from bmkit.pipeline.stage import Request
from bmkit.report import Silent

request = Request(stage="duplex", recipe="talk", model=sys.argv[1], threads=1)
opened = talking.open_sessions(talking.prepare(request, Silent()), Silent())
session = opened.session()
journal = Journal.begin(Path(sys.argv[2]), session, {"model": opened.model})
number = 0
while True:
    journal.note(session.step("tell me " + str(number) if number % 3 == 0 else None))
    number += 1
    print(number, flush=True)
"""


def opened(model: Path) -> Opened:
    request = Request(stage="duplex", recipe="talk", model=str(model), threads=1)
    found: Opened = talking.open_sessions(talking.prepare(request, Silent()), Silent())
    return found


def test_a_session_that_was_killed_goes_on(tiny: Path, tmp_path: Path) -> None:
    layout = Layout((250,), (251,), 252, 2)
    stored.write(tiny, Stored("idle", layout, agent_tokens=6, threshold=0.02))
    kept = tmp_path / "kept"
    process = subprocess.Popen(
        [sys.executable, "-c", TALKS, str(tiny), str(kept)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while int(process.stdout.readline() or -1) < 60:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    events: list[dict[str, Any]] = []
    for line in (kept / EVENTS).read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            events.append(json.loads(line))
    ready = opened(tiny)
    again, right = ready.session(), opened(tiny).session()
    Journal.resume(kept, again, {"model": ready.model})
    assert again.slices >= max(len(events), 60)
    said = [right.step(f"tell me {n}" if n % 3 == 0 else None) for n in range(again.slices)]
    assert [list(agent.ids) for agent in said[: len(events)]] == [row["ids"] for row in events]
    assert (again.log, again.counters()["slices"]) == (right.log, right.slices)
    assert (kept / LOG).read_bytes().endswith(b"\n")
    assert again.step("and then").ids == right.step("and then").ids
