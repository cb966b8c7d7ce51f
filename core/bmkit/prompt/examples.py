"""`bmkit prompt --examples`: what a template makes of rows, token by token. No weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmkit.data.classes import Classes
from bmkit.data.tabular import Record
from bmkit.errors import RecipeError
from bmkit.plan import Job
from bmkit.prompt.ready import Ready
from bmkit.prompt.rows import all_of
from bmkit.prompt.search import given
from bmkit.prompting.encode import Encoded
from bmkit.prompting.wrap import show


def examples(job: Job, count: int) -> dict[str, Any]:
    """Return the first `count` rows of train, else dev, else test, wrapped and tokenised.

    A token has its `id`, its `role` and whether the model is `asked` there; `behind` are those
    after a causal prompt's mask, `decoder` what a decoder begins with. A search shows them in each
    `template` that it is given, by its number. Raises BmkitError for what is wrong with the recipe,
    as a run does.
    """
    ready = Ready(job)
    split = all_of(ready.splits, ("train", "dev", "test"))
    if split is None:
        raise RecipeError("data: there are no rows", hint="give data.train, data.dev or data.test")
    records = split.records[:count]
    if ready.recipe.search is None:
        found = _shown(ready, records)
    else:
        found = [
            {"template": number, **one}
            for number, tried in enumerate(given(job, ready))
            for one in _shown(tried.ready, records)
        ]
    return {
        "model_kind": ready.kind,
        "max_seq_length": ready.prompts.encoder.max_length,
        "truncate_method": ready.prompts.encoder.truncate_method,
        "label_words": {
            label: [
                {**word, "tokens": ready.tokenizer.convert_ids_to_tokens(word["ids"])}
                for word in own
            ]
            for label, own in ready.words.values().items()
        },
        "examples": found,
    }


def _shown(ready: Ready, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return rows in the prompts of a template."""
    found = []
    for record, prompt in zip(records, ready.prompts.encode(records), strict=True):
        label = record.values.get("label")
        found.append(
            {
                "row": record.where,
                **({} if label is None else {"label": _named(ready.classes, label)}),
                "text": show(ready.prompts.wrap(record)),
                **_tokens(ready.tokenizer, prompt, ready.soft_start),
            }
        )
    return found


def _named(classes: Classes, label: Any) -> Any:
    """Return a label, or several, by name, whatever the file has in its place."""
    if isinstance(label, list):
        return [_named(classes, one) for one in label]
    number = classes.numbers.get(str(label))
    return label if number is None else classes.names[number]


def _tokens(tokenizer: Any, prompt: Encoded, start: int) -> dict[str, Any]:
    """Return a prompt's tokens with their roles, and where the model is asked.

    Those from id `start` on are trained rows.
    """
    size = len(prompt.ids)
    asked = set() if prompt.decoder_ids else set(prompt.reads)
    ids = [*prompt.ids, *prompt.behind, *prompt.decoder_ids]
    names = [
        f"<soft {id_ - start}>" if id_ >= start else name
        for id_, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    ]
    listed = [
        {"token": name, "id": id_, "role": role, "asked": at in asked}
        for at, (name, id_, role) in enumerate(
            zip(names, [*prompt.ids, *prompt.behind], prompt.roles, strict=False)
        )
    ]
    found: dict[str, Any] = {"cut": prompt.cut, "masks": prompt.masks, "tokens": listed[:size]}
    if prompt.behind:
        found["behind"] = listed[size:]
    if prompt.decoder_ids:
        first = size + len(prompt.behind)
        found["decoder"] = [
            {"token": name, "id": id_, "asked": at in prompt.reads}
            for at, (name, id_) in enumerate(zip(names[first:], prompt.decoder_ids, strict=True))
        ]
    return found
