"""The file of a prompt artifact: template, words with their tokens, calibration. No torch here."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bmkit.errors import InputError
from bmkit.prompt.tasks import WITHOUT_LABELS, Generate, Probing, Tagging, Task
from bmkit.prompting.labelwords import LabelWords

FILE = "prompt.json"
SOFT = "soft"
"""Where trained rows are."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeptWord(_Part):
    """A label word as it stands in a text, and its tokens."""

    text: str
    ids: list[int] = Field(min_length=1)


class KeptRow(_Part):
    """A soft token: the word that it began as, and those that it is nearest to, by cosines."""

    begun: str | None
    near: dict[str, float]


class KeptPrompt(_Part):
    """What a prompt artifact says. Of its base it holds the vocabulary's digest alone."""

    version: Literal[1] = 1
    task: Task
    model_kind: Literal["masked", "causal", "seq2seq"]
    template: dict[str, Any]
    """`text`, `jinja` or `chat`."""
    truncate_method: Literal["tail", "head", "balanced"]
    max_seq_length: int
    columns: dict[str, str | int]
    header: bool | None = None
    quoted: bool | None = None
    """How CSV and TSV are read; None: by what the columns are, and by the file's ending."""
    labels: list[str]
    verbalizer: str
    label_words: dict[str, list[KeptWord]]
    multi_token_handler: Literal["first", "mean", "max", "likelihood"]
    combine: Literal["sum", "mean"]
    aggregate: Literal["logarithms", "probabilities"]
    calibration: str
    prior: list[list[float]] | None
    """By label, the log-probability of each word without a row; of `ptr`, of the label itself."""
    prefix: str = " "
    """What is before each text of `rules`."""
    rules: dict[str, list[str]] = {}
    """By label, what makes the text at each mask of a row, in the place of words."""
    soft: list[KeptRow] = []
    """The template's soft tokens, whose rows are in `soft/`."""
    adapters: list[str] = []
    """What was trained beside the model, in its order: each in `adapters/` by this name."""
    word_weights: bool = False
    """Whether `verbalizer.safetensors` holds how much words count."""
    none: str | None = None
    """Of relations and tags: the label of what is nothing."""
    tagging: Tagging = Tagging()
    probing: Probing = Probing()
    candidates: list[KeptWord] = []
    """Of `probing`: what may be the answer, in tokens; without any, the vocabulary."""
    generate: Generate = Generate()
    seed: int | None = None
    """Of the run that this prompt is of, if it was trained."""
    vocabulary: str
    """Hash of the tokenizer's vocabulary."""

    @model_validator(mode="after")
    def _fits(self) -> KeptPrompt:
        if self.task not in WITHOUT_LABELS and len(self.labels) < 2:
            raise ValueError("there are two labels at least")
        if list(self.label_words) != self.labels:
            raise ValueError("label_words are not those of labels")
        sizes = [1 if self.verbalizer == "ptr" else len(w) for w in self.label_words.values()]
        if self.prior is not None and [len(own) for own in self.prior] != sizes:
            raise ValueError("prior is not that of label_words")
        return self

    @property
    def reads_states(self) -> bool:
        """Tell whether labels are told from states at masks, and not by words."""
        return self.verbalizer in ("soft", "prototypical")

    @property
    def masks(self) -> int:
        """Return how many masks the template has."""
        if self.rules:
            return len(next(iter(self.rules.values())))
        return len(self.label_words[self.labels[0]]) if self.verbalizer == "ptr" else 1

    @property
    def words(self) -> LabelWords:
        """Return the words of labels."""
        values = {k: [w.model_dump() for w in own] for k, own in self.label_words.items()}
        return LabelWords.of_values(values)


def write(folder: Path, kept: KeptPrompt) -> None:
    """Write the file into an artifact's directory."""
    text = json.dumps(kept.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> KeptPrompt:
    """Read the file of an artifact's directory. Raises InputError if it is missing or damaged."""
    try:
        return KeptPrompt.model_validate_json((folder / FILE).read_text(encoding="utf-8"))
    except ValidationError as exc:
        problem = exc.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the whole"
        raise InputError(f"{folder / FILE} is damaged: {where}: {problem['msg']}") from None
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"{folder / FILE} can't be read: {exc}") from None


def described(kept: KeptPrompt) -> list[str]:
    """Return the lines that people are shown of a prompt."""
    lines = []
    for way, held in kept.template.items():
        if way == "chat":
            lines += [f"{m['role']}: {m['content']}" for m in held]
        else:
            lines += str(held).splitlines()
    lines = [f"template {line}" for line in lines]
    lines.append(f"asks     a {kept.model_kind} model, {kept.max_seq_length} tokens at most")
    for row in kept.soft:
        near = ", ".join(f"{word!r} {cosine:.2f}" for word, cosine in row.near.items())
        begun = "a draw" if row.begun is None else repr(row.begun)
        lines.append(f"soft     {begun}, now near {near}")
    lines += [f"beside   {name}, in adapters/{name}" for name in kept.adapters]
    for at, (label, own) in enumerate(kept.label_words.items()):
        said = [f"{word.text!r} ({' '.join(map(str, word.ids))})" for word in own]
        if label in kept.rules:
            said = kept.rules[label]
        elif kept.prior is not None and kept.verbalizer == "ptr":
            said.append(f"in all {math.exp(kept.prior[at][0]):.4f}")
        elif kept.prior is not None:
            shares = [f"{math.exp(held):.4f}" for held in kept.prior[at]]
            said = [f"{word} {share}" for word, share in zip(said, shares, strict=True)]
        if kept.reads_states:
            said = [f"by a {kept.verbalizer} verbalizer"]
        lines.append(f"label    {label}: {', '.join(said)}")
    if kept.task in WITHOUT_LABELS:
        return [*lines, f"task     {kept.task}"]
    what = {"none": "none", "content_free": "by texts that say nothing"}.get(
        kept.calibration, "by rows without labels"
    )
    return [*lines, f"calibrated {what}"]


def vocabulary_digest(tokenizer: Any) -> str:
    """Hash the words and numbers of a tokenizer's vocabulary, added ones included."""
    pairs = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def require_vocabulary(kept: KeptPrompt, tokenizer: Any, prompt: Path, base: Path) -> None:
    """Raise InputError if the tokenizer isn't the one that the prompt was made with."""
    if vocabulary_digest(tokenizer) != kept.vocabulary:
        raise InputError(
            f"{prompt} was made with another tokenizer than that of {base}",
            hint="make the prompt again on this model: its words have other tokens",
        )
