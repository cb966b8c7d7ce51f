"""Which modules a delta goes to: by names, patterns or roles, checked against what there is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from bmkit.deltas.modules import KINDS, Kind, Module, layer_of, plain, stack_of
from bmkit.deltas.roles import ROLES, roles_of
from bmkit.errors import RecipeError

ALL_LINEAR = "all-linear"
REGEX = "[r]"
HALVES = ("encoder", "decoder")
PLURALS: Mapping[Kind, str] = {
    "linear": "linear layers",
    "embedding": "embeddings",
    "norm": "norms",
    "conv": "convolutions",
    "router": "routers",
    "block": "blocks",
    "parameter": "parameters of experts",
}
ONE: Mapping[Kind, str] = {
    "linear": "a linear layer",
    "embedding": "an embedding",
    "norm": "a norm",
    "conv": "a convolution",
    "router": "a router",
    "block": "a block",
    "parameter": "a parameter of experts",
}
Layers = Sequence[int] | int | str


def matched(
    modules: Mapping[str, Module] | Sequence[str],
    target_modules: Sequence[str] | str,
    exclude_modules: Sequence[str] = (),
    layers: Layers | None = None,
    *,
    last: int | None = None,
    kinds: Collection[Kind] = KINDS,
    method: str = "this delta",
    key: str = "target_modules",
) -> list[str]:
    """Return the names of the modules that a delta addresses, in the order of `modules`.

    A pattern is a role (`attn.q`), the end of a name at a dot, `[r]` and a regular expression that
    matches from a dot to the end of a name, or `all-linear`: every linear layer but the head. In
    front of a role `encoder.` or `decoder.` narrows it to that half. What `exclude_modules` match
    is left out with all that is inside of it, so the beginning of a name leaves out all that goes
    on from there. `layers` keeps the modules in the numbered blocks of every stack, `last` those in
    the last blocks of each. Of what a pattern matches, the delta gets what is of `kinds`; names
    alone count as linear layers. `key` is what the recipe calls the patterns.

    Raises RecipeError for a pattern that matches nothing, or nothing of `kinds`, for layers that
    aren't there, and if nothing is left.
    """
    if not isinstance(modules, Mapping):
        modules = dict.fromkeys(modules, Module("linear"))
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not targets:
        raise RecipeError(f"{key}: it names no module", hint="write all-linear for all")
    kept = _kept(modules, layers, last)
    finder = _Finder(modules, key, kinds)
    found: set[str] = set()
    for pattern in targets:
        hits = finder.find(key, pattern, modules)
        fitting = [name for name in hits if modules[name].kind in kinds]
        if not fitting:
            raise _wrong_kind(pattern, hits, finder, kinds, method)
        found.update(fitting)
    for pattern in exclude_modules:
        found -= finder.inside(pattern)
    names = [n for n in modules if n in found]
    if kept is not None:
        names = [n for n in names if (stack_of(n), layer_of(n)) in kept]
    if not names:
        raise RecipeError(
            "deltas: nothing is left to train", hint="loosen exclude_modules or layers"
        )
    return names


def layer_numbers(layers: Layers) -> list[int]:
    """Read `3`, `[0, 3]`, `"20-29"` or `"0,3,20-29"` (ends included).

    Raises RecipeError for anything else.
    """
    if isinstance(layers, int):
        return [layers]
    if not isinstance(layers, str):
        return list(layers)
    found: list[int] = []
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, end = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > end:
            raise RecipeError(
                f"layers: `{part.strip()}` in `{layers}` is no number and no range of numbers",
                hint="write it as 20-29, or 0,3,20-29",
            )
        found += range(first, end + 1)
    return found


def depths(names: Collection[str]) -> dict[str, int]:
    """Return the stacks of blocks that modules are in, and how many blocks each has."""
    found: dict[str, int] = {}
    for name in names:
        stack, layer = stack_of(name), layer_of(name)
        if stack is not None and layer is not None:
            found[stack] = max(found.get(stack, 0), layer + 1)
    return found


def _kept(
    modules: Mapping[str, Module], layers: Layers | None, last: int | None
) -> set[tuple[str | None, int | None]] | None:
    """Return the blocks, as stack and number, that `layers` or `last` keep; None for all."""
    if layers is None and last is None:
        return None
    if layers is not None and last is not None:
        raise RecipeError("layers and last: both are given", hint="leave one of them out")
    there = depths(modules)
    most = max(there.values(), default=0)
    counts = " and ".join(str(n) for n in sorted(set(there.values()))) or "no"
    said = f"the model has {counts} numbered layers"
    if last is not None:
        if not 1 <= last <= most:
            raise RecipeError(f"last: there are no last {last} layers", hint=said)
        return {(s, i) for s, count in there.items() for i in range(max(count - last, 0), count)}
    assert layers is not None  # one of them is given
    numbers = layer_numbers(layers)
    present = {layer_of(name) for name in modules}
    for layer in numbers:
        if layer not in present:
            raise RecipeError(f"layers: there is no layer {layer}", hint=f"{said}, from 0")
    return {(stack, layer) for stack in there for layer in numbers}


class _Finder:
    """Finds modules by patterns, and knows what there is when one finds nothing."""

    def __init__(self, modules: Mapping[str, Module], key: str, kinds: Collection[Kind]) -> None:
        self.modules, self.key = modules, key
        self.stacked = tuple(kinds) == ("parameter",)
        """Whether none but parameters of experts are looked for."""
        self.outer = {n: list(_outer(n)) for n in modules}
        self.by_role: dict[str, list[str]] = {}
        for name, roles in roles_of(modules).items():
            for role in roles:
                self.by_role.setdefault(role, []).append(name)

    def find(self, where: str, pattern: str, names: Collection[str]) -> list[str]:
        """Return those of `names` that a pattern matches; `where` is the key that it stands under.

        Raises RecipeError if there is none.
        """
        half, _, rest = pattern.partition(".")
        if pattern == ALL_LINEAR or pattern in self.by_role:
            found = self._role(pattern)
        elif half in HALVES and (rest == ALL_LINEAR or rest in self.by_role):
            found = [n for n in self._role(rest) if half in plain(n).split(".")]
        else:
            fits = _test(where, pattern)
            found = [n for n in names if fits(n) or fits(plain(n))]
        if not found:
            raise self._nothing(where, pattern)
        return found

    def inside(self, pattern: str) -> set[str]:
        """Return what an exclusion leaves out: what it matches, and all that is inside of that.

        Beginnings of names can be matched as well. Raises RecipeError if it matches nothing.
        """
        names = {*self.modules, *(o for outer in self.outer.values() for o in outer)}
        hits = set(self.find("exclude_modules", pattern, names - {""}))
        return {n for n, outer in self.outer.items() if n in hits or not hits.isdisjoint(outer)}

    def roles_inside(self, names: Collection[str], kinds: Collection[Kind]) -> list[str]:
        """Return the roles of the modules of `kinds` that are inside of `names`."""
        inner = {n for n, outer in self.outer.items() if not set(names).isdisjoint(outer)}
        fitting = {n for n in inner if self.modules[n].kind in kinds}
        return [r for r in ROLES if not fitting.isdisjoint(self.by_role.get(r, ()))]

    def _role(self, role: str) -> list[str]:
        if role != ALL_LINEAR:
            return self.by_role[role]
        heads = set(self.by_role.get("head", ()))
        return [n for n, m in self.modules.items() if m.kind == "linear" and n not in heads]

    def _nothing(self, where: str, pattern: str) -> RecipeError:
        there = ", ".join(role for role in ROLES if role in self.by_role)
        roles = f"roles here: {there}" if there else "no module here has a role"
        half, _, rest = pattern.partition(".")
        if pattern in ROLES or (half in HALVES and rest in ROLES):
            return RecipeError(f"{where}: the model has no `{pattern}`", hint=roles)
        near = [f"`{name}`" for name in self._nearest(pattern.removeprefix(REGEX))]
        short = sorted({plain(n).rpartition(".")[2] for n in self._offered()})
        names = ", ".join(n for n in short if not n.isdigit())
        first = f"did you mean {' or '.join(near)}?" if near else f"there are: {names}"
        what = "matches" if pattern.startswith(REGEX) else "ends in"
        if self.stacked and where == self.key:
            return RecipeError(f"{where}: no parameter's name {what} `{pattern}`", hint=first)
        return RecipeError(
            f"{where}: no module's name {what} `{pattern}`", hint=f"{first} ({roles})"
        )

    def _nearest(self, pattern: str) -> list[str]:
        """Return up to three ends of names, or roles, that are spelt nearly as `pattern`."""
        count = pattern.count(".") + 1
        ends = {".".join(plain(n).split(".")[-count:]) for n in self._offered()}
        roles = [] if self.stacked else [*self.by_role, ALL_LINEAR]
        known = [*roles, *sorted(ends - self.by_role.keys())]
        near = difflib.get_close_matches
        return near(pattern, known, n=3, cutoff=0.8) or near(pattern, known, n=1, cutoff=0.55)

    def _offered(self) -> list[str]:
        """Return the names of what could be meant."""
        kinds = ("parameter",) if self.stacked else KINDS
        return [n for n, module in self.modules.items() if module.kind in kinds]


def _wrong_kind(
    pattern: str, hits: Sequence[str], finder: _Finder, kinds: Collection[Kind], method: str
) -> RecipeError:
    what = " and ".join(ONE[k] for k in KINDS if k in {finder.modules[n].kind for n in hits})
    wanted = " and ".join(PLURALS[k] for k in KINDS if k in kinds)
    inside = finder.roles_inside(hits, kinds) or finder.roles_inside(("",), kinds)
    if finder.stacked:
        inside = sorted({n.rpartition(".")[2] for n in finder._offered()})
    return RecipeError(
        f"{finder.key}: `{pattern}` is {what}, and {method} goes to {wanted}",
        hint=f"it can go to: {', '.join(inside)}" if inside else "name a module of that kind",
    )


def _test(where: str, pattern: str) -> Callable[[str], bool]:
    """Return a test of names by their end, or by a regular expression up to it."""
    if not pattern.startswith(REGEX):
        return lambda name: name == pattern or name.endswith(f".{pattern}")
    try:
        compiled = re.compile(pattern.removeprefix(REGEX))
    except re.error as exc:
        raise RecipeError(
            f"{where}: `{pattern}` is no regular expression: {exc}",
            hint="behind `[r]` comes one as Python has them",
        ) from None
    return lambda name: any(compiled.fullmatch(name, start) for start in _starts(name))


def _starts(name: str) -> Iterator[int]:
    """Yield where the words of a dotted name start."""
    yield 0
    yield from (i + 1 for i, letter in enumerate(name) if letter == ".")


def _outer(name: str) -> Iterator[str]:
    """Yield the names of what is around a module, the model itself (\"\") too."""
    while name:
        name = name.rpartition(".")[0]
        yield name
