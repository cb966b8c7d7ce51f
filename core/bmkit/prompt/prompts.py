"""Rows of data -> prompts in tokens, by a recipe's template and one tokenizer. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmkit.data.tabular import Record
from bmkit.errors import About, InputError, RecipeError
from bmkit.prompt import templates
from bmkit.prompting.encode import Encoded, Encoder, Kind, SoftRow
from bmkit.prompting.generation import Choosing, Rules, choices
from bmkit.prompting.jinja import Jinja
from bmkit.prompting.labelwords import LabelWords, token_ids
from bmkit.prompting.template import Template
from bmkit.prompting.truncate import Method
from bmkit.prompting.wrap import Part, wrap


@dataclass(frozen=True)
class Prompts:
    """A template that is ready to make prompts."""

    template: Template | Jinja
    encoder: Encoder
    masks: int = 1
    """How many masks each prompt has."""
    texts: Rules = ()
    """Of `verbalizer.type: generation`: what each row's labels would say."""
    prefix: str = " "
    """What is before each of these texts."""
    context: int | None = None
    """How many tokens the model reads."""

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
        """Return the rows' prompts in tokens, each with its masks.

        Raises InputError naming a row that can't be wrapped, RecipeError if what can't be shortened
        is too long.
        """
        wrapped = [self.wrap(record) for record in records]
        with About("template"):
            found = self.encoder.encode_all(wrapped, [record.line for record in records])
        for record, prompt in zip(records, found, strict=True):
            if len(prompt.masks) != self.masks:  # which Jinja may decide
                count = len(prompt.masks)
                raise InputError(f"{record.where}: its prompt has {count} masks, not {self.masks}")
        if not self.texts:
            return found
        return [self._choosing(r, prompt) for r, prompt in zip(records, found, strict=True)]

    def _choosing(self, record: Record, prompt: Encoded) -> Choosing:
        """Return a prompt with the texts of its row's labels, in tokens."""
        known = self.encoder.tokenizer
        said = choices(self.texts, record)
        ids = tuple(tuple(token_ids(known, text, self.prefix) for text in own) for own in said)
        longest = max(sum(map(len, own)) for own in ids)
        count = len(prompt.ids) + longest
        if self.context is not None and count > self.context:
            raise InputError(
                f"{record.where}: {count} tokens with its longest text; the model reads "
                f"{self.context}",
                hint="lower template.max_seq_length",
            )
        return Choosing(**vars(prompt), texts=ids)

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
    masks: int = 1,
    texts: Rules = (),
    prefix: str = " ",
    context: int | None,
    max_seq_length: int,
    truncate_method: Method,
    decoder_start: int | None,
    soft_start: int | None = None,
) -> Prompts:
    """Return what makes prompts of a template as an artifact keeps it (see `templates.written`).

    Prompts are no longer than the model's `context`, with the longest of `words` if they are given
    (with several masks, all of a label's). Soft tokens have ids from `soft_start` on. Raises
    RecipeError for a template that the tokenizer or the kind of model can't have.
    """
    template = templates.for_tokenizer(templates.parse(spec), tokenizer)
    if isinstance(template, Template) and template.masks != masks:
        raise other_masks(template.where, template.masks, masks)
    most = max_seq_length
    if context is not None:
        most = min(most, context - (_longest(words, masks) if words else 0))
    limit = "max_seq_length" if most == max_seq_length else "what the model reads"
    encoder = Encoder(
        tokenizer,
        kind,
        most,
        truncate_method,
        soft_start=soft_start,
        decoder_start=decoder_start,
        limit=limit,
    )
    return Prompts(template, encoder, masks, texts, prefix, context)


def other_masks(where: str, there: int, wanted: int) -> RecipeError:
    """Return the error for a template that hasn't as many masks as labels have words."""
    if wanted == 1:
        return RecipeError(
            f"{where}: it has {there} masks, and a label's words stand at one",
            hint="leave one mask, or take verbalizer.type: ptr, with a word for each",
        )
    return RecipeError(
        f"{where}: it has {there} mask{'s' * (there != 1)}, and a label has {wanted} words",
        hint="each label takes one word for each mask of the template",
    )


def _longest(words: LabelWords, masks: int) -> int:
    """Return the most tokens that words may add to a prompt."""
    if masks == 1:
        return max((len(word.ids) for word in words.flat), default=0)
    return max(sum(len(word.ids) for word in own) for own in words.words)
