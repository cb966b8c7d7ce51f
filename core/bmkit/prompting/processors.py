"""What OpenPrompt's dataset processors read: columns and labels, by the name of a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Labels = tuple[str, ...] | Mapping[str, str]


@dataclass(frozen=True)
class Dataset:
    """How a dataset's files are read, its labels in OpenPrompt's order."""

    columns: Mapping[str, str | int]
    labels: Labels
    files: Mapping[str, str] = field(default_factory=dict)
    """By split, in the dataset's folder; empty if bmkit can't read what OpenPrompt read."""
    note: str = ""


PAIR: dict[str, str | int] = {"text_a": "premise", "text_b": "hypothesis", "label": "label"}
QUESTION: dict[str, str | int] = {"text_a": "passage", "text_b": "question", "label": "label"}
CHOICE: dict[str, str | int] = {
    "text_a": "premise",
    "meta.choice1": "choice1",
    "meta.choice2": "choice2",
    "meta.question": "question",
    "label": "label",
}
NESTED: dict[str, str | int] = {
    "text_a": "passage.text",
    "text_b": "passage.questions.*.question",
    "meta.answer": "passage.questions.*.answers.*.text",
    "label": "passage.questions.*.answers.*.label",
}
FLAT: dict[str, str | int] = {
    "text_a": "paragraph",
    "text_b": "question",
    "meta.answer": "answer",
    "label": "label",
}
SENSE: dict[str, str | int] = {
    "text_a": "sentence1",
    "text_b": "sentence2",
    "meta.word": "word",
    "label": "label",
}
PRONOUN: dict[str, str | int] = {
    "text_a": "text",
    "meta.span1_text": "target.span1_text",
    "meta.span2_text": "target.span2_text",
    "label": "label",
}
MARKED: dict[str, str | int] = {
    "text_a": "text",
    "meta.span1_text": "span1_text",
    "meta.span2_text": "span2_text",
    "label": "label",
}
NEWS: dict[str, str | int] = {"label": 0, "text_a": 1, "text_b": 2}
SENTENCE: dict[str, str | int] = {"text_a": "sentence", "label": "label"}
PLAIN: dict[str, str | int] = {"text_a": "text_a", "label": "label"}

TASK_FILES = {"train": "train.jsonl", "dev": "dev32.jsonl", "test": "val.jsonl"}
ENTAILS = ("entailment", "contradiction", "neutral")
BACKSLASHES = "OpenPrompt wrote a blank for each backslash in the texts"
MIRRORED = "OpenPrompt added each row of train with its choices swapped"
MARKS = "OpenPrompt put `*` around both spans of a text"


def _values(*names: str, start: int = 0, truth: bool = False) -> dict[str, str]:
    """Return labels that a file counts from `start`, or with `truth` writes false and true too."""
    counted = {str(number): name for number, name in enumerate(names, start)}
    return counted | (dict(zip(("false", "true"), names, strict=True)) if truth else {})


DATASETS: dict[str, Dataset] = {
    "agnews": Dataset(
        NEWS,
        _values("World", "Sports", "Business", "Tech", start=1),
        {"train": "train.csv", "test": "test.csv"},
        BACKSLASHES,
    ),
    "mnli": Dataset(
        NEWS,
        _values("contradiction", "entailment", "neutral", start=1),
        {split: f"{split}.csv" for split in ("train", "dev", "test")},
        BACKSLASHES,
    ),
    "sst-2": Dataset(
        SENTENCE, ("0", "1"), {split: f"{split}.tsv" for split in ("train", "dev", "test")}
    ),
    "imdb": Dataset(PLAIN, ("negative", "positive")),
    "amazon": Dataset(PLAIN, ("bad", "good")),
    "boolq": Dataset(QUESTION, ("true", "false"), TASK_FILES),
    "cb": Dataset(PAIR, ENTAILS, TASK_FILES),
    "rte": Dataset(PAIR, ("entailment", "not_entailment"), TASK_FILES),
    "copa": Dataset(CHOICE, ("0", "1"), TASK_FILES, MIRRORED),
    "multirc": Dataset(NESTED, ("0", "1"), TASK_FILES),
    "wic": Dataset(SENSE, ("true", "false"), TASK_FILES),
    "wsc": Dataset(PRONOUN, ("true", "false"), TASK_FILES),
    "super_glue.boolq": Dataset(QUESTION, _values("No", "Yes", truth=True)),
    "super_glue.cb": Dataset(PAIR, _values("Entailment", "Not Entailment", "Neutral")),
    "super_glue.rte": Dataset(PAIR, _values("Entailment", "Not Entailment")),
    "super_glue.copa": Dataset(CHOICE, _values("No", "Yes")),
    "super_glue.multirc": Dataset(FLAT, _values("No", "Yes")),
    "super_glue.wic": Dataset(
        SENSE,
        _values("Same", "Different", truth=True),
        note="OpenPrompt calls the label 0 `Same`, and there 1 means that the senses are the same",
    ),
    "super_glue.wsc": Dataset(MARKED, _values("Different", "Same", truth=True), note=MARKS),
}
"""By OpenPrompt's name for it, in small letters."""
