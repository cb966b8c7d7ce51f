"""Duplex sessions: what a slice costs, silence, a long session, several at once.

python scripts/bench/duplex.py [--only slices,idle,long,sessions] [--hours 2] [--rounds 5]
    [--device cuda]

The model hasn't been trained: when it speaks is set, not decided. Each part keeps the figures of
the others in results/duplex.json, or duplex_cuda.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch

from bmkit import env
from bmkit import model as models
from bmkit.artifact import Artifact
from bmkit.data.slices import stored
from bmkit.data.slices.stored import Stored
from bmkit.data.slices.tokens import mark
from bmkit.duplex.opening import Opened
from bmkit.duplex.policy import Policy
from bmkit.duplex.session import DuplexSession
from bmkit.duplex.settings import Settings
from bmkit.pipeline import talking
from bmkit.pipeline.resolve import find_model
from bmkit.pipeline.stage import Request
from bmkit.report import Silent

MODEL = "smollm2-135m"
SILENT = Policy(threshold=0.0, max_wait=None)
SPEAKS = Policy(threshold=1.1, max_wait=None)
SAYS = "so can you tell me what the weather in"
KINDS = (("idle", SILENT, None), ("heard", SILENT, SAYS), ("spoken", SPEAKS, SAYS))
"""Silence of both, words of the user, and words that are answered."""
DEVICE = "cpu"
SAVES_EVERY = 120.0
"""Seconds after which a long session's figures so far are saved."""
IDLE = 0.005
"""Seconds of a slice in which there was nothing to compute: fewer than these."""


def trained(folder: Path, source: Artifact) -> Path:
    """Return the model with a `duplex.json` of spare tokens, as if it had been trained."""
    folder.mkdir()
    for file in source.path.iterdir():
        if file.name != "bmkit.json":
            os.link(file, folder / file.name)
    found = mark(models.load_tokenizer(folder), "idle")
    stored.write(folder, Stored("idle", found.layout))
    return folder


@contextmanager
def opened(model: Path, *, quant: str | None, threads: int, sessions: int = 1) -> Iterator[Opened]:
    """Open the model, as `bmkit duplex` does."""
    request = Request(
        stage="duplex",
        recipe="talk",
        model=str(model),
        threads=threads,
        device=DEVICE,
        rows=sessions,
        flags={"quant": quant},
        assign=("kv.high=5000", "kv.low=4500"),
    )
    found = talking.open_sessions(talking.prepare(request, Silent()), Silent())
    try:
        yield found
    finally:
        found.close()


def begun(ready: Opened, settings: Settings | None = None) -> DuplexSession:
    """Return a session whose agent says all the tokens of a slice: it never ends one itself."""
    session = ready.session(settings)
    session.chooser.never.append(session.layout.end)
    return session


def let(session: DuplexSession, policy: Policy) -> None:
    """Set what is decided from now on."""
    session.settings = replace(session.settings, policy=policy)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds of the wall and of the CPU, of all threads."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def talk(session: DuplexSession, tokens: int) -> None:
    """Let a session be so long, of words of the user that weren't answered."""
    let(session, SILENT)
    while len(session.log) < tokens:
        session.step(SAYS)
    session.logits()


def slices(model: Path, threads: int, rounds: int, histories: list[int]) -> dict[str, Any]:
    """Return what a slice costs at several histories, on the cache and read anew, interleaved."""
    found: dict[str, Any] = {}
    for quant in (None, "int8"):
        with opened(model, quant=quant, threads=threads) as ready:
            session = begun(ready)
            mine = found.setdefault(quant or "bf16", {})
            for history in histories:
                talk(session, history)
                mine[str(history)] = figures(costs(session, rounds))
    return found


