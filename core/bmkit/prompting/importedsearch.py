"""What an experiment of OpenPrompt searches (LM-BFF, arXiv 2012.15723), as a recipe's `search`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bmkit.errors import BmkitError
from bmkit.prompting import forms
from bmkit.prompting import template as language
from bmkit.prompting.pieces import Mask, Meta, Special
from bmkit.prompting.template import Template

SECTIONS = {"template_generator": "auto_t", "verbalizer_generator": "auto_v"}
"""Sections that are read if `classification` has the flag."""
WORD = "labelword"
"""`{"meta": "labelword"}`: where a template to be written has its row's label word."""


def search(take: Callable[[str], Any], notes: list[str]) -> dict[str, Any] | None:
    """Return the section `search`, or None for an experiment that searches nothing.

    `take` returns what stands at a dotted key of the experiment.
    """
    templates, words = (bool(take(f"classification.{flag}")) for flag in SECTIONS.values())
    if not templates and not words:
        return None
    found: dict[str, Any] = {"num_candidates": 0}
    if templates:
        found |= _written(take, notes)
    if words:
        found |= _words(take)
    notes.append(
        "search: OpenPrompt trained every template and every choice of words; here the best pair "
        "before training is. search.num_trained trains more of them"
    )
    return found


def form(text: str) -> str | None:
    """Return an LM-BFF template, whose masks are gaps, as one of `search.forms`.

    None if it can't be read, or has no gap or not one place for the label's word.
    """
    try:
        template = language.parse(text, "lmbff_template")
    except BmkitError:
        return None
    gaps = 0
    pieces: list[Any] = []
    for piece in template.pieces:
        if isinstance(piece, Mask):
            pieces.append(Special(f"<extra_id_{gaps}>", piece.space))
            gaps += 1
        elif isinstance(piece, Meta) and piece.name == WORD:
            pieces.append(Mask(piece.space))
        else:
            pieces.append(piece)
    written = language.to_text(Template(tuple(pieces), template.where))
    try:
        forms.parse(written)
    except BmkitError:
        return None
    return written


def _written(take: Callable[[str], Any], notes: list[str]) -> dict[str, Any]:
    section = "template_generator"
    model, held = take(f"{section}.plm.model_path"), take("lmbff_template.text")
    file = take("lmbff_template.file_path")
    for key in ("plm.model_name", "target_number"):  # forms have their own number of gaps
        take(f"{section}.{key}")
    take("lmbff_template.choice")
    found: dict[str, Any] = {}
    if model:
        found["model"] = str(model)
    else:
        notes.append("search: it names no template_generator.plm.model_path: write search.model")
    for theirs, ours in (("beam_width", "beam_width"), ("max_length", "max_new_tokens")):
        if (value := take(f"{section}.{theirs}")) is not None:
            found[ours] = value
    if "beam_width" in found:
        found["num_templates"] = found["beam_width"]
    if take(f"{section}.length_limit"):
        notes.append("search: gaps have no limits of their own; search.max_new_tokens is for all")
    own = form(str(held)) if held is not None else None
    if own is not None:
        found["forms"] = [own]
    elif held is not None or file:
        told = f"the text `{held}`" if held is not None else str(file)
        notes.append(
            f"search: {told} says where to write: templates are written before and behind the "
            "mask; for other places write search.forms"
        )
    return found


def _words(take: Callable[[str], Any]) -> dict[str, Any]:
    section = "verbalizer_generator"
    for key in ("score_fct", "normalize", "balance"):  # by accuracy on train, then on dev
        take(f"{section}.{key}")
    found = {"num_candidates": take(f"{section}.candidate_num") or 30}
    if tried := take(f"{section}.label_word_num_per_class"):
        found["num_combinations"] = tried
    return found
