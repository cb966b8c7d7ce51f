"""`bmkit prompt` with a search: what it finds on 16 rows a label of SST-2, and how fast.

python scripts/bench/prompt_search.py --data FOLDER [-m smollm2-135m] [--only speed|accuracy]

FOLDER has sst2. What was measured before stays in the file. Accuracy is that on the first 300 rows
of dev; the 16 rows a label to search on, and 16 to choose by, are drawn from train by two seeds:

given      the first template with its words, nothing searched
words      the first template, and words that are searched
templates  six templates with the words that were given
both       six templates, and words

speed      pairs of a row and a combination of words that are scored in a second of the processor's
           time, one template, 32 rows: by a search, and by asking anew for each combination

All in one thread, in float32.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import torch
import yaml
from torch import Tensor

from bmkit.pipeline.stage import Request, prepare
from bmkit.prompt.labels import Verbalizer
from bmkit.prompt.measure import measure
from bmkit.prompt.opening import open_model
from bmkit.prompt.ready import Ready
from bmkit.prompt.rounds import rounds
from bmkit.prompt.search import given as given_templates
from bmkit.prompt.tried import Pair, Tried, best
from bmkit.report import Silent

Rows = list[dict[str, str]]
SEEDS = [13, 21]
FIRST = '{"placeholder": "text_a"} It was {"mask"}'
OTHERS = [
    '{"placeholder": "text_a"} All in all, it was {"mask"}',
    '{"placeholder": "text_a"} In one word: {"mask"}',
    'Review: {"placeholder": "text_a"}{"text": "\\nThe film was"} {"mask"}',
    'Review: {"placeholder": "text_a"}{"text": "\\nSentiment:"} {"mask"}',
    '{"placeholder": "text_a"} I found it {"mask"}',
]
WORDS = {"negative": ["bad", "terrible"], "positive": ["good", "great"]}
CASES: dict[str, dict[str, Any]] = {
    "given": {"num_candidates": 0},
    "words": {"num_candidates": 30},
    "templates": {"templates": OTHERS, "num_candidates": 0},
    "both": {"templates": OTHERS, "num_candidates": 30},
}
CALIBRATIONS = ("none", "content_free")


def sst2(file: Path) -> Rows:
    """Return the rows of one of SST-2's files."""
    with file.open(encoding="utf-8", newline="") as stream:
        read = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [{"text_a": r[0], "label": ("negative", "positive")[int(r[1])]} for r in read]


