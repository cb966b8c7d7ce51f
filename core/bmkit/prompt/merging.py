"""A prompt put into its model: deltas into weights, trained tokens into the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bmkit import artifact
from bmkit import model as models
from bmkit.deltas import merge, soft_files, soft_words
from bmkit.errors import InputError, RecipeError
from bmkit.plan import read_json
from bmkit.prompt import kept as shelf
from bmkit.prompt import stored
from bmkit.prompt.kinds import kind_of
from bmkit.prompt.opening import head_config
from bmkit.prompt.stored import SOFT, KeptPrompt
from bmkit.prompting import template as language
from bmkit.prompting.pieces import Again, Piece, Soft, Special

TEMPLATE = "template.txt"
"""The template in the tokens of the merged vocabulary, as `template.file_path` takes it."""


def merged(checkpoint: Path, deltas: Sequence[Path], prompt: Path, out: Path) -> list[str]:
    """Write the model at `checkpoint` with a prompt in it; return what is said of the rest.

    `deltas` are those that the prompt was made on. Peak memory: the dense model in float32. Raises
    RecipeError for a prompt that has no place in one model's weights, InputError for one that
    doesn't fit.
    """
    kept = _one(prompt)
    tokenizer = models.load_tokenizer(checkpoint)
    stored.require_vocabulary(kept, tokenizer, prompt, checkpoint)
    kind = kind_of(models.load_config(checkpoint).to_dict(), kept.model_kind)
    config = head_config(checkpoint, kind)
    model = models.load_model(
        checkpoint, device=torch.device("cpu"), dtype="float32", config=config
    )
    own = [prompt / artifact.DELTAS / name for name in kept.adapters]
    folders = {f"{number}-{path.name}": path for number, path in enumerate([*deltas, *own])}
    if folders:
        model = merge.merged(model, folders, checkpoint)
    names: list[str] = []
    if kept.soft:
        soft_files.load(model, prompt / SOFT)
        done = soft_words.merged(model, tokenizer)
        model, tokenizer = done.model, done.tokenizer
        names = tokenizer.convert_ids_to_tokens(done.token_ids)
    models.save(model, checkpoint, out)
    _name_head(model, out)
    if names:
        tokenizer.save_pretrained(out)
        _say_size(model, out)
    return _left(kept, names, prompt, out)


def _one(prompt: Path) -> KeptPrompt:
    """Return a prompt that can be merged. Raises RecipeError for others."""
    found = shelf.read(prompt)
    if found.ensemble is not None:
        raise RecipeError(
            f"{prompt} is an ensemble: its prompts don't fit into one model",
            hint="let it label rows (data.unlabelled), and teach one model by `bmkit tune`",
        )
    if found.first.reads_states:
        kind = found.first.verbalizer
        raise RecipeError(
            f"{prompt} has a {kind} verbalizer, which has no place in the weights",
            hint="train it with label words, as `manual`",
        )
    return found.first


def _name_head(model: Any, out: Path) -> None:
    """Name the model's class, which has the head that says words, in its config."""
    values = {**read_json(out / "config.json"), "architectures": [type(model).__name__]}
    _write(out / "config.json", values)


def _say_size(model: Any, out: Path) -> None:
    """Write what has changed with the vocabulary: its size, and what is not to be generated."""
    config = read_json(out / "config.json")
    size = int(model.get_input_embeddings().num_embeddings)
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict) and "vocab_size" in holder:
            holder["vocab_size"] = size
    _write(out / "config.json", config)
    suppressed = getattr(getattr(model, "generation_config", None), "suppress_tokens", None)
    if suppressed:
        file = out / "generation_config.json"
        _write(file, {**(read_json(file) if file.is_file() else {}), "suppress_tokens": suppressed})


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _left(kept: KeptPrompt, names: Sequence[str], prompt: Path, out: Path) -> list[str]:
    """Write the template in tokens of the merged model; return what is lost or should be known."""
    said = []
    if "text" in kept.template:
        text = _in_tokens(kept.template["text"], names, prompt)
        if "\n" not in text:
            (out / TEMPLATE).write_text(text + "\n", encoding="utf-8")
            said.append(f"the template, with trained tokens by name, is in {TEMPLATE}")
        elif names:
            said.append(f"the template, with trained tokens by name: {text!r}")
    if kept.prior is not None:
        said.append("the calibration has no place in the weights, and is left out")
    if kept.word_weights:
        said.append("how much words count has no place in the weights, and is left out")
    return said


def _in_tokens(text: str, names: Sequence[str], prompt: Path) -> str:
    """Return a template with a special token in the place of each trained one."""
    found = language.parse(text)
    if not names:
        return language.to_text(found)
    about = soft_files.read(prompt / SOFT)[2]
    tokens: dict[int, list[str]] = {}
    for name, row in zip(names, about, strict=True):
        tokens.setdefault(row.span, []).append(name)
    pieces: list[Piece] = []
    for place, piece in enumerate(found.pieces):
        if not isinstance(piece, Soft | Again):
            pieces.append(piece)
            continue
        own = [name for span in found.spans(place) for name in tokens[span.number]]
        if not own:
            raise InputError(f"{prompt}: its template and its trained tokens don't go together")
        pieces += [Special(name, piece.space and not number) for number, name in enumerate(own)]
    return language.to_text(replace(found, pieces=tuple(pieces)))
