"""What a prompt learns from a few rows, in five draws: lines that are kept when they are done.

Each line is a task, what is trained, and a seed. Of SST-2 and SNIPS, 16 rows of each label are
drawn from train; FewGLUE has 32 rows in all: 8 of each label are drawn, and the others are tested.
"""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prompt_tasks import TASKS, Rows, test_rows, train_rows, written

from bmkit.errors import RecipeError
from bmkit.pipeline.stage import Request, prepare, run_stage
from bmkit.report import Silent

SEEDS = (13, 21, 42, 87, 100)  # those of LM-BFF (arXiv 2012.15723)
KINDS: dict[str, dict[str, Any]] = {
    "soft": {"tune": {"mode": "soft"}, "train": {"learning_rate": 1e-2}},
    "lora": {
        "tune": {
            "mode": "delta",
            "deltas": [{"type": "lora", "target_modules": "all-linear", "r": 8}],
        },
        "train": {"learning_rate": 5e-4},
    },
    "full": {"tune": {"mode": "full"}, "train": {"learning_rate": 2e-5}},
}
LEARNED = {"sst2": (16, 60), "snips": (16, 60), "rte": (8, 30), "boolq": (8, 20)}
"""By task: rows of each label, and steps of 8 rows."""
TESTED = 200
"""Rows that are tested at most, as many of each label as there are."""
SOFT = ("It was", "This is about", "Question:")
"""Words of templates that become soft tokens."""


def lines(only: Sequence[str] | None, tasks: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """Yield task, kind and seed of all lines, or those that `only` names."""
    for task, kind, seed in itertools.product(tasks, KINDS, SEEDS):
        names = {"trained", task, kind, f"{task} {kind}", str(seed)}
        if only is None or all(any(part in names for part in one.split(",")) for one in only):
            yield task, kind, seed


def split(data: Path, task: str, seed: int) -> tuple[Rows, Rows]:
    """Return the rows to learn from, and those to test."""
    count, _ = LEARNED[task]
    rows, tested = train_rows(data, task), test_rows(data, task)
    random.Random(seed).shuffle(rows)
    chosen: Rows = []
    for label in dict.fromkeys(row["label"] for row in tested):
        chosen += [row for row in rows if row["label"] == label][:count]
    if tested and task in ("rte", "boolq"):
        tested = [row for row in tested if row not in chosen]
    random.Random(0).shuffle(tested)
    return chosen, tested[:TESTED]


def values(task: str, kind: str, steps: int | None) -> dict[str, Any]:
    """Return a recipe but for its rows."""
    template, words = TASKS[task]
    if kind == "soft":
        for text in SOFT:
            template = template.replace(text, f'{{"soft": "{text}"}}', 1)
    spec = KINDS[kind]
    most = LEARNED[task][1] if steps is None else steps
    return {
        "template": {"text": template, "max_seq_length": 160},
        "verbalizer": {"label_words": words},
        "tune": spec["tune"],
        "learning_setting": {"type": "full"},
        "train": {
            "max_steps": most,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            **spec["train"],
        },
    }


def can(kind: str, model: str) -> bool:
    """Tell whether this bmkit trains that kind."""
    rows: Rows = [{"text_a": str(at), "label": name} for at in (1, 2) for name in TASKS["snips"][1]]
    with tempfile.TemporaryDirectory() as folder:
        recipe = written(Path(folder), values("snips", kind, None), train=rows, test=rows)
        try:
            prepare(Request("prompt", str(recipe), model), Silent())
        except RecipeError:
            return False
    return True


def line(
    data: Path, task: str, kind: str, seed: int, model: str, steps: int | None
) -> dict[str, Any]:
    """Learn and test once; return what `bmkit prompt` measures."""
    learned, tested = split(data, task, seed)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        made = {**values(task, kind, steps), "seed": seed}
        recipe = written(Path(folder), made, train=learned, test=tested)
        out = Path(folder) / "out"
        found = run_stage(Request("prompt", str(recipe), model, out=out), Silent())
        metrics = dict(found.artifact.metrics)
    kept = ("accuracy", "macro_f1", "train_loss", "steps", "trainable_parameters")
    return {
        **{name: metrics[name] for name in kept},
        "learned": len(learned),
        "tested": len(tested),
        "seconds": round(time.perf_counter() - start, 1),
    }


def summary(seeds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean and the standard deviation of a sample over the seeds that are done."""
    found: dict[str, Any] = {"seeds_done": len(seeds)}
    for name in ("accuracy", "macro_f1"):
        each = [float(one[name]) for one in seeds.values()]
        found[name] = round(statistics.fmean(each), 4)
        found[f"{name}_sd"] = round(statistics.stdev(each), 4) if len(each) > 1 else None
    return found


def run(
    data: Path,
    model: str,
    tasks: Sequence[str],
    only: Sequence[str] | None,
    steps: int | None,
    table: dict[str, Any],
    save: Callable[[str], None],
) -> None:
    """Do all lines that `table` lacks; `save` hears each name whose line is new in it."""
    able = {kind: can(kind, model) for kind in KINDS}
    todo = list(lines(only, tasks))
    for number, (task, kind, seed) in enumerate(todo, 1):
        name = f"{task} {kind}"
        if not able[kind]:
            print(f"{number}/{len(todo)} {name} {seed}: this bmkit doesn't train it", flush=True)
            continue
        setting = {**values(task, kind, steps), "learned_per_label": LEARNED[task][0]}
        before = table.get(name)
        if before is None or before["recipe"] != setting:
            before = {"recipe": setting, "seeds": {}}
        if str(seed) in before["seeds"]:
            print(f"{number}/{len(todo)} {name} {seed}: there already", flush=True)
            continue
        made = line(data, task, kind, seed, model, steps)
        before["seeds"][str(seed)] = made
        table[name] = {**before, **summary(before["seeds"])}
        save(name)
        figures = f"accuracy {made['accuracy']:.3f}, {made['seconds']} s"
        print(f"{number}/{len(todo)} {name} {seed}: {figures}", flush=True)
