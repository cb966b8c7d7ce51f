"""A prompt of an artifact, made ready again: it makes rows prompts, and tells their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmkit import artifact
from bmkit import model as models
from bmkit.deltas import compose, soft_files, soft_rows
from bmkit.plan import Job
from bmkit.prompt import states, stored
from bmkit.prompt.ask import Asker
from bmkit.prompt.kinds import kind_of
from bmkit.prompt.labels import FILE, Verbalizer
from bmkit.prompt.opening import context
from bmkit.prompt.prompts import Prompts, make
from bmkit.prompt.ready import SEVERAL
from bmkit.prompt.rules import Rules
from bmkit.prompt.states import States
from bmkit.prompt.stored import SOFT, KeptPrompt
from bmkit.prompting.encode import Kind
from bmkit.prompting.generation import parse_rules
from bmkit.verbalizers import wordweights


@dataclass(frozen=True)
class Reopened:
    """A kept prompt, and what it needs of its model."""

    folder: Path
    kept: KeptPrompt
    kind: Kind
    prompts: Prompts
    told: Verbalizer | States

    @property
    def adapters(self) -> list[Path]:
        """Return what was trained beside the model, in its order."""
        return [self.folder / artifact.DELTAS / name for name in self.kept.adapters]

    def put_rows(self, model: Any) -> None:
        """Give a model the prompt's trained tokens, if it has any."""
        if self.kept.soft:
            soft_files.load(model, self.folder / SOFT)

    @contextmanager
    def at_work(self, asker: Asker) -> Iterator[None]:
        """Let the asker's model have all that was trained with this prompt, while the block runs.

        Deltas that it has already go on working.
        """
        folders = {f"prompt-{number}": path for number, path in enumerate(self.adapters)}
        try:
            if folders:
                asker.model = compose.load(asker.model, folders)
            self.put_rows(asker.model)
            yield
        finally:
            if soft_rows.of(asker.model) is not None:
                soft_rows.detach(asker.model)
            for name in set(folders).intersection(compose.names(asker.model)):
                asker.model = compose.unplug(asker.model, name)


def reopen(folder: Path, kept: KeptPrompt, job: Job, tokenizer: Any) -> Reopened:
    """Make a kept prompt ready for the job's checkpoint.

    Raises InputError for a prompt that was made with another tokenizer, or is damaged.
    """
    assert job.prompt is not None  # the pipeline sends prompts here
    stored.require_vocabulary(kept, tokenizer, job.prompt.path, job.checkpoint)
    config = models.load_config(job.checkpoint)
    kind = kind_of(config.to_dict(), kept.model_kind)
    adapters = [folder / artifact.DELTAS / name for name in kept.adapters]
    prompts = make(
        kept.template,
        tokenizer,
        kind,
        words=kept.words if kept.multi_token_handler == "likelihood" else None,
        masks=kept.masks,
        texts=parse_rules(kept.rules, kept.labels) if kept.rules else (),
        prefix=kept.prefix,
        context=_context(context(config, job, adapters), kept),
        max_seq_length=kept.max_seq_length,
        truncate_method=kept.truncate_method,
        decoder_start=getattr(config, "decoder_start_token_id", None),
        soft_start=soft_files.read(folder / SOFT)[1] if kept.soft else None,
    )
    return Reopened(folder, kept, kind, prompts, _told(kept, folder))


def fields_of(parts: Sequence[Reopened]) -> tuple[str, ...]:
    """Return the fields that rows need for all of these prompts."""
    return tuple(dict.fromkeys(name for part in parts for name in part.prompts.fields))


def _context(most: int | None, kept: KeptPrompt) -> int | None:
    """Return how many tokens a prompt can have, with room for what is said behind it."""
    if most is None or kept.task != "generation" or kept.model_kind != "causal":
        return most
    return most - kept.generate.max_new_tokens


def _told(kept: KeptPrompt, folder: Path) -> Verbalizer | States:
    if kept.reads_states:
        return states.load(folder, tuple(kept.labels))
    told: Verbalizer
    if kept.verbalizer in SEVERAL:
        labels = tuple(kept.labels)
        told = Rules(kept.words, kept.multi_token_handler, kept.combine, own_labels=labels)
        return told if kept.prior is None else told.with_prior(kept.prior)
    told = Verbalizer(
        kept.words,
        kept.multi_token_handler,
        kept.combine,
        kept.aggregate,
        several=kept.task == "multilabel",
        module=wordweights.load(folder / FILE) if kept.word_weights else None,
    )
    return told if kept.prior is None else told.with_prior(kept.prior)
