"""Runs of one recipe over several draws of rows: which rows each has, and what all of them say."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bmkit.data import shots
from bmkit.data.tabular import Record
from bmkit.errors import InputError
from bmkit.prompt.prompts import Prompts
from bmkit.prompt.ready import Ready
from bmkit.prompt.tasks import WITHOUT_LABELS
from bmkit.prompting.encode import Encoded

Labels = list[tuple[int, ...]]
Table = list[dict[str, float | int | str]]
DONE = "done.json"


@dataclass(frozen=True)
class Rows:
    """Prompts with the labels of their rows."""

    prompts: list[Encoded] = field(default_factory=list)
    right: Labels = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    """What the prompts were made of."""

    def again(self, prompts: Prompts) -> Rows:
        """Return the same rows in the prompts of another template."""
        return replace(self, prompts=prompts.encode(self.records))


@dataclass(frozen=True)
class Round:
    """One run: its seed, what it learns from, and what is measured, by the name of a split."""

    seed: int
    train: Rows
    measured: Mapping[str, Rows]
    unlabelled: Rows = Rows()

    def again(self, prompts: Prompts) -> Round:
        """Return the same run in the prompts of another template."""
        measured = {name: rows.again(prompts) for name, rows in self.measured.items()}
        train, unlabelled = self.train.again(prompts), self.unlabelled.again(prompts)
        return Round(self.seed, train, measured, unlabelled)


@dataclass(frozen=True)
class Done:
    """What a run has said."""

    metrics: dict[str, Any]
    table: Table


Perform = Callable[[Round, Path, Path], Done]
"""Performs a run: gets a directory for what is kept, and one that outlives a killed run."""


def rounds(
    ready: Ready, encoded: Mapping[str, list[Encoded]], right: Mapping[str, Labels]
) -> list[Round]:
    """Return the runs of a recipe: one, or one for each seed.

    Raises InputError for too few rows, or rows to learn from that have all one label.
    """
    setting = ready.recipe.learning_setting
    held = {n: Rows(encoded[n], own, ready.splits[n].records) for n, own in right.items()}
    plain = Rows()
    if "unlabelled" in ready.splits:
        plain = Rows(encoded["unlabelled"], [], ready.splits["unlabelled"].records)
    if not ready.learns:
        return [Round(ready.recipe.seed, Rows(), held, plain)]
    train = held.pop("train")
    found = []
    for seed in setting.seeds or [ready.recipe.seed]:
        places, dev = list(range(len(train.prompts))), list[int]()
        if setting.type == "few_shot":
            places, dev = shots.sample(
                ready.splits["train"].records,
                train.right,
                ready.classes,
                per_label=setting.num_examples_per_label,
                total=setting.num_examples_total,
                seed=seed,
                dev_like="dev" not in held,
            )
        own = _some(train, places)
        if ready.recipe.task not in WITHOUT_LABELS and len(set(own.right)) < 2:
            raise InputError(
                "all rows to learn from have one label: nothing is told apart",
                hint="add rows of other labels",
            )
        drawn = {"dev": _some(train, dev)} if dev else {}
        found.append(Round(seed, own, {**held, **drawn}, plain))
    return found


def _some(rows: Rows, places: Sequence[int]) -> Rows:
    return Rows(
        [rows.prompts[at] for at in places],
        [rows.right[at] for at in places],
        [rows.records[at] for at in places],
    )


def each(found: Sequence[Round], out: Path, work: Path, perform: Perform) -> Done:
    """Perform all runs; leave in `out` what the best one on dev has, and return what all say.

    `perform` gets a run, a directory for what is kept, and one that outlives a killed run. Runs
    that were done before that aren't done again. Metrics are means over seeds; `accuracy_sd` is
    the standard deviation of a sample, 0 for one seed.
    """
    if len(found) == 1:
        done = perform(found[0], out, work)
        measured = found[0].train.prompts and {"accuracy", "dev_accuracy"} & set(done.metrics)
        more = {"accuracy_sd": 0.0} if measured else {}
        return Done({**done.metrics, **more}, done.table)
    said = [once(one, work / f"seed-{one.seed}", perform) for one in found]
    best = max(range(len(said)), key=lambda at: _on_dev(said[at].metrics))
    kept = work / f"seed-{found[best].seed}" / "kept"
    shutil.copytree(kept, out, dirs_exist_ok=True)
    table: Table = [
        {"step": f"seed {one.seed}", **figures(done.metrics)}
        for one, done in zip(found, said, strict=True)
    ]
    return Done(mean([done.metrics for done in said]), [*table, *said[best].table])


def once(one: Round, work: Path, perform: Perform) -> Done:
    """Perform a run unless it was done; what is kept of it is in `work`, as `kept`."""
    note, kept = work / DONE, work / "kept"
    if note.is_file():
        values = json.loads(note.read_text(encoding="utf-8"))
        return Done(values["metrics"], values["table"])
    shutil.rmtree(kept, ignore_errors=True)  # a killed run may have begun it
    kept.mkdir(parents=True)
    done = perform(one, kept, work)
    scratch = note.with_suffix(".partial")
    text = json.dumps({"metrics": done.metrics, "table": done.table})
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(note)
    return done


ON_DEV = ("dev_accuracy", "dev_exact_match", "dev_token_f1")
"""What tells the best run, the first that counts."""


def _on_dev(metrics: Mapping[str, Any]) -> tuple[float, ...]:
    """Return what tells the best run, the highest: figures on dev, then the loss in training."""
    found = (float(metrics.get(name, 0.0)) for name in ON_DEV)
    return (*found, -float(metrics.get("train_loss", 0.0)))


def figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's line in the table has of its metrics."""
    names = ("accuracy", "exact_match", *ON_DEV, "untrained_accuracy", "train_loss")
    return {name: metrics[name] for name in names if name in metrics}


def mean(all_: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means of what all runs have measured, and how far their accuracy is apart."""
    found: dict[str, Any] = {}
    for name in (name for name in all_[0] if all(name in one for one in all_)):
        values = [one[name] for one in all_]
        alike = all(value == values[0] for value in values)
        found[name] = values[0] if alike else round(statistics.fmean(values), 6)
    key = next((k for k in ("accuracy", "exact_match", *ON_DEV) if k in found), None)
    if key is not None:
        spread = statistics.stdev(float(one[key]) for one in all_)
        found[f"{key}_sd"] = round(spread, 6)
    return found
