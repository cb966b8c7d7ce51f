"""Rows, templates and label words that `prompt.py` measures on, and recipes of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from bmkit.pipeline.stage import Request, prepare
from bmkit.prompt.labels import Verbalizer
from bmkit.prompt.run import Ready
from bmkit.report import Silent

Rows = list[dict[str, str]]

SNIPS = {  # one word a label, chosen once, as a reader would
    "AddToPlaylist": "playlist",
    "BookRestaurant": "restaurant",
    "GetWeather": "weather",
    "PlayMusic": "music",
    "RateBook": "rating",
    "SearchCreativeWork": "search",
    "SearchScreeningEvent": "cinema",
}
FEELINGS = {"negative": ["bad", "terrible"], "positive": ["good", "great"]}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sst2": ('{"placeholder": "text_a"} It was {"mask"}', FEELINGS),
    "snips": ('{"placeholder": "text_a"} This is about {"mask"}', SNIPS),
    "rte": (
        '{"placeholder": "text_a"}\nQuestion: {"placeholder": "text_b"} True or False?\n'
        'Answer: {"mask"}',
        {"entailment": "True", "not_entailment": "False"},
    ),
    "boolq": (
        '{"placeholder": "text_a"}\nQuestion: {"placeholder": "text_b"}?\nAnswer: {"mask"}',
        {"true": "yes", "false": "no"},
    ),
}


def sst2(file: Path) -> Rows:
    """Return the rows of one of SST-2's files."""
    with file.open(encoding="utf-8", newline="") as stream:
        read = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [{"text_a": r[0], "label": ("negative", "positive")[int(r[1])]} for r in read]


def snips(folder: Path, split: str, count: int | None = None) -> Rows:
    """Return the first `count` requests of each kind, those of files that are cut left out."""
    found: Rows = []
    for label in SNIPS:
        text = (folder / f"{split}_{label}.json").read_text(encoding="utf-8", errors="replace")
        for row in json.loads(text)[label][:count]:
            said = "".join(part["text"] for part in row["data"]).strip()
            found.append({"text_a": said, "label": label})
    return found


def fewglue(file: Path, first: str, second: str) -> Rows:
    """Return the rows of a task of two texts."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [
        {
            "text_a": r[first],
            "text_b": r[second],
            "label": r["label"] if isinstance(r["label"], str) else str(r["label"]).lower(),
        }
        for r in rows
    ]


def test_rows(data: Path, task: str) -> Rows:
    """Return what is measured of a task."""
    if task == "sst2":
        return sst2(data / "sst2" / "dev.tsv")[:300]
    if task == "snips":
        return snips(data / "snips", "validate", 30)
    if task == "rte":
        return fewglue(data / "fewglue" / "RTE_train32.jsonl", "premise", "hypothesis")
    return fewglue(data / "fewglue" / "BoolQ_train32.jsonl", "passage", "question")


def train_rows(data: Path, task: str) -> Rows:
    """Return what is learned from: of FewGLUE all there is, which is tested on as well."""
    if task == "sst2":
        return sst2(data / "sst2" / "train.tsv")
    return snips(data / "snips", "train") if task == "snips" else test_rows(data, task)


def written(folder: Path, values: dict[str, Any], **splits: Rows) -> Path:
    """Write rows and a recipe for them; return the recipe's path."""
    for name, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    recipe = {
        "kind": "prompt",
        "data": {name: f"{name}.jsonl" for name in splits},
        "device": "cpu",
        "dtype": "float32",
        **values,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def ready(recipe: Path, model: str, *assign: str) -> Ready:
    """Return all of a recipe but the weights, as the engine makes it."""
    request = Request("prompt", str(recipe), model, assign=assign)
    return Ready(prepare(request, Silent()).job(recipe.parent, recipe.parent, Silent()))


def verbalizer(made: Ready) -> Verbalizer:
    """Return the verbalizer of a recipe, without its calibration."""
    spec = made.recipe.verbalizer
    return Verbalizer(made.words, spec.multi_token_handler, spec.combine, spec.aggregate)
