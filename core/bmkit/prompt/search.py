"""Search: which template and which label words, of many, tell labels best on a run's rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bmkit import report
from bmkit.data import classes
from bmkit.errors import About, BmkitError, InputError, RecipeError, did_you_mean
from bmkit.plan import Job
from bmkit.prompt import templates, written
from bmkit.prompt.ensembling import TOLD
from bmkit.prompt.opening import open_model
from bmkit.prompt.ready import Ready
from bmkit.prompt.rounds import Done, Round, Rows, Table, once
from bmkit.prompt.tried import Pair, Tried, best, in_turns
from bmkit.prompting.encode import Encoded
from bmkit.prompting.labelwords import LabelWords
from bmkit.prompting.template import parse, to_text

FILE = "search.json"
SHOWN = 5
"""So many pairs are in the manifest's table."""
LISTED = 100
"""So many pairs are in the file."""

Perform = Callable[[Ready, Round, list[Encoded], Path, Path], Done]


@dataclass(frozen=True)
class Candidate:
    """A template that is tried."""

    ready: Ready
    source: str
    """`recipe`, or `written` by the model that the recipe names."""
    score: float | None = None
    """The log-likelihood of what was written, over all rows."""


def perform(job: Job, ready: Ready, one: Round, out: Path, work: Path, then: Perform) -> Done:
    """Search on a run's rows, and perform it with the best pair of template and words.

    Where something is trained, `search.num_trained` pairs are, and the best one on dev is kept.
    Peak memory: the model that writes templates, then the one that is asked; and states of all rows
    in one template. Raises InputError for labels without rows, and if no template is left.
    """
    dev = one.measured.get("dev")
    _require_labels(ready)
    _require_rows(ready, one.train, dev)
    candidates = _candidates(job, ready, one, work)
    pairs, tried = _pairs(job, ready, candidates, one, dev)
    chosen = in_turns(pairs, ready.recipe.search.num_trained if ready.recipe.search else 1)

    def run(pair: Pair, one: Round, out: Path, work: Path) -> Done:
        own = candidates[pair.template].ready.with_words(pair.words)
        return then(own, one.again(own.prompts), own.prior_anew(), out, work)

    if len(chosen) == 1:
        at, done = 0, run(chosen[0], one, out, work)
    else:
        at, done = _best_trained(job, one, chosen, work, out, run)
    _write(out, candidates, pairs, chosen[at], "parts of train" if dev is None else "dev")
    counts = {"templates": len(candidates), "combinations": tried}
    return Done({**done.metrics, **counts}, [*_table(pairs, dev is not None), *done.table])


def _require_labels(ready: Ready) -> None:
    spec, names = ready.recipe.search, ready.classes.names
    for label in spec.label_words if spec else ():
        if label not in names:
            raise RecipeError(
                f"search.label_words: `{label}` is none of the labels",
                hint=did_you_mean(label, names, otherwise=f"there are {classes.listed(names)}"),
            )


def _require_rows(ready: Ready, train: Rows, dev: Rows | None) -> None:
    classes.require_every_class(train.right, ready.classes, "data.train")
    counts = classes.count(train.right, ready.classes)
    if dev is None and min(counts.values()) < 2:
        raise InputError(
            f"search: without data.dev each label takes two rows: {classes.counted(counts)}",
            hint="give data.dev, or more rows",
        )


def _candidates(job: Job, ready: Ready, one: Round, work: Path) -> list[Candidate]:
    """Return the templates to try, each once. What is written and doesn't fit is left out."""
    found = {_key(own.ready.spec): own for own in given(job, ready)}
    if job.models:
        for template in written.templates(job, ready, one.train, work):
            try:
                other = ready.with_template({"text": template.text})
                other.prompts.encode(one.train.records)
            except BmkitError as exc:
                job.reporter.warn(f"{template.text!r}, that was written, is left out: {exc}")
                continue
            found.setdefault(_key(other.spec), Candidate(other, "written", template.score))
    return list(found.values())


