"""How a model is asked: at a mask, behind a text, or in a decoder. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bmkit import plan
from bmkit.errors import InputError
from bmkit.prompting.encode import Kind

HEADS = {
    "masked": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
"""transformers' classes, by kind."""


def kind_of(config: Mapping[str, Any], wanted: str = "auto") -> Kind:
    """Tell the kind of a model by its `config.json`, or check that it can be the one `wanted`.

    Raises InputError for a model with a head for another task, or of another kind.
    """
    name = (config.get("architectures") or [""])[0]
    task = plan.task(config)
    if task in ("classify", "tag") or name.endswith("EncoderModel"):
        raise InputError(
            f"{name} says no words: a prompt needs a model that does",
            hint="name the model that it was made from",
        )
    found: Kind = "causal"
    if config.get("is_encoder_decoder"):
        found = "seq2seq"
    elif task == "embed" and not config.get("is_decoder"):
        found = "masked"
    if wanted not in ("auto", found):
        raise InputError(f"model_kind: this model is {found}, not {wanted}")
    return found
