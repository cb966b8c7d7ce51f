"""A model as a folded tree: what it is made of, and what of it is trained.

Layers that are alike are one line. Nothing here looks at values: the meta device does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from bmkit.deltas.modules import WRAPPED, modules_of_model
from bmkit.deltas.roles import roles_of

if TYPE_CHECKING:
    from torch import nn

State = Literal["frozen", "trainable", "delta"]
PARAMETER = "Parameter"
_OUTER = {"PeftModel": "base_model", "PeftMixedModel": "base_model", "BaseTuner": "model"}
"""PEFT's classes around a whole model, and where they keep it."""


@dataclass(frozen=True)
class Branch:
    """A module or a parameter, or several alike; all figures are of one of them."""

    name: str
    """As it is in what is around it; of several `layers.0-29`."""
    type: str
    shape: tuple[int, ...] = ()
    """Of its own weight."""
    roles: tuple[str, ...] = ()
    count: int = 1
    """How many are alike."""
    parameters: int = 0
    """All that is inside, the delta's too; what is shared counts where it comes first."""
    trainable: int = 0
    """Parameters of the base that are trained."""
    delta: int = 0
    """Parameters that aren't of the base."""
    bytes: int = 0
    shared: bool = False
    """Whether it has no parameters but those of a module before it."""
    children: tuple[Branch, ...] = ()

    @property
    def state(self) -> State:
        """Return what happens to it, or to anything in it."""
        return "delta" if self.delta else "trainable" if self.trainable else "frozen"


@dataclass(frozen=True)
class Tree:
    """A model's tree, and the figures of the whole."""

    root: Branch
    parameters: int
    """Of base and delta."""
    trained: int
    """Those that get gradients, of base and delta."""
    bytes: int
    delta_bytes: int
    """What there is to be stored: the delta, and what of the base is trained."""

    @property
    def share(self) -> float:
        """Return which part of all parameters is trained."""
        return self.trained / self.parameters if self.parameters else 0.0


def view(model: nn.Module, base: Collection[str] | None = None) -> Tree:
    """Return a model, with deltas in it or not, as a tree.

    What PEFT has put beside a module that it wraps is the delta. `base`, the names of the
    parameters before deltas were put in, tells parameters that were added to modules as well.
    """
    inner, path = model, ""
    outside: list[tuple[str, nn.Module]] = []
    while place := _kept_in(inner):
        outside += [(n, m) for n, m in inner.named_children() if n != place]
        inner, path = inner.get_submodule(place), f"{path}{place}."
    roles = {n.removeprefix(path): r for n, r in roles_of(modules_of_model(model)).items()}
    reader = _Reader(roles, None if base is None else set(base))
    root = reader.branch("", "", "", inner, foreign=False)
    for name, module in outside:  # as a prompt's encoder
        root = _grown(root, reader.listed(name, name, name, module, foreign=True))
    parameters = {id(p): p for p in model.parameters()}.values()
    return Tree(
        root,
        parameters=root.parameters,
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        bytes=root.bytes,
        delta_bytes=reader.delta_bytes,
    )


def to_json(tree: Tree) -> dict[str, Any]:
    """Return a tree as plain values: the figures of the whole, and `root` with its `children`."""
    whole = {f.name: getattr(tree, f.name) for f in fields(tree) if f.name != "root"}
    return {**whole, "share": tree.share, "root": _plain(tree.root)}


def _plain(branch: Branch) -> dict[str, Any]:
    values = {f.name: getattr(branch, f.name) for f in fields(branch)}
    lists = {key: list(values[key]) for key in ("shape", "roles")}
    children = [_plain(child) for child in branch.children]
    return {**values, **lists, "state": branch.state, "children": children}


def _kept_in(module: nn.Module) -> str | None:
    names = [c.__name__ for c in type(module).__mro__]
    return next((place for name, place in _OUTER.items() if name in names), None)


