"""A recipe's deltas on a model, by their specs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bmkit.deltas import compose, configs
from bmkit.deltas.configs import Place
from bmkit.deltas.modules import modules_of_model
from bmkit.deltas.stacked import stacked_of_model
from bmkit.deltas.targets import addressed, parameters_addressed
from bmkit.errors import LibraryRefusal, RecipeError

METHODS: dict[str, Callable[[Any, Place], Any]] = {
    "lora": configs.lora,
    "adalora": configs.adalora,
    "ia3": configs.ia3,
    "vera": configs.vera,
    "oft": configs.oft,
    "boft": configs.boft,
    "layer_norm": configs.layer_norm,
    "trainable_tokens": configs.trainable_tokens,
    "prefix": configs.prefix,
    "prompt": configs.prompt,
    "p_tuning": configs.p_tuning,
    "adapter": configs.adapter,
    "parallel_adapter": configs.parallel_adapter,
    "compacter": configs.compacter,
    "low_rank_adapter": configs.low_rank_adapter,
    "bitfit": configs.bitfit,
}


def carrier(specs: Sequence[Any]) -> int | None:
    """Return the place of the first delta that can keep modules of the model beside it."""
    bare = [spec.PROMPT or spec.type == "trainable_tokens" for spec in specs]
    return bare.index(False) if False in bare else None


def attach(
    model: Any,
    specs: Mapping[str, Any],
    *,
    seed: int,
    tokenizer: Any,
    tokenizer_path: Path,
    task_type: str | None,
    saved: Sequence[str] = (),
    tokens: Sequence[int] = (),
) -> Any:
    """Put new deltas on `model` by their names, to be trained; return the model to use.

    `saved` are modules of the model that are trained and kept with the `carrier`, `tokens` those
    whose rows of the embedding and of the head are, with the first LoRA. Raises
    RecipeError for a delta that doesn't fit the model or the others, naming it as `deltas.N`.
    """
    modules, stacked = modules_of_model(model), stacked_of_model(model)
    torch.manual_seed(seed)
    found: dict[str, Any] = {}
    carries = carrier(list(specs.values()))
    rows = rows_of(model, tokens)
    for number, (name, spec) in enumerate(specs.items()):
        own, besides = addressed(spec, modules)
        place = Place(
            own,
            besides,
            parameters_addressed(spec, modules, stacked),
            task_type=task_type,
            modules_to_save=saved if number == carries else (),
            rows=rows if spec.type == "lora" else {},
            tokenizer=tokenizer,
            tokenizer_path=str(tokenizer_path),
            hidden=int(model.config.get_text_config().hidden_size),
        )
        with LibraryRefusal(f"deltas.{number}: PEFT refuses it", error=RecipeError):
            found[name] = METHODS[spec.type](spec, place)
        rows = {} if spec.type == "lora" else rows
    with LibraryRefusal("deltas: PEFT refuses them on this model", error=RecipeError):
        return compose.attach(model, found)


def rows_of(model: Any, tokens: Sequence[int]) -> dict[str, list[int]]:
    """Return where the rows of `tokens` are: in the embedding, and in a head that isn't tied to it.

    Raises RecipeError for a model that has none by transformers' names, and for a head with a bias,
    which PEFT's trained rows would leave out.
    """
    if not tokens:
        return {}
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if inputs is None or head is None or not {id(inputs), id(head)} <= names.keys():
        raise RecipeError("the model has no embedding and head whose rows could be trained")
    if getattr(head, "bias", None) is not None:
        raise RecipeError(
            f"a {model.config.model_type} has a bias in its head, beside which no rows are trained",
            hint="`unfreeze: [all]` with `merge: true` trains it whole",
        )
    tied = model.config.get_text_config().tie_word_embeddings
    modules = (inputs,) if tied else (inputs, head)
    return {names[id(module)]: sorted(tokens) for module in modules}