def costs(session: DuplexSession, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds of slices at a session's history, which it goes back to each time."""
    units, counters = [*session.units], session.counters()
    seen: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name, policy, text in KINDS:
            for way in ("cached", "anew"):
                session.restore(units, counters)
                session.logits()
                if way == "anew":
                    session.place.cut(0)
                let(session, policy)
                took = timed(partial(session.step, text))
                seen.setdefault(f"{name} {way}", []).append(took)
    session.restore(units, counters)
    session.logits()
    return seen


def figures(seen: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Return medians, and how many times as much reading anew costs."""
    found: dict[str, Any] = {}
    for name, took in seen.items():
        wall, cpu = (statistics.median(column) for column in zip(*took, strict=True))
        found[name] = {"wall_seconds": round(wall, 4), "cpu_seconds": round(cpu, 4)}
    for kind, _, _ in KINDS:
        times = {
            clock: found[f"{kind} anew"][clock] / max(found[f"{kind} cached"][clock], 1e-9)
            for clock in ("wall_seconds", "cpu_seconds")
        }
        found[f"{kind} ratio"] = {clock: round(value, 2) for clock, value in times.items()}
    return found


def idle(model: Path, threads: int, count: int = 1000) -> dict[str, Any]:
    """Return what a thousand silent slices cost."""
    with opened(model, quant=None, threads=threads) as ready:
        session = begun(ready)
        talk(session, 256)
        first = session.step()
        forwards = session.forwards
        wall, cpu = timed(lambda: [session.step() for _ in range(count)])
        last = session.step()
    return {
        "slices": count,
        "kv_before": first.kv_length,
        "kv_after": last.kv_length,
        "forwards": session.forwards - forwards,
        "wall_seconds_a_slice": round(wall / count, 6),
        "cpu_seconds_a_slice": round(cpu / count, 6),
    }


def long(
    model: Path, threads: int, hours: float, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Return how slices and memory are over a session of hours, of which none is waited for.

    What is known so far is saved every few minutes: it takes long.
    """
    draw = random.Random(7)
    parts: list[list[float]] = [[] for _ in range(4)]
    lengths: list[int] = []
    rss: list[int] = []
    with opened(model, quant="int8", threads=threads) as ready:
        settings = replace(ready.settings, high=1024, low=640)
        session = begun(ready, settings)
        period = ready.period_ms / 1000
        count = int(hours * 3600 / period)

        def so_far() -> dict[str, Any]:
            return {
                "virtual_hours": round(len(lengths) * period / 3600, 3),
                "slices": len(lengths),
                "high": settings.high,
                "low": settings.low,
                "most_tokens": max(lengths),
                "evicted_tokens": session.evicted,
                "rss_mib_after_a_tenth": rss[len(rss) // 10] // 2**20,
                "rss_mib_at_the_end": rss[-1] // 2**20,
                "wall_seconds": [quantiles(part) for part in parts],
                "wall_seconds_of_work": [
                    quantiles([t for t in part if t > IDLE]) for part in parts
                ],
            }

        at, saved = 0, time.monotonic()
        while at < count:
            asked = draw.randint(2, 4)
            said = draw.randint(2, 6)
            quiet = draw.randint(4, 20)
            for place in range(asked + said + quiet):
                text = SAYS if place < asked else None
                let(session, SPEAKS if asked - 1 <= place < asked - 1 + said else SILENT)
                wall, _ = timed(partial(session.step, text))
                if at < count:
                    parts[4 * at // count].append(wall)
                at += 1
                lengths.append(len(session.log))
            rss.append(env.rss_bytes())
            if time.monotonic() > saved + SAVES_EVERY:
                saved = time.monotonic()
                save(so_far())
        return so_far()


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return p50, p95 and the most."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    found = {"p50": cuts[49], "p95": cuts[94], "most": max(seconds)}
    return {name: round(value, 4) for name, value in found.items()}


def several(model: Path, threads: int, rounds: int, count: int = 4) -> dict[str, Any]:
    """Return how long `count` sessions take for a slice each, when they all begin at once."""
    with opened(model, quant="int8", threads=threads, sessions=count) as ready:
        sessions = [begun(ready) for _ in range(count)]
        for session in sessions:
            talk(session, 1024)
        whole: dict[str, list[float]] = {}
        cpu = time.process_time()
        for _ in range(rounds):
            for name, policy in (("heard", SILENT), ("spoken", SPEAKS)):
                for session in sessions:
                    let(session, policy)
                start = time.perf_counter()
                workers = [threading.Thread(target=s.step, args=(SAYS,)) for s in sessions]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
                whole.setdefault(name, []).append(time.perf_counter() - start)
        cpu = time.process_time() - cpu
    return {
        "sessions": count,
        "cpu_seconds_a_slice": round(cpu / (2 * rounds * count), 4),
        "history": 1024,
        "wall_seconds_of_all": {name: quantiles(took) for name, took in whole.items()},
    }


def main() -> None:
    """Measure, and write results/duplex.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="slices,idle,long,sessions")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--histories", default="256,1024,4096")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args()
    global DEVICE
    DEVICE = given.device
    result = "duplex" if given.device == "cpu" else f"duplex_{given.device}"
    file = machine.ROOT / "scripts" / "bench" / "results" / f"{result}.json"
    histories = [int(tokens) for tokens in given.histories.split(",")]
    facts = machine.facts()
    torch.set_num_threads(given.threads)
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def save(name: str, found: dict[str, Any]) -> None:
        results[name] = {"facts": facts, "threads": given.threads, **found}
        machine.save(result, results, say=False)

    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "slices": lambda model: slices(model, given.threads, given.rounds, histories),
        "idle": lambda model: idle(model, given.threads),
        "long": lambda model: long(model, given.threads, given.hours, partial(save, "long")),
        "sessions": lambda model: several(model, given.threads, given.rounds),
    }
    with tempfile.TemporaryDirectory(dir=env.home()) as folder:
        model = trained(Path(folder) / "model", find_model(MODEL, Silent()))
        for name in given.only.split(","):
            save(name, parts[name](model))
    print(json.dumps({name: results[name] for name in given.only.split(",")}, indent=1))


if __name__ == "__main__":
    main()
