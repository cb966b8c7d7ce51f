"""Models with a head for another task than generating: labels for a text, for its tokens, gaps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bmkit import model as models
from bmkit import plan
from bmkit.deltas.stored import modules_of_headers
from bmkit.errors import InputError

FILE = "head.json"
"""Beside an adapter: which head it was trained with."""
Task = Literal["sequence_classification", "token_classification", "masked_lm"]
CLASSES: dict[Task, str] = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "masked_lm": "AutoModelForMaskedLM",
}


@dataclass(frozen=True)
class Head:
    """What a model says in the place of a next token."""

    task: Task
    labels: tuple[str, ...] = ()


def read(folder: Path) -> Head | None:
    """Return the head that an adapter was trained with; None: that of its base.

    Raises InputError for a damaged file.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    values = plan.read_json(file)
    labels = values.get("labels")
    if values.get("task") not in CLASSES or not isinstance(labels, list):
        raise InputError(f"{file} says no task that bmkit knows")
    return Head(values["task"], tuple(map(str, labels)))


def write(folder: Path, head: Head) -> None:
    """Say beside an adapter which head it was trained with."""
    values = {"task": head.task, "labels": list(head.labels)}
    (folder / FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def pad_of(config: Any, tokenizer: Any) -> int:
    """Return the token that rows are filled up with: a classifier looks for it by its config."""
    own = getattr(config.get_text_config(), "pad_token_id", None)
    known = (own, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if isinstance(token, int)), 0)


def config_of(path: Path, head: Head, tokenizer: Any) -> Any:
    """Return a checkpoint's config as a model with this head has it."""
    import transformers

    config = models.load_config(path)
    kind = getattr(transformers, CLASSES[head.task])
    try:
        found = kind._model_mapping[type(config)]
    except KeyError:
        what = head.task.replace("_", " ")
        raise InputError(f"{path}: transformers has no {config.model_type} for {what}") from None
    config.architectures = [found.__name__]
    if head.labels:
        config.id2label = dict(enumerate(head.labels))
        config.label2id = {label: number for number, label in enumerate(head.labels)}
        config.problem_type = "single_label_classification"
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = pad_of(config, tokenizer)
    return config


def load(path: Path, config: Any, *, device: torch.device, dtype: str) -> tuple[Any, list[str]]:
    """Load the checkpoint at `path` with the head that its `config` names, in eval mode.

    Returns it with the names of the modules that are to be trained: the head, and those that the
    checkpoint has no weights for, which are drawn by torch's random numbers. Raises InputError and
    ResourceError as `load_model` does.
    """
    fresh: list[str] = []
    model = models.load_model(path, device=device, dtype=dtype, config=config, fresh=fresh)
    own = _own(model)
    if own and not _same_labels(path, config):
        for name in own:
            model.get_submodule(name).apply(model._init_weights)
    found = modules_of(fresh, getattr(model, "base_model_prefix", ""))
    return model, list(dict.fromkeys([*found, *own]))


def trained_with(path: Path, model: Any) -> list[str]:
    """Return the modules that `load` says are to be trained, from the checkpoint's headers alone.

    `model` is the one with the head, on any device (meta, too).
    """
    headers = plan.read_headers(path)
    prefix = getattr(model, "base_model_prefix", "")
    stored = set(modules_of_headers(headers, type(model).__name__))
    stored |= {f"{prefix}.{name}" for name in stored}  # as T5's, whose other classes have none
    names = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] not in stored]
    missing = modules_of(names, prefix)
    new = [n for n in missing if not any(f"{s}.".startswith(f"{n}.") for s in stored)]
    return list(dict.fromkeys([*new, *_own(model)]))


def _own(model: Any) -> list[str]:
    """Return what a classifier has beside its body: that is trained, whatever it was before."""
    if not type(model).__name__.endswith(("SequenceClassification", "TokenClassification")):
        return []
    prefix = getattr(model, "base_model_prefix", "")
    return [n for n, m in model.named_children() if n != prefix and _weighs(m)]


def _weighs(module: Any) -> bool:
    return next(module.parameters(), None) is not None


def _same_labels(path: Path, config: Any) -> bool:
    """Tell whether the checkpoint has this head already, for the same labels in the same order."""
    own = models.load_config(path)
    same_head = (own.architectures or [""])[0] == config.architectures[0]
    return bool(same_head and own.id2label == config.id2label)


def modules_of(missing: Sequence[str], prefix: str) -> list[str]:
    """Return the outermost modules that parameters belong to which a checkpoint doesn't hold.

    Within the base model they are those one level deeper.
    """
    found: dict[str, None] = {}
    for name in missing:
        parts = name.split(".")
        deep = 2 if parts[0] == prefix else 1
        found[".".join(parts[: min(deep, len(parts) - 1)])] = None
    return list(found)
