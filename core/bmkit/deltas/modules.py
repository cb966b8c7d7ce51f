"""What a model is made of: its modules by name, of which kind each is, and their weights' shapes.

Made of a model that is loaded (here) or of a checkpoint's headers (`stored.py`), alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["linear", "embedding", "norm", "conv", "router", "block", "parameter"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WRAPPED = ("base_layer", "original_module", "token_adapter")
"""What PEFT's wrappers call the module of the base that they stand for."""
ROUTERS = ("gate", "router")
TOKENS = (
    *("embed_tokens", "wte", "word_embeddings", "word_embedding", "embed_in"),
    *("tok_embeddings", "token_embedding", "shared"),
)
"""What tables of tokens are called; those of positions and of kinds of text aren't among them."""
_NUMBER = re.compile(r"\d+")
_STACK = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
_OUTER = re.compile(r"^base_model\.model\.")
_INNER = re.compile(r"\.(?:base_layer|original_module)(?=\.|$)")


@dataclass(frozen=True)
class Module:
    """One module: what kind it is, and the shape of its weight.

    A linear layer's shape is [out, in], except that GPT-2's Conv1D has [in, out]. A block is
    whatever holds other modules or parameters of its own; its shape is (). A parameter of experts
    is none of a model's modules, but addressed like them (`stacked.py`).
    """

    kind: Kind
    shape: tuple[int, ...] = ()
    head: bool = False
    """Whether it makes the logits of the vocabulary."""


def modules_of_model(model: nn.Module) -> dict[str, Module]:
    """Return the modules of a model, on any device (meta, too), by their names in it.

    Where PEFT has wrapped a module, the wrapper counts as what it wraps, and what PEFT has added
    isn't listed. Lists of modules and the model itself are left out, and tables of positions that
    are computed.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[str, Module] = {}
    _describe("", model, head, found, set())
    return with_blocks(found)


def with_blocks(found: Mapping[str, Module]) -> dict[str, Module]:
    """Return `found` with the blocks that hold them, which are the beginnings of their names.

    A name that goes on with numbers only is a list, and no block.
    """
    lists = set()
    blocks: dict[str, None] = {}
    for name in found:
        parts = name.split(".")
        for i in range(1, len(parts)):
            outer = ".".join(parts[:i])
            blocks[outer] = None
            if _NUMBER.fullmatch(parts[i]):
                lists.add(outer)
    added = [b for b in blocks if b not in lists and b not in found]
    return {**dict.fromkeys(added, Module("block")), **found}


def plain(name: str) -> str:
    """Return a module's name as it is without PEFT's wrappers."""
    return _INNER.sub("", _OUTER.sub("", name))


def layer_of(name: str) -> int | None:
    """Return the number of the block that a module is in, or is, in whichever stack; else None.

    It is the first number behind `layers`, `layer`, `h`, `block` or `blocks`, else the first one.
    """
    stack = stack_of(name)
    return None if stack is None else int(plain(name)[len(stack) + 1 :].split(".")[0])


def stack_of(name: str) -> str | None:
    """Return the name of the stack of blocks that a module is in; None if it is in none."""
    bare = plain(name)
    if match := _STACK.search(f".{bare}."):
        return bare[: match.start(1) - 2]
    parts = bare.split(".")
    place = next((i for i, part in enumerate(parts) if i and _NUMBER.fullmatch(part)), None)
    return None if place is None else ".".join(parts[:place])


def _describe(
    name: str, module: nn.Module, head: object, found: dict[str, Module], seen: set[int]
) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    where, own = name, module
    while inner := next((w for w in WRAPPED if own._modules.get(w) is not None), None):
        where, own = f"{where}.{inner}", own.get_submodule(inner)
        seen.add(id(own))
    kind = _kind(name.rpartition(".")[2], own)
    if kind is not None:
        found[name] = replace(kind, head=head is not None and head in (module, own))
    if kind is None or kind.kind == "block":
        for child, part in own.named_children():
            _describe(f"{where}.{child}" if where else child, part, head, found, seen)
    if not name:
        found.pop("", None)


def _kind(leaf: str, module: nn.Module) -> Module | None:
    """Return what a module is by itself; None if nothing but its children tells."""
    from torch import nn

    sides: list[Any] = [getattr(module, side, None) for side in ("nx", "nf")]
    if all(isinstance(n, int) for n in sides):  # a Conv1D, packed or not
        return Module("linear", tuple(sides))
    if isinstance(module, nn.Linear):
        return Module("linear", (module.out_features, module.in_features))
    if isinstance(module, nn.Embedding):
        if "Sinusoidal" in type(module).__name__:
            return None
        return Module("embedding", (module.num_embeddings, module.embedding_dim))
    parameters = {n: p for n, p in module._parameters.items() if p is not None}
    weight = parameters.get("weight")
    shape = () if weight is None else tuple(weight.shape)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Module("conv", shape)
    if len(shape) == 1:
        return Module("norm", shape)
    if len(shape) == 2 and (leaf in ROUTERS or "Router" in type(module).__name__):
        return Module("router", shape)
    return Module("block") if parameters or "Experts" in type(module).__name__ else None
