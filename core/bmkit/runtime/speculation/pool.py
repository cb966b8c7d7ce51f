"""A phrase pool on disk: a `phrases` artifact that runs read, and add to when they end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import bmkit
from bmkit import artifact, place
from bmkit.artifact import InputEntry, Step
from bmkit.errors import InputError, an_artifact
from bmkit.runtime.speculation.phrases import END, Phrases

TOKENS, ABOUT = "phrases.safetensors", "phrases.json"
FORMAT = 1
LIMIT = 2**19
"""Tokens that a pool holds: the oldest go first. Some 2 MB, read in half a second."""


def tokenizer_digest(tokenizer: Any) -> str:
    """Return what tells tokenizers apart for a pool: which text each number stands for."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def read(path: Path, tokenizer: str, vocabulary: int) -> Phrases:
    """Read a pool that was made with `tokenizer` (its digest).

    Raises InputError for what is damaged, of another kind, or of another tokenizer.
    """
    found = artifact.open_artifact(path)
    if found.kind != "phrases":
        raise InputError(f"{path} is {an_artifact(found.kind)}, not a phrase pool")
    about = _about(path)
    if about.get("format") != FORMAT:
        raise InputError(f"{path} is a pool of format {about.get('format')}, this reads {FORMAT}")
    if about.get("tokenizer") != tokenizer:
        raise InputError(
            f"{path} was made with another tokenizer",
            hint="name another --phrases directory for this model",
        )
    try:
        tokens = load_file(path / TOKENS)["tokens"]
    except (OSError, SafetensorError, KeyError) as exc:
        raise InputError(f"{path / TOKENS} is damaged: {exc}") from None
    if tokens.ndim != 1 or tokens.dtype != np.int32:
        raise InputError(f"{path / TOKENS} is damaged: it holds no list of tokens")
    if len(tokens) and not (tokens.min() >= END and tokens.max() < vocabulary):
        raise InputError(f"{path / TOKENS} holds tokens that the model doesn't know")
    pool = Phrases(limit=int(about.get("limit", LIMIT)))
    pool.extend(tokens.tolist())
    pool.end()
    return pool


def _about(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise InputError(f"{path / ABOUT} is damaged: {exc}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path / ABOUT} is damaged: it is no object")
    return found


def add(
    path: Path,
    pieces: Sequence[Sequence[int]],
    *,
    tokenizer: str,
    vocabulary: int,
    inputs: Mapping[str, InputEntry] | None = None,
    limit: int | None = None,
    force: bool = False,
) -> int:
    """Add pieces of text to the pool at `path`, which is made if it isn't there.

    Several runs may do so at the same time: each waits for the others, and adds to what they have
    left. Whatever happens, the pool is whole. Returns its tokens. Raises InputError as `read`
    does, OutputTaken if something else lies at `path`.
    """
    path = path.absolute()
    with place.hold(path.parent / f".{path.name}.lock", str(path), wait=True):
        there = path.is_dir() and any(path.iterdir()) and not force
        old = read(path, tokenizer, vocabulary) if there else Phrases(limit=limit or LIMIT)
        if limit is not None:
            old.limit = limit
        known = {tuple(piece) for piece in old.pieces()}
        for piece in pieces:
            if len(piece) > 1 and tuple(piece) not in known:
                known.add(tuple(piece))
                old.extend(piece)
                old.end()
        old.trim()
        tokens = old.tokens()
        about = {"format": FORMAT, "tokenizer": tokenizer, "limit": old.limit}
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        key = artifact.stage_key("phrases", FORMAT, about, {"tokens": digest})
        with place.create(path, key=key, force=True, wait=True) as scratch:
            save_file({"tokens": tokens}, scratch / TOKENS)
            (scratch / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            step = Step(
                stage="phrases", name="phrases", key=key, recipe=about, inputs=dict(inputs or {})
            )
            manifest = artifact.write_manifest(
                scratch,
                version=bmkit.__version__,
                kind="phrases",
                steps=[step],
                metrics={"tokens": len(tokens)},
                loads_in=(),
            )
        artifact.remember(path, manifest)
    return len(tokens)
