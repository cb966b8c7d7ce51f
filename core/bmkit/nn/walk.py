"""Which modules of a model are what."""

from __future__ import annotations

from torch import nn

from bmkit.errors import InputError


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers by name, the output head (tied or not) left out."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def stack(model: nn.Module) -> tuple[str, int]:
    """Return the name of the model's list of blocks, and how many there are.

    Raises InputError if it has none, or several.
    """
    found = _lists(model)
    if len(found) != 1:
        what = "no list of blocks" if not found else f"{len(found)} lists of blocks"
        raise InputError(f"{type(model).__name__} has {what}: which layers are meant is not clear")
    return next(iter(found.items()))


def stacks(model: nn.Module) -> list[tuple[str, int]]:
    """Return what `stack` does; of an encoder-decoder the encoder's and the decoder's."""
    found = _lists(model)
    halves = [[n for n in found if half in n.split(".")] for half in ("encoder", "decoder")]
    if len(found) == 2 and all(len(names) == 1 for names in halves):
        return [(name, found[name]) for (name,) in halves]
    return [stack(model)]


def _lists(model: nn.Module) -> dict[str, int]:
    lists = {n: len(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    nested = {n for n in lists for other in lists if n.startswith(f"{other}.")}
    return {n: count for n, count in lists.items() if n not in nested}


def tables(model: nn.Module) -> list[str]:
    """Return the names of the embedding of the vocabulary, and of a head with its own weight."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = head is not None and bool(getattr(model.config, "tie_word_embeddings", False))
    wanted = [embedding, None if tied else head]
    return [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Embedding | nn.Linear) and any(m is one for one in wanted)
    ]


def output_heads(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that make the logits."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [n for n, m in model.named_modules() if m is head and isinstance(m, nn.Linear)]
