"""What steps work on: the whole job, what they share, and one step's source and target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmkit import model, plan
from bmkit.compress.calibrate import dev_of, pack_rows
from bmkit.compress.options.learning import Distill
from bmkit.compress.options.structure import Gates
from bmkit.compress.recipe import CompressRecipe
from bmkit.errors import InputError, RecipeError, did_you_mean
from bmkit.nn import walk
from bmkit.plan import Headers, Job
from bmkit.runtime.voice import Voice
from bmkit.train import corpus
from bmkit.train.corpus import Text

Metrics = Mapping[str, float | int | str]


@dataclass
class Shared:
    """What several steps need of the model that the recipe begins with, made when it is asked."""

    job: Job
    recipe: CompressRecipe
    device: torch.device
    _texts: list[Text] | None = None
    _rows: Tensor | None = None
    _voice: Voice | None = None

    @property
    def voice(self) -> Voice:
        """Return the model as one that speaks and judges."""
        if self._voice is None:
            self._voice = Voice(
                self.job.checkpoint,
                device=self.device,
                dtype=self.recipe.dtype,
                rows=8,
                reporter=self.job.reporter,
            )
        return self._voice

    @property
    def texts(self) -> list[Text]:
        """Return what is learned from."""
        if self._texts is None:
            counts = [s.likeliest for s in self.recipe.steps if isinstance(s, Distill | Gates)]
            self._texts = corpus.gather(
                lambda: self.voice,
                model.load_tokenizer(self.job.checkpoint),
                self.recipe.data,
                self.job.files.get("data.calibration"),
                self.job.work / "texts",
                likeliest=max(counts, default=None),
                seed=self.recipe.seed,
                reporter=self.job.reporter,
                halves=self.judges and not self.generates,
            )
        return self._texts

    @property
    def generates(self) -> bool:
        """Tell whether the model is one that says a next token."""
        config = model.load_config(self.job.checkpoint)
        return model.task(config) == "generate" and not config.is_encoder_decoder

    @property
    def judges(self) -> bool:
        """Tell whether the model has a perplexity: it says tokens, if only of half a text."""
        return model.task(model.load_config(self.job.checkpoint)) == "generate"

    @property
    def has_rows(self) -> bool:
        """Tell whether there are rows of text without letting the model speak for it."""
        file = self.job.files.get("data.calibration")
        if self._rows is not None or self._texts is not None or file is None or not self.generates:
            return self._rows is not None or self._texts is not None or file is not None
        tokenizer = model.load_tokenizer(self.job.checkpoint)
        return corpus.holds_texts(tokenizer, self.recipe.data, file)

    @property
    def rows(self) -> Tensor:
        """Return the texts one after the other, prompts too, as rows of token ids."""
        if self._rows is None:
            data, file = self.recipe.data, self.job.files.get("data.calibration")
            most = data.tokens
            learns = any(isinstance(s, Distill | Gates) for s in self.recipe.steps)
            if self.generates or (learns and self.judges):
                apart = set(dev_of(len(self.texts)) if learns else ())
                ids = [t.ids for i, t in enumerate(self.texts) if i not in apart]
                most *= 2  # prompts are looked at too
            elif file is not None:
                tokenizer = model.load_tokenizer(self.job.checkpoint)
                ids = corpus.plain(tokenizer, file)
            else:
                raise InputError(
                    f"{self.job.checkpoint} makes up no text to calibrate on",
                    hint="name some: -s data.calibration=texts.txt",
                )
            length = data.sequence_length
            context = model.context(model.load_config(self.job.checkpoint).get_text_config())
            if context is not None and context < length:
                self.job.reporter.info(f"the model reads {context} tokens at once: texts are cut")
                length = context
            self._rows = pack_rows(ids, length, most)
            self.forget()
        return self._rows

    def forget(self) -> None:
        """Give the memory back that the model takes."""
        self._voice = None


@dataclass(frozen=True)
class Work:
    """One step: from the checkpoint at `source` to the one at `out`."""

    source: Path
    out: Path
    folder: Path
    """What a stopped run goes on from."""
    shared: Shared = field(repr=False)
    number: int = 0
    """Of the recipe's steps, from 0."""

    @property
    def job(self) -> Job:
        """Return the whole job."""
        return self.shared.job


@dataclass(frozen=True)
class Scope:
    """What a step that compresses linear layers works on."""

    headers: Headers
    skeleton: nn.Module
    """The model on the meta device."""
    linears: dict[str, nn.Linear]
    """All linear layers by name."""
    left: list[str]
    """Those that are excluded."""
    chosen: set[str]
    """The stored names of the others' weights."""

    @property
    def widths(self) -> list[int]:
        """Return how many inputs each layer has that isn't excluded."""
        return [m.in_features for n, m in self.linears.items() if n not in self.left]


def scope(source: Path, patterns: list[str]) -> Scope:
    """Return the linear layers of the checkpoint at `source`, without those `patterns` name."""
    headers = plan.read_headers(source)
    skeleton = model.empty_model(source)
    linears = walk.linears(skeleton)
    left = _excluded(linears, patterns)
    if linears and len(left) == len(linears):
        raise RecipeError("exclude_modules leaves no layer to work on")
    chosen = _to_round(source, headers, skeleton, {n for n in linears if n not in left})
    return Scope(headers, skeleton, linears, left, chosen)


def _excluded(linears: Mapping[str, nn.Module], patterns: list[str]) -> list[str]:
    """Return the linear layers that `patterns` name by their ends."""
    for pattern in patterns:
        if not any(_ends(n, pattern) for n in linears):
            close = did_you_mean(pattern, {n.rpartition(".")[2] for n in linears})
            raise RecipeError(
                f"exclude_modules: no linear layer's name ends in `{pattern}`", hint=close or None
            )
    return [n for n in linears if any(_ends(n, e) for e in patterns)]


def _to_round(source: Path, headers: Headers, skeleton: nn.Module, modules: set[str]) -> set[str]:
    """Return the stored names of the weights of `modules`."""
    chosen = {f"{n}.weight" for n in modules}
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    stored = {t.name for t in headers.tensors}
    if not chosen & stored and prefix != ".":
        chosen = {n.removeprefix(prefix) for n in chosen}
    if not chosen & stored:
        raise InputError(
            f"{source} has no linear layers that can be quantised",
            hint="models whose layers are Conv1D (GPT-2) are not covered",
        )
    if absent := sorted(chosen - stored):
        raise InputError(
            f"{source}: {len(absent)} linear layers have no weight of their own in the "
            f"checkpoint, as {absent[0]}",
            hint="name them in exclude_modules, to leave them as they are",
        )
    return chosen


def write_config(out: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json`."""
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _ends(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def copy(source: Path, out: Path) -> None:
    """Take a checkpoint over as it is."""
    for file in {t.file for t in plan.read_headers(source).tensors}:
        shutil.copyfile(file, out / file.name)
    index = source / "model.safetensors.index.json"
    if index.is_file():
        shutil.copyfile(index, out / index.name)
    model.copy_side_files(source, out)
