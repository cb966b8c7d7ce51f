"""Parameters that hold the matrices of all experts in one, as `mlp.experts.gate_up_proj`.

Of a model that is loaded or of a checkpoint's headers, alike. A checkpoint may have experts one by
one, which transformers puts together while it loads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bmkit.deltas.modules import Module
from bmkit.deltas.stored import shapes_of_headers
from bmkit.plan import Headers

if TYPE_CHECKING:
    from torch import nn

_ONE = re.compile(r"^(.*\bexperts)\.(\d+)\.(\w+)\.weight$")
PARTS = {
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj"),
    **dict.fromkeys(("down_proj", "w2"), "down_proj"),
}
"""What the matrices of single experts become parts of, one above the other."""


def stacked_of_model(model: nn.Module) -> dict[str, Module]:
    """Return such parameters [experts, …, …] of a model, on any device (meta, too), by name."""
    from torch import nn

    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
    return {
        f"{where}.{name}": Module("parameter", tuple(value.shape))
        for where, module in model.named_modules()
        if not isinstance(module, convolutions)
        for name, value in module.named_parameters(recurse=False)
        if value.ndim == 3 and len(value) > 1
    }


def stacked_of_headers(headers: Headers) -> dict[str, Module]:
    """Return such parameters of the checkpoint's model, by the names that it has for them."""
    shapes = shapes_of_headers(headers)
    found = {
        name: shape
        for name, shape in shapes.items()
        if len(shape) == 3 and shape[0] > 1 and not name.endswith(".weight")
    }
    return {name: Module("parameter", shape) for name, shape in (found | _joined(shapes)).items()}


def _joined(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return what single experts become, from the shapes [out, in] of their matrices."""
    sizes: dict[str, tuple[int, ...]] = {}
    experts: dict[str, set[str]] = {}
    for name, shape in shapes.items():
        match = _ONE.match(name)
        if match is None or match[3] not in PARTS:
            continue
        whole = f"{match[1]}.{PARTS[match[3]]}"
        experts.setdefault(whole, set()).add(match[2])
        times = 2 if PARTS[match[3]] == "gate_up_proj" else 1
        sizes[whole] = (times * shape[0], shape[-1])
    return {whole: (len(experts[whole]), *size) for whole, size in sizes.items()}
