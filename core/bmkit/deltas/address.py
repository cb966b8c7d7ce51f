"""Which modules a delta goes to: by the end of their names, checked against the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bmkit.errors import RecipeError, did_you_mean

ALL_LINEAR = "all-linear"
_LAYER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")


def matched(
    names: Sequence[str],
    target_modules: Sequence[str] | str,
    exclude_modules: Sequence[str] = (),
    layers: Sequence[int] | None = None,
) -> list[str]:
    """Return the modules among `names` that a delta addresses.

    A pattern matches a module whose dotted name is it or ends in it; `all-linear` matches every
    one. `layers` keeps those of the numbered blocks. Raises RecipeError if a pattern, or all of
    them together, match nothing, naming the nearest.
    """
    if isinstance(target_modules, str):
        patterns = [] if target_modules == ALL_LINEAR else [target_modules]
    else:
        patterns = [p for p in target_modules if p != ALL_LINEAR]
    if not target_modules:
        raise RecipeError("target_modules: it names no module", hint="write all-linear for all")
    present = {_layer(name) for name in names} - {None}
    for layer in layers or ():
        if layer not in present:
            raise RecipeError(
                f"layers: there is no layer {layer}",
                hint=f"the model has {len(present)} layers, numbered from 0",
            )
    for where, pattern in (
        *(("target_modules", p) for p in patterns),
        *(("exclude_modules", p) for p in exclude_modules),
    ):
        if not any(_ends(name, pattern) for name in names):
            short = sorted({name.rsplit(".", 1)[-1] for name in names})
            hint = did_you_mean(pattern, short, otherwise=f"there are: {', '.join(short)}")
            raise RecipeError(f"{where}: no module's name ends in `{pattern}`", hint=hint)
    found = [
        name
        for name in names
        if (not patterns or any(_ends(name, p) for p in patterns))
        and not any(_ends(name, p) for p in exclude_modules)
        and (layers is None or _layer(name) in layers)
    ]
    if not found:
        raise RecipeError(
            "deltas: nothing is left to train", hint="loosen exclude_modules or layers"
        )
    return found


def _ends(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _layer(name: str) -> int | None:
    match = _LAYER.search(f".{name}.")
    return int(match[1]) if match else None