class _Reader:
    """Makes branches of modules, and remembers which parameters have been counted."""

    def __init__(self, roles: Mapping[str, tuple[str, ...]], base: set[str] | None) -> None:
        self.roles, self.base = roles, base
        self.counted: set[int] = set()
        self.delta_bytes = 0

    def branch(
        self, name: str, path: str, real: str, module: nn.Module, *, foreign: bool
    ) -> Branch:
        """Return the branch of a module: `path` is its name in the base, `real` with wrappers.

        `foreign` says that it isn't of the base.
        """
        added: list[Branch] = []
        own, whole = module, real
        while inner := next((w for w in WRAPPED if own._modules.get(w) is not None), None):
            for child, part in own.named_children():
                if child != inner:
                    added += self.listed(child, path, f"{whole}.{child}", part, foreign=True)
            own, whole = own.get_submodule(inner), f"{whole}.{inner}"
        parts = [
            self.parameter(n, path, p, foreign) for n, p in own.named_parameters(recurse=False)
        ]
        children: list[Branch] = []
        for child, part in own.named_children():
            inside = (f"{path}.{child}".lstrip("."), f"{whole}.{child}".lstrip("."))
            children += self.listed(child, *inside, part, foreign=foreign)
        weight = own._parameters.get("weight")
        simple = not children and {p.name for p in parts} <= {"weight", "bias"}
        shown = () if simple and len({p.state for p in parts}) < 2 else tuple(parts)
        empty = Branch(
            name,
            type(own).__name__,
            shape=() if weight is None else tuple(weight.shape),
            roles=self.roles.get(real, ()),
            shared=bool(parts) and not children and all(p.shared for p in parts),
        )
        return replace(
            _grown(empty, [*parts, *children, *added]), children=(*shown, *children, *added)
        )

    def parameter(self, name: str, path: str, value: nn.Parameter, foreign: bool) -> Branch:
        """Return the branch of a parameter, which counts if it hasn't been counted before."""
        made = Branch(name, PARAMETER, shape=tuple(value.shape))
        if id(value) in self.counted:
            return replace(made, shared=True)
        self.counted.add(id(value))
        size, width = value.numel(), value.element_size()
        if self.base is not None:
            foreign = foreign or f"{path}.{name}".lstrip(".") not in self.base
        if foreign or value.requires_grad:
            self.delta_bytes += size * width
        trainable = 0 if foreign or not value.requires_grad else size
        delta = size if foreign else 0
        return replace(made, parameters=size, trainable=trainable, delta=delta, bytes=size * width)

    def listed(
        self, name: str, path: str, real: str, module: nn.Module, *, foreign: bool
    ) -> list[Branch]:
        """Return the branches of a module, or of a list's parts, those that are alike folded."""
        from torch import nn

        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            found: list[Branch] = []
            for key, part in module.named_children():
                inside = (f"{path}.{key}", f"{real}.{key}")
                found += self.listed(f"{name}.{key}", *inside, part, foreign=foreign)
            return list(_folded(name, found))
        if isinstance(module, nn.ParameterDict | nn.ParameterList):
            values = module.named_parameters(recurse=False)
            return [self.parameter(f"{name}.{k}", path, p, foreign) for k, p in values]
        made = self.branch(name, path, real, module, foreign=foreign)
        return [made] if made.parameters or made.shared or made.children else []


def _grown(branch: Branch, more: list[Branch]) -> Branch:
    """Return a branch with the figures of `more` added to its own, and they to its children."""
    sums = {
        key: getattr(branch, key) + sum(m.count * getattr(m, key) for m in more)
        for key in ("parameters", "trainable", "delta", "bytes")
    }
    return replace(branch, children=(*branch.children, *more), **sums)


def _folded(name: str, parts: list[Branch]) -> Iterator[Branch]:
    """Yield the parts of list `name`, those that are alike as one, where the first of them is."""
    alike: dict[Branch, list[str]] = {}
    for part in parts:
        number = part.name.removeprefix(f"{name}.")
        key = replace(part, name="") if number.isdigit() else part
        alike.setdefault(key, []).append(number)
    for part, numbers in alike.items():
        if part.name:
            yield part
        else:
            yield replace(part, name=f"{name}.{_ranges(numbers)}", count=len(numbers))


def _ranges(numbers: list[str]) -> str:
    """Write numbers that grow as `0-3,5,7-9`."""
    runs: list[tuple[int, int]] = []
    for number in map(int, numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