def written(folder: Path, data: Path, search: dict[str, Any] | None, calibrate: str) -> Path:
    """Write a recipe and its rows; return the recipe's path."""
    train = sst2(data / "sst2" / "train.tsv")
    random.Random(0).shuffle(train)
    splits = {"train": train, "test": sst2(data / "sst2" / "dev.tsv")[:300]}
    for name, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    recipe: dict[str, Any] = {
        "kind": "prompt",
        "data": {name: f"{name}.jsonl" for name in splits},
        "device": "cpu",
        "dtype": "float32",
        "template": {"text": FIRST},
        "verbalizer": {"label_words": WORDS},
        "calibrate": {"type": calibrate},
    }
    if search is not None:
        few = {"type": "few_shot", "num_examples_per_label": 16, "seeds": SEEDS}
        recipe |= {"search": search, "learning_setting": few}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def accuracy(data: Path, model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what is chosen in each case, and how well it tells the rows of test.

    States are made once for each template, row and seed, and serve all cases.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = written(Path(folder), data, {"templates": OTHERS}, "content_free")
        request = Request("prompt", str(recipe), model)
        job = prepare(request, Silent()).job(Path(folder), Path(folder), Silent())
        ready = Ready(job)
        encoded = {name: ready.prompts.encode(s.records) for name, s in ready.splits.items()}
        runs = rounds(ready, encoded, ready.right())
        templates = [one.ready for one in given_templates(job, ready)]
    asker = open_model(job, ready.kind, ready.tokenizer, 32, 512).asker
    states: dict[int, Tensor] = {}
    told: dict[tuple[str, str], list[float]] = {}
    chosen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    counts: dict[tuple[str, str], int] = {}
    for one in runs:
        all_ = [
            Tried(own, asker, one.train.again(own.prompts), one.measured["dev"].again(own.prompts))
            for own in templates
        ]
        for case, calibrate in itertools.product(CASES, CALIBRATIONS):
            pair, tried = choose(all_, case, calibrate)
            own = templates[pair.template]
            if pair.template not in states:
                states[pair.template] = asker.states(
                    own.prompts.encode(one.measured["test"].records)
                )
            found = Verbalizer(pair.words)
            head, tokens = all_[pair.template].head, found.columns.token_ids
            if calibrate != "none":
                prior = all_[pair.template].states["prior"]
                found = found.calibrated(head.columns(prior, tokens))
            said = head.columns(states[pair.template], tokens)
            right = one.measured["test"].right
            figures, _ = measure(found.chosen(found.label_logprobs(said)), right, found.labels)
            key = (case, calibrate)
            told.setdefault(key, []).append(figures["accuracy"])
            words = {k: [w["text"] for w in v] for k, v in pair.words.values().items()}
            kept = {"template": own.spec["text"], "label_words": words}
            kept["dev_accuracy"] = pair.held_out.accuracy
            chosen.setdefault(key, []).append(kept)
            counts[key] = tried
        for key, values in told.items():
            yield (
                ", ".join(key),
                {
                    "accuracy": round(statistics.fmean(values), 4),
                    "accuracy_sd": round(statistics.stdev(values), 4) if values[1:] else 0.0,
                    "seeds": [round(value, 4) for value in values],
                    "combinations": counts[key],
                    "chosen": chosen[key],
                },
            )


def choose(all_: list[Tried], case: str, calibrate: str) -> tuple[Pair, int]:
    """Return the pair that a search takes in one case, and how many were tried."""
    pairs: list[Pair] = []
    count = 0
    for number, tried in enumerate(all_):
        if number and "templates" not in CASES[case]:
            continue
        prior = tried.states["prior"]
        whole = tried.spec
        tried.spec = whole.model_copy(update={"num_candidates": CASES[case]["num_candidates"]})
        if calibrate == "none":
            del tried.states["prior"]
        found, own = tried.pairs(number)
        tried.spec, tried.states["prior"] = whole, prior
        pairs += found
        count += own
    return best(pairs)[0], count


def speed(data: Path, model: str) -> dict[str, Any]:
    """Return scores a second of the processor's time, by a search and asked anew."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = written(Path(folder), data, {}, "none")
        request = Request("prompt", str(recipe), model)
        job = prepare(request, Silent()).job(Path(folder), Path(folder), Silent())
        ready = Ready(job)
        encoded = {name: ready.prompts.encode(s.records) for name, s in ready.splits.items()}
        one = rounds(ready, encoded, ready.right())[0]
    asker = open_model(job, ready.kind, ready.tokenizer, 32, 512).asker
    told = Verbalizer(ready.words)
    told.ask(asker, one.train.prompts[:4])
    search, anew = [], []
    tried = 0
    for _ in range(3):
        begun = time.process_time()
        tried = Tried(ready, asker, one.train, one.measured["dev"]).pairs(0)[1]
        search.append(time.process_time() - begun)
        begun = time.process_time()
        told.ask(asker, one.train.prompts)
        anew.append(time.process_time() - begun)
    rows = len(one.train.prompts)
    return {
        "rows": rows,
        "combinations": tried,
        "search_cpu_seconds": round(statistics.median(search), 3),
        "anew_cpu_seconds_for_one_combination": round(statistics.median(anew), 3),
        "search_scores_per_cpu_second": round(rows * tried / statistics.median(search)),
        "anew_scores_per_cpu_second": round(rows / statistics.median(anew), 2),
        "note": "the search's seconds are also those of 32 rows of dev",
    }


def main() -> None:
    """Measure what is asked for, and keep it with the machine's facts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("--only", action="append", default=[], help="speed or accuracy")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    file = Path(machine.__file__).parent / "results" / "prompt_search.json"
    found = json.loads(file.read_text()) if file.is_file() else {"accuracy": {}}
    facts = machine.facts()
    if "speed" not in given.only:
        for name, values in accuracy(given.data, given.model):
            found["accuracy"][name] = values
            machine.save("prompt_search", {**found, **facts}, say=False)
    if not given.only or "speed" in given.only:
        found["speed"] = speed(given.data, given.model)
    found |= {"model": given.model, "seeds": SEEDS, **facts}
    found["load_average_after"] = os.getloadavg()[0]
    machine.save("prompt_search", found)


if __name__ == "__main__":
    main()
