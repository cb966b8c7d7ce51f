"""Block by block: what goes into each linear layer, behind blocks that are compressed already."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmkit.errors import InputError, ResourceError
from bmkit.nn import walk
from bmkit.nn.hessian import add_products, mirror
from bmkit.runtime.cpu.source import DTYPES
from bmkit.runtime.placed.load import empty
from bmkit.runtime.placed.origin import Origin

HELD_OUT = 8
"""One row of so many isn't calibrated on, but tells how good the result is."""


@dataclass
class Seen:
    """What went into a linear layer."""

    hessian: Tensor
    """float32 [inputs, inputs]: the mean of x·xᵀ."""
    held_out: Tensor
    """The same, of the rows that nothing may be fitted to."""
    tokens: int


@dataclass
class Block:
    """One block of the stack, in float32."""

    number: int
    module: nn.Module
    linears: dict[str, nn.Linear]
    """By the names that the model gives them."""


class Blocks:
    """A model's stack of blocks on rows of token ids [rows, tokens], one block in memory at a time.

    All that is outside of the stack and the hidden states of all rows stay in memory: rows x tokens
    x width x 4 bytes. Raises InputError for a model that has no such stack or that goes through it
    otherwise than once, from the first to the last.
    """

    def __init__(self, path: Path, rows: Tensor, *, device: torch.device) -> None:
        self.path, self.rows, self.device = path, rows, device
        self.model = empty(path)
        self.origin = Origin(path, self.model)
        self.name, self.count = walk.stack(self.model)
        self.stack: Any = self.model.get_submodule(self.name)
        self.heads = set(walk.output_heads(self.model))
        for name, _ in list(self.model.named_parameters()):
            outside = not name.startswith(f"{self.name}.")
            if outside and name.rpartition(".")[0] not in self.heads:
                self._fill(name)
        for owner in self.model.modules():
            for key, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[key] = buffer.to(device)
        self.model.eval().requires_grad_(False)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.behind: int | None = None
        """The block that all rows have gone through already."""
        self.hidden = self._enter()

    def stored(self, name: str) -> str | None:
        """Return the name that a linear layer's weight has in the files; None if it is made."""
        return self.origin.plain.get(f"{name}.weight")

    def dtype(self, stored: str) -> torch.dtype:
        """Return the dtype of a tensor in the files."""
        return DTYPES[self.origin.files.tensors[stored].dtype]

    def _fill(self, name: str) -> None:
        if name in self.origin.missing:  # as a pooler that was never trained
            return
        owner, _, key = name.rpartition(".")
        tensor = self.origin.tensor(name)
        if tensor.is_floating_point():
            tensor = tensor.float()
        parameter = nn.Parameter(tensor.to(self.device), requires_grad=False)
        self.model.get_submodule(owner)._parameters[key] = parameter

    @torch.no_grad()
    def _enter(self) -> Tensor:
        """Run what comes before the stack; note how each block is called."""
        for whole in (False, True):
            try:
                return self._record(as_tuple=whole)
            except (_Odd, IndexError, AttributeError, TypeError, ValueError) as exc:
                reason = exc
        raise InputError(
            f"{type(self.model).__name__} doesn't go through {self.name} block by block: {reason}",
            hint="methods that need no data work on it",
        )

    def _record(self, *, as_tuple: bool) -> Tensor:
        found = []
        takes = inspect.signature(self.model.forward).parameters
        more = {"use_cache": False} if "use_cache" in takes else {}
        blocks = list(self.stack)
        recorders = [_Recorder(b, as_tuple, last=i == self.count - 1) for i, b in enumerate(blocks)]
        try:
            for i, recorder in enumerate(recorders):
                self.stack[i] = recorder
            for row in self.rows:
                for recorder in recorders:
                    recorder.calls = []
                with suppress(_Stop):
                    self.model(input_ids=row[None].to(self.device), **more)
                if any(len(r.calls) != 1 for r in recorders):
                    raise _Odd("not every block is called once")
                first = recorders[0].calls[0][0]
                if any(r.calls[0][0] is not first for r in recorders):
                    raise _Odd("something happens between two blocks")
                found.append(first[0])
        finally:
            for i, block in enumerate(blocks):
                self.stack[i] = block
        self.calls = [(r.calls[0][1], r.calls[0][2]) for r in recorders]
        return torch.stack(found)

    @torch.no_grad()
    def visit(self, skip: Collection[int] = ()) -> Iterator[Block]:
        """Yield the blocks in order; before the next one, the rows go through this one.

        Those to `skip` are left out, as if the model had them not.
        """
        for number in range(self.count):
            if number in skip:
                continue
            prefix = f"{self.name}.{number}"
            module = self.stack[number]
            names = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
            for name in names:
                self._fill(name)
            linears = {
                f"{prefix}.{name}": m
                for name, m in module.named_modules()
                if isinstance(m, nn.Linear)
            }
            yield Block(number, module, linears)
            for i in range(len(self.hidden) if self.behind != number else 0):
                self.hidden[i] = self._run(number, i)
            for name in names:
                owner, _, key = name.rpartition(".")
                empty_one = torch.empty(0, device="meta")
                self.model.get_submodule(owner)._parameters[key] = nn.Parameter(
                    empty_one, requires_grad=False
                )

    def _run(self, number: int, row: int) -> Tensor:
        args, kwargs = self.calls[number]
        found = self.stack[number](self.hidden[row][None], *args, **kwargs)
        hidden: Tensor = found[0] if isinstance(found, tuple) else found
        return hidden[0]

    @torch.no_grad()
    def through(self, block: Block, row: int = 0) -> Tensor:
        """Let a row through a block: [tokens, width]."""
        return self._run(block.number, row)

    @torch.no_grad()
    def largest(self, block: Block, names: Collection[str]) -> dict[str, Tensor]:
        """Run the rows through a block; return the inputs' largest sizes of its layers `names`."""
        found: dict[str, Tensor] = {}

        def hook(name: str) -> Any:
            def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                own = args[0].reshape(-1, args[0].shape[-1]).abs().amax(0)
                found[name] = torch.maximum(found[name], own) if name in found else own

            return take

        hooks = [block.linears[n].register_forward_pre_hook(hook(n)) for n in names]
        try:
            for row in range(len(self.hidden)):
                self._run(block.number, row)
        finally:
            for handle in hooks:
                handle.remove()
        return found

    @torch.no_grad()
    def outputs(self, block: Block, *, go_on: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Yield each row's number, and what a block makes of it: [tokens, width].

        With `go_on` the rows are behind this block then, and `visit` needn't run them again.
        """
        self.behind = block.number if go_on else None
        for row in range(len(self.hidden)):
            found = self._run(block.number, row)
            yield row, found
            if go_on:
                self.hidden[row] = found

    @torch.no_grad()
    def observe(self, block: Block, names: Collection[str]) -> dict[str, Seen]:
        """Run the rows through a block; return what went into its linear layers `names`.

        Layers with the same input share their statistics. What a block computes behind the last of
        them is left out, if the first row meets each of them once.
        """
        held = held_out(len(self.hidden))
        sums: dict[str, list[Tensor]] = {}
        counts: dict[str, list[int]] = {}
        leader: dict[str, str] = {}
        given: dict[int, tuple[Tensor, str]] = {}  # holds the tensors, so that ids stay theirs
        met: list[str] = []
        now, last = 0, False

        def add(name: str, inputs: Tensor) -> None:
            x = inputs.reshape(-1, inputs.shape[-1]).float()
            width = x.shape[1]
            if name not in sums:
                sums[name] = [torch.zeros(width, width, device=x.device) for _ in range(2)]
                counts[name] = [0, 0]
            add_products(sums[name][now], x)
            counts[name][now] += len(x)

        def hook(name: str) -> Any:
            def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                _, same = given.setdefault(id(args[0]), (args[0], name))
                if leader.setdefault(name, same) == name:
                    add(name, args[0])
                met.append(name)
                if last and len(met) == len(names):
                    raise _Stop

            return take

        layers = {n: self.model.get_submodule(n) for n in names}
        hooks = [m.register_forward_pre_hook(hook(n)) for n, m in layers.items()]
        try:
            for row in range(len(self.hidden)):
                now = int(row in held)
                with suppress(_Stop):
                    self._run(block.number, row)
                last = last if row else sorted(met) == sorted(names)
                given.clear()
                met.clear()
        finally:
            for handle in hooks:
                handle.remove()
        if missed := next((n for n in names if n not in leader), None):  # of experts
            raise ResourceError(
                f"no calibration token reaches {missed}", hint="raise data.tokens, or exclude it"
            )
        means: dict[str, Seen] = {}
        for name, (fitted, apart) in sums.items():
            tokens, others = counts[name]
            mirror(fitted)
            mirror(apart)
            fitted /= max(tokens, 1)
            apart = apart / others if others else fitted
            means[name] = Seen(fitted, apart, tokens)
        return {name: means[leader[name]] for name in names}


def held_out(rows: int) -> set[int]:
    """Return which of so many rows are not calibrated on: the last of each HELD_OUT."""
    return set(range(HELD_OUT - 1, rows, HELD_OUT))


def pack_rows(texts: Sequence[Sequence[int]], length: int, most: int) -> Tensor:
    """Return texts of token ids one after the other as rows [rows, length], `most` tokens in all.

    What is left over at the end is dropped; if all is shorter than a row, there is one short row.
    Raises InputError if there are fewer than two tokens.
    """
    whole: list[int] = []
    for text in texts:
        whole += text
        if len(whole) >= most:
            break
    del whole[most:]
    if len(whole) < 2:
        raise InputError("there is no text to calibrate on")
    length = min(length, len(whole))
    count = len(whole) // length
    return torch.tensor(whole[: count * length]).reshape(count, length)


class _Stop(Exception):
    """All is known that was asked for."""


class _Odd(Exception):
    """The blocks aren't called one after the other."""


class _Recorder(nn.Module):
    """Stands for a block: notes what it is called with, and hands it on."""

    def __init__(self, block: nn.Module, as_tuple: bool, *, last: bool) -> None:
        super().__init__()
        self.__dict__["block"] = block  # no submodule: its parameters are not there
        self.as_tuple, self.last = as_tuple, last
        self.calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise _Odd("a block's first input is no [rows, tokens, width]")
        self.calls.append((hidden, args[1:], kwargs))
        if self.last:
            raise _Stop
        return (hidden,) if self.as_tuple else hidden
