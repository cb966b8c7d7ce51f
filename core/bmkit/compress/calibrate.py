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

from bmkit import model as models
from bmkit.compress.recording import REFUSALS, Odd, Recorder, Stop, leaves, mapped
from bmkit.errors import InputError, ResourceError
from bmkit.nn import walk
from bmkit.nn.hessian import add_products, mirror
from bmkit.runtime import experts
from bmkit.runtime.cpu.source import DTYPES
from bmkit.runtime.placed.load import empty
from bmkit.runtime.placed.origin import Origin

HELD_OUT = 8
"""One row of so many isn't calibrated on, but tells how good the result is."""
DEV_TEXTS = 24
"""Texts that are not trained on, at most: how often student and teacher agree is told of those."""


@dataclass
class Seen:
    """What went into a linear layer."""

    hessian: Tensor
    """float32 [inputs, inputs]: the mean of x·xᵀ; or its diagonal [inputs], if asked for that."""
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

    With `both` also the two of an encoder-decoder, one behind the other: the encoder reads the
    first half of each row, the decoder the rest. All that is outside of the stacks and the hidden
    states of all rows stay in memory: rows x tokens x width x 4 bytes, and what else blocks are
    called with, where that isn't the same for all rows. Raises InputError for a model that has no
    such stack or that goes through it otherwise than once, from the first to the last.
    """

    def __init__(
        self, path: Path, rows: Tensor, *, device: torch.device, both: bool = False
    ) -> None:
        self.path, self.rows, self.device = path, rows, device
        self.model = empty(path)
        self.origin = Origin(path, self.model)
        self.stacks = walk.stacks(self.model) if both else [walk.stack(self.model)]
        self.name = self.stacks[0][0]
        self.places = [f"{name}.{i}" for name, count in self.stacks for i in range(count)]
        """The names of all blocks."""
        self.count = len(self.places)
        self.stack: Any = self.model.get_submodule(self.name)
        self.heads = set(walk.output_heads(self.model))
        inside = tuple(f"{name}." for name, _ in self.stacks)
        tied: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if not name.startswith(inside) and name.rpartition(".")[0] not in self.heads:
                tied.setdefault(id(parameter), []).append(name)
        for names in tied.values():
            self._fill(*names)
        for name, owner in self.model.named_modules():
            for key, buffer in owner._buffers.items():
                if buffer is not None:
                    whole = f"{name}.{key}" if name else key
                    stored = self.origin.tensor(whole) if self.origin.holds(whole) else buffer
                    owner._buffers[key] = stored.to(device, buffer.dtype)
        self.model.eval().requires_grad_(False)
        experts.attach_stored(self.model, path)
        self.calls: dict[int, tuple[Any, Any]] = {}
        """What else than hidden states each block is called with, of the first row."""
        self.varied: dict[int, list[Tensor]] = {}
        """Of those tensors, by identity, the ones that each row has its own of."""
        self.marks: dict[int, tuple[int, int]] = {}
        """And the ones that an earlier block hands on: its number, and which of its outputs."""
        self.handed: dict[int, dict[int, Any]] = {}
        self.behind: int | None = None
        """The block that all rows have gone through already."""
        self.shapes: list[int | None] = []
        """How many tensors the blocks of each stack give beside hidden states; None: no tuple."""
        self.hidden = self._enter()

    def stored(self, name: str) -> str | None:
        """Return the name that a linear layer's weight has in the files; None if it is made."""
        return self.origin.plain.get(f"{name}.weight")

    def dtype(self, stored: str) -> torch.dtype:
        """Return the dtype of a tensor in the files."""
        return DTYPES[self.origin.files.tensors[stored].dtype]

    def _fill(self, *names: str) -> None:
        """Read a parameter, by its name or those of all that are tied to it."""
        stored = next((n for n in names if self.origin.holds(n)), None)
        if stored is None:  # as a pooler that was never trained
            return
        tensor = self.origin.tensor(stored)
        if tensor.is_floating_point():
            tensor = tensor.float()
        parameter = nn.Parameter(tensor.to(self.device), requires_grad=False)
        for name in names:
            owner, _, key = name.rpartition(".")
            self.model.get_submodule(owner)._parameters[key] = parameter

    @torch.no_grad()
    def _enter(self) -> Tensor:
        """Run what comes before the next stack; note how each of its blocks is called."""
        shapes = (None, 0, 1, 2, 3)
        # What a lone block gives was never looked at: it shows when the next stack is entered.
        alone = bool(self.shapes) and self.stacks[len(self.shapes) - 1][1] == 1
        for before in shapes if alone else self.shapes[-1:] or (None,):
            self.shapes[-1:] = [before] if self.shapes else []
            for shape in shapes:
                try:
                    return self._record(shape)
                except REFUSALS as exc:
                    reason = exc
        raise InputError(
            f"{type(self.model).__name__} doesn't go through {self.name} block by block: {reason}",
            hint="methods that need no data work on it",
        ) from reason

    def _record(self, shape: int | None) -> Tensor:
        at = len(self.shapes)
        first = sum(count for _, count in self.stacks[:at])
        recorders = [Recorder(block, shape) for block in self.stack]
        recorders[-1].last = True
        self.calls, self.varied = {}, {}
        self.marks = {
            id(mark): (first + i, k)
            for i, recorder in enumerate(recorders)
            for k, mark in enumerate(recorder.marks)
        }
        found = []
        stacks: list[Any] = [self.model.get_submodule(n) for n, _ in self.stacks]
        held = [list(stack) for stack in stacks]
        ends = self._players(at)
        try:
            for i, recorder in enumerate(recorders):
                self.stack[i] = recorder
            for number, row in enumerate(self.rows):
                for end in ends:
                    end.gives = self.hidden[number][None]
                for recorder in recorders:
                    recorder.calls = []
                with suppress(Stop):
                    self.model(**self._inputs(row))
                if any(len(r.calls) != 1 for r in recorders):
                    raise Odd("not every block is called once")
                start = recorders[0].calls[0][0]
                if any(r.calls[0][0] is not start for r in recorders):
                    raise Odd("something happens between two blocks")
                calls = {first + i: r.calls[0][1:] for i, r in enumerate(recorders)}
                self._note(number, calls)
                found.append(start[0])
        finally:
            for stack, blocks in zip(stacks, held, strict=True):
                for i, block in enumerate(blocks):
                    stack[i] = block
        self.shapes.append(shape)
        return torch.stack(found)

    def _inputs(self, row: Tensor) -> dict[str, Any]:
        takes = inspect.signature(self.model.forward).parameters
        more: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        config: Any = self.model.config
        return {**inputs(config, row.to(self.device)), **more}

    def _players(self, before: int) -> list[Recorder]:
        """Put something in the place of the blocks `before` a stack; return the last of each."""
        ends = []
        for (name, count), shape in zip(self.stacks[:before], self.shapes, strict=True):
            stack: Any = self.model.get_submodule(name)
            players = [Recorder(block, shape, notes=False) for block in stack]
            for i in range(count):
                stack[i] = players[i]
            ends.append(players[-1])
        return ends

    def _note(self, row: int, calls: dict[int, tuple[Any, Any]]) -> None:
        """Keep how blocks are called: once, and again what differs from the first row."""
        if not row:
            self.calls = calls
            met = {id(one) for call in calls.values() for one in leaves(call)}
            self.marks = {key: place for key, place in self.marks.items() if key in met}
            return
        done = set(self.marks)
        for number, call in calls.items():
            for one, other in zip(leaves(self.calls[number]), leaves(call), strict=True):
                if id(one) in done:
                    continue
                done.add(id(one))
                if id(one) in self.varied:
                    self.varied[id(one)].append(other)
                elif not torch.equal(one, other):
                    self.varied[id(one)] = [one] * row + [other]
        for some in self.varied.values():
            if len(some) != row + 1:
                raise Odd("rows are called in ways that don't compare")

    @torch.no_grad()
    def visit(self, skip: Collection[int] = ()) -> Iterator[Block]:
        """Yield the blocks in order; before the next one, the rows go through this one.

        Those to `skip` are left out, as if the model had them not.
        """
        number = -1
        for at, (stack, _) in enumerate(self.stacks):
            if at:
                self.name, self.stack = stack, self.model.get_submodule(stack)
                self.hidden = self._enter()
            for module in list(self.stack):
                number += 1
                if number not in skip:
                    yield from self._visit(number, module)

    def _visit(self, number: int, module: nn.Module) -> Iterator[Block]:
        prefix = self.places[number]
        names = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
        for name in names:
            self._fill(name)
        linears = {
            f"{prefix}.{name}": m for name, m in module.named_modules() if isinstance(m, nn.Linear)
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
        def own(tensor: Tensor) -> Any:
            if id(tensor) in self.marks:
                block, k = self.marks[id(tensor)]
                block = max(n for n in self.handed if n <= block)  # those skipped hand it on
                return self.handed[block][k]
            return self.varied[id(tensor)][row] if id(tensor) in self.varied else tensor

        args, kwargs = mapped(self.calls[number], own)
        module: Any = self.model.get_submodule(self.places[number])
        found = module(self.hidden[row][None], *args, **kwargs)
        if isinstance(found, tuple):
            self._hand_on(number, found[1:], first=not row)
            found = found[0]
        hidden: Tensor = found[0]
        return hidden

    def _hand_on(self, number: int, given: tuple[Any, ...], *, first: bool) -> None:
        """Keep what a block gives for those behind it. Raises InputError if rows differ in it."""
        wanted = {k: given[k] for block, k in self.marks.values() if block == number}
        if first:
            self.handed[number] = wanted
            for old in sorted(self.handed)[:-2]:
                del self.handed[old]
        for k, one in wanted.items():
            other = self.handed[number][k]
            if isinstance(one, Tensor) and not torch.equal(one, other):
                raise InputError(f"{self.places[number]} hands on what each row has another of")

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
    def observe(
        self, block: Block, names: Collection[str], *, whole: bool = True
    ) -> dict[str, Seen]:
        """Run the rows through a block; return what went into its linear layers `names`.

        Without `whole`, of the rows that are fitted to only the energy of each input. Layers with
        the same input share their statistics. What a block computes behind the last of them is left
        out, if the first row meets each of them once.
        """
        held = held_out(len(self.hidden))
        sums: dict[str, list[Tensor]] = {}
        counts: dict[str, list[int]] = {}
        leader: dict[str, str] = {}
        given: dict[int, tuple[Tensor, str]] = {}  # holds the tensors, so that ids stay theirs
        met: list[str] = []
        now, last = 0, False
        whole = whole or not held

        def add(name: str, inputs: Tensor) -> None:
            x = inputs.reshape(-1, inputs.shape[-1]).float()
            width = x.shape[1]
            if name not in sums:
                shapes = [(width, width) if whole else (width,), (width, width)]
                sums[name] = [torch.zeros(shape, device=x.device) for shape in shapes]
                counts[name] = [0, 0]
            if now or whole:
                add_products(sums[name][now], x)
            else:
                sums[name][now] += x.square().sum(0)
            counts[name][now] += len(x)

        def hook(name: str) -> Any:
            def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                _, same = given.setdefault(id(args[0]), (args[0], name))
                if leader.setdefault(name, same) == name:
                    add(name, args[0])
                met.append(name)
                if last and len(met) == len(names):
                    raise Stop

            return take

        layers = {n: self.model.get_submodule(n) for n in names}
        hooks = [m.register_forward_pre_hook(hook(n)) for n, m in layers.items()]
        try:
            for row in range(len(self.hidden)):
                now = int(row in held)
                with suppress(Stop):
                    self._run(block.number, row)
                last = last if row else sorted(met) == sorted(names)
                given.clear()
                met.clear()
        finally:
            for handle in hooks:
                handle.remove()
        missed = next((n for n in names if not counts.get(leader.get(n, ""), [0])[0]), None)
        if missed:  # of experts
            raise ResourceError(
                f"no calibration token reaches {missed}", hint="raise data.tokens, or exclude it"
            )
        means: dict[str, Seen] = {}
        for name, (fitted, apart) in sums.items():
            tokens, others = counts[name]
            for total in (fitted, apart):
                if total.ndim == 2:
                    mirror(total)
            fitted /= max(tokens, 1)
            apart = apart / others if others else fitted
            means[name] = Seen(fitted, apart, tokens)
        return {name: means[leader[name]] for name in names}


def inputs(config: Any, row: Tensor) -> dict[str, Tensor]:
    """Return what a model is called with, for a row of token ids [tokens].

    An encoder-decoder reads the first half, and is to say the rest.
    """
    whole = row[None]
    if not config.is_encoder_decoder:
        return {"input_ids": whole}
    half = len(row) // 2
    said = models.behind_start(config, whole[:, half:-1])
    return {"input_ids": whole[:, :half], "decoder_input_ids": said}


def dev_of(texts: int) -> list[int]:
    """Return which of so many texts nothing is learned from: the last of each eight, 24 at most."""
    return sorted(held_out(texts))[:DEV_TEXTS]


def held_out(rows: int) -> set[int]:
    """Return which of so many rows are not calibrated on: the last of each HELD_OUT, or of few."""
    return set(range(HELD_OUT - 1, rows, HELD_OUT)) or set(range(rows)[1:][-1:])


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