def given(job: Job, ready: Ready) -> list[Candidate]:
    """Return the templates that a recipe gives a search, each once, that of `template` first.

    Raises RecipeError for one that the tokenizer or the kind of model can't have.
    """
    recipe = ready.recipe
    assert recipe.search is not None  # it is what they are for
    file = job.files.get("template.file_path")
    specs = [("template", own) for own in templates.every(recipe.template.model_dump(), file)]
    specs += [
        (f"search.templates.{number}", {"text": to_text(parse(text))})
        for number, text in enumerate(recipe.search.templates)
    ]
    found: dict[str, Candidate] = {}
    for key, own in specs:
        with About(key):
            other = ready.with_template(own)
            if other.soft:
                raise RecipeError("it has soft tokens, and a search asks the model as it is")
            found.setdefault(_key(own), Candidate(other, "recipe"))
    return list(found.values())


def _key(spec: dict[str, Any]) -> str:
    text = spec.get("text")
    return json.dumps(spec if text is None else to_text(parse(text)))


def _pairs(
    job: Job, ready: Ready, candidates: Sequence[Candidate], one: Round, dev: Rows | None
) -> tuple[list[Pair], int]:
    """Return the best pairs of all templates, the best one first, and how many were tried."""
    recipe = ready.recipe
    size, most = recipe.train.per_device_eval_batch_size, recipe.template.max_seq_length
    opened = open_model(job, ready.kind, ready.tokenizer, size, most)
    rows = len(one.train.right) + len(dev.right if dev else ()) + len(ready.prior_anew())
    pairs: list[Pair] = []
    tried = 0
    with report.task(job.reporter, "search", len(candidates) * rows, "rows") as bar:
        for number, candidate in enumerate(candidates):
            own = candidate.ready
            train, held = one.train.again(own.prompts), dev.again(own.prompts) if dev else None
            if any(prompt.behind for prompt in train.prompts):
                job.reporter.warn(f"template {number}: the model doesn't read behind the mask")
            found, count = Tried(own, opened.asker, train, held, bar.advance).pairs(number)
            pairs += found
            tried += count
    opened.close()
    return best(pairs), tried


def _best_trained(
    job: Job,
    one: Round,
    chosen: Sequence[Pair],
    work: Path,
    out: Path,
    run: Callable[[Pair, Round, Path, Path], Done],
) -> tuple[int, Done]:
    """Train pairs, leave in `out` what the best on dev has, and return its place."""
    done = []
    for number, pair in enumerate(chosen):
        job.reporter.info(f"pair {number + 1} of {len(chosen)}: {_shown(pair.words)}")
        done.append(once(one, work / f"pair-{number}", partial(run, pair)))
    at = max(range(len(done)), key=lambda n: (float(done[n].metrics["dev_accuracy"]), -n))
    shutil.copytree(work / f"pair-{at}" / "kept", out, dirs_exist_ok=True)
    if (told := work / f"pair-{at}" / TOLD).is_file():  # for an ensemble
        shutil.copy(told, work)
    return at, done[at]


def _table(pairs: Sequence[Pair], by_dev: bool) -> Table:
    table: Table = []
    for place, pair in enumerate(pairs[:SHOWN], 1):
        step = f"{place}: template {pair.template}, {_shown(pair.words)}"
        line: dict[str, float | int | str] = {"step": step}
        line["train_accuracy"] = round(pair.train.accuracy, 6)
        line["dev_accuracy" if by_dev else "held_out_accuracy"] = round(pair.held_out.accuracy, 6)
        table.append(line)
    return table


def _shown(words: LabelWords) -> str:
    return " / ".join(", ".join(word.text.strip() for word in own) for own in words.words)


def _write(
    out: Path,
    candidates: Sequence[Candidate],
    pairs: Sequence[Pair],
    chosen: Pair,
    by: str,
) -> None:
    """Write what was tried: the templates, and the best pairs with their figures."""

    found = {
        "version": 1,
        "held_out": by,
        "templates": [
            {
                **one.ready.spec,
                "source": one.source,
                **({} if one.score is None else {"loglikelihood": one.score}),
            }
            for one in candidates
        ],
        "chosen": _values(chosen),
        "pairs": [_values(pair) for pair in pairs[:LISTED]],
    }
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (out / FILE).write_text(text + "\n", encoding="utf-8")


def _values(pair: Pair) -> dict[str, Any]:
    words = pair.words.values()
    return {
        "template": pair.template,
        "label_words": {label: [word["text"] for word in own] for label, own in words.items()},
        "train": asdict(pair.train),
        "held_out": asdict(pair.held_out),
    }
