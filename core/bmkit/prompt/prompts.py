"""Rows of data -> prompts in tokens, by a recipe's template and one tokenizer. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmkit.data.tabular import Record
from bmkit.errors import About, InputError, RecipeError
from bmkit.prompt import templates
from bmkit.prompting.encode import Encoded, Encoder, Kind, SoftRow
from bmkit.prompting.jinja import Jinja
from bmkit.prompting.labelwords import LabelWords
from bmkit.prompting.template import Template
from bmkit.prompting.truncate import Method
from bmkit.prompting.wrap import Part, wrap


@dataclass(frozen=True)
class Prompts:
    """A template that is ready to make prompts."""

    template: Template | Jinja
    encoder: Encoder

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the keys that a row needs, or with Jinja may have."""
        return self.template.fields

    @property
    def soft(self) -> list[SoftRow]:
        """Return the soft tokens' rows; there are none in Jinja."""
        if isinstance(self.template, Jinja) or not self.template.soft:
            return []
        return self.encoder.soft_rows(self.template)

    def wrap(self, record: Record) -> list[Part]:
        """Return the parts of a row's prompt. Raises InputError naming the row."""
        try:
            return wrap(self.template, record.values, record.line)
        except InputError as exc:
            raise InputError(f"{record.where}: {exc}", hint=exc.hint) from None

    def encode(self, records: Sequence[Record]) -> list[Encoded]:
        """Return the rows' prompts in tokens, each with one mask.

        Raises InputError naming a row that can't be wrapped, RecipeError if what can't be shortened
        is too long.
        """
        wrapped = [self.wrap(record) for record in records]
        with About("template"):
            found = self.encoder.encode_all(wrapped, [record.line for record in records])
        for record, prompt in zip(records, found, strict=True):
            if len(prompt.masks) != 1:  # which Jinja may decide
                raise InputError(f"{record.where}: its prompt has {len(prompt.masks)} masks, not 1")
        return found

    def saying(self, texts: Sequence[str]) -> list[Encoded]:
        """Return prompts with each of `texts` in the place of all that a row says."""
        rows = [dict.fromkeys(self.fields, text) for text in texts]
        return self.encode(
            [Record(f"the text {t!r}", 1, row) for t, row in zip(texts, rows, strict=True)]
        )


def make(
    spec: Mapping[str, Any],
    tokenizer: Any,
    kind: Kind,
    *,
    words: LabelWords | None = None,
    context: int | None,
    max_seq_length: int,
    truncate_method: Method,
    decoder_start: int | None,
    soft_start: int | None = None,
) -> Prompts:
    """Return what makes prompts of a template as an artifact keeps it (see `templates.written`).

    Prompts are no longer than the model's `context`, with the longest of `words` if they are given.
    Soft tokens have ids from `soft_start` on. Raises RecipeError for a template that the tokenizer
    or the kind of model can't have.
    """
    template = templates.for_tokenizer(templates.parse(spec), tokenizer)
    if isinstance(template, Template) and template.masks > 1:
        raise RecipeError(
            f"{template.where}: it has {template.masks} masks, and a label's words stand at one",
            hint="leave one mask",
        )
    most = max_seq_length
    if context is not None:
        longest = max((len(word.ids) for word in words.flat), default=0) if words else 0
        most = min(most, context - longest)
    encoder = Encoder(
        tokenizer,
        kind,
        most,
        truncate_method,
        soft_start=soft_start,
        decoder_start=decoder_start,
    )
    return Prompts(template, encoder)
