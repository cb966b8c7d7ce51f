"""Activations that follow from others: kept as how to compute them, and not as values.

A norm's output, an activation function's, and the product of a gated feed-forward are as large as
what they are made of, cheap to make, and what they are made of is kept anyway. Where autograd wants
to keep one, it gets a note, and the backward pass computes the value again: the same bits. Products
with weights are never computed again, in which this differs from gradient checkpointing (Training
Deep Nets with Sublinear Memory Cost, arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from bmkit.errors import InputError
from bmkit.train import activations
from bmkit.train.checkpointing import blocks_of

GATED = (("act_fn", "up_proj", "down_proj"), ("act", "wi_1", "wo"))
"""What families call the function, the matrix beside it, and the one that reads their product."""


Loss = Callable[[Any, dict[str, Tensor]], tuple[Tensor, int]]


@contextmanager
def noted(model: Any, loss: Loss, batch: Callable[[], dict[str, Tensor]]) -> Iterator[Loss]:
    """Give a `loss` whose forward passes keep notes; what can be noted is learned from `batch`.

    `model` is put into training mode.
    """
    try:
        blocks = blocks_of(model)
    except InputError:
        blocks = []
    notes = Replay(model.train(), blocks)

    def run(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        with notes.kept():
            return loss(model, batch)

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # as counters of steps
    try:
        notes.learn(lambda: loss(model, batch()))
        for buffer, before in buffers:
            buffer.copy_(before)
        del buffers
        yield run
    finally:
        notes.close()


class Note:
    """How a tensor is computed again. The value is held while other uses of it are to come."""

    def __init__(
        self, made: Tensor, make: Callable[[], Tensor], inputs: tuple[Tensor, ...]
    ) -> None:
        self.storage = StorageWeakRef(made.untyped_storage())  # type: ignore[no-untyped-call]
        self.numel, self.version = made.numel(), made._version
        self.make, self.inputs = make, [(t, t._version) for t in inputs]
        self.uses = 0
        self.value: Tensor | None = None

    def stands_for(self, tensor: Tensor) -> bool:
        """Tell whether `tensor` is the whole that it was made for, unchanged."""
        whole = tensor.numel() == self.numel and tensor.is_contiguous()
        return whole and tensor._version == self.version

    @property
    def sound(self) -> bool:
        """Tell whether what it is computed from is what it was."""
        return all(tensor._version == version for tensor, version in self.inputs)

    @torch.no_grad()
    def peek(self) -> Tensor:
        """Return the value."""
        if self.value is not None:
            return self.value
        found = self.make()
        if self.uses:
            self.value = found
        return found

    def take(self, shape: torch.Size) -> Tensor:
        """Return the value for one of its uses."""
        found = self.peek()
        self.uses -= 1
        if self.uses <= 0:
            self.value = None
        return found.view(shape)


class Replay:
    """Notes for one model's forward passes."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module] = ()) -> None:
        self.notes: dict[int, Note] = {}
        """By storage, of the block that is being run: notes hold what they are made of."""
        self.listening = self.sure = False
        self.odd: set[nn.Module] = set()
        """Modules whose outputs are no function of what was seen to go in."""
        self.known: set[nn.Module] = set()
        """Modules whose outputs were made again, to the same bits."""
        self.trial: list[tuple[nn.Module, Note]] = []
        self.hooks: list[Any] = []
        for module in model.modules():
            if _is_cheap(module):
                self.hooks.append(module.register_forward_hook(self._note))
        for block in blocks:
            self.hooks.append(block.register_forward_hook(lambda *_: self.notes.clear()))
        for module in model.modules():
            for names in GATED:
                parts = [getattr(module, name, None) for name in names]
                found = [part for part in parts if isinstance(part, nn.Module)]
                if len(found) == len(names):
                    self._watch(module, *found)

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Let autograd keep notes for what is computed in the block, once `learn` was there."""
        self.listening = True
        try:
            if self.sure:
                with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                    yield
            else:
                yield
        finally:
            self.listening = False
            self.notes.clear()

    def learn(self, run: Callable[[], object]) -> None:
        """Find out, in one forward pass whose graph is dropped, which notes are true."""
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: torch.empty(0))
        with torch.enable_grad(), hooks, self.kept():
            run()
            for module, note in self.trial:
                self.known.add(module)
                if not note.sound:
                    self.odd.add(module)
        self.trial.clear()
        self.sure = True

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (self.listening and torch.is_grad_enabled()) or module in self.odd:
            return
        plain = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        if plain and output.requires_grad:
            given = args[0].detach()
            self._put(module, output, lambda: module.forward(given), (given,))
        elif not plain:
            self.odd.add(module)

    def _put(
        self,
        module: nn.Module,
        made: Tensor,
        make: Callable[[], Tensor],
        inputs: tuple[Tensor, ...],
    ) -> None:
        note = Note(made, make, inputs)
        if not self.sure:
            if not torch.equal(note.peek(), made):
                self.odd.add(module)
            self.trial.append((module, note))
        elif made.is_contiguous() and module in self.known:
            self.notes[note.storage.cdata] = note

    def _watch(
        self, whole: nn.Module, act: nn.Module, beside: nn.Module, reader: nn.Module
    ) -> None:
        seen: dict[str, Tensor] = {}

        def put(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if self.listening and torch.is_grad_enabled() and isinstance(output, Tensor):
                    seen[name] = output.detach()

            return hook

        def product(_: nn.Module, args: tuple[Any, ...]) -> None:
            parts = [seen.pop(name, None) for name in ("act", "beside")]
            left, right = parts
            if left is None or right is None or not args or whole in self.odd:
                return
            if left.shape != args[0].shape or right.shape != args[0].shape:
                self.odd.add(whole)
                return
            of_left = self.notes.get(_cdata(left))
            if of_left is not None and of_left.stands_for(left):
                self._put(whole, args[0], lambda: of_left.peek() * right, (right,))
            elif not self.sure:
                self._put(whole, args[0], lambda: left * right, (left, right))

        self.hooks += [
            act.register_forward_hook(put("act")),
            beside.register_forward_hook(put("beside")),
            reader.register_forward_pre_hook(product),
        ]

    def _pack(self, tensor: Tensor) -> Tensor | tuple[Note, torch.Size] | None:
        note = self.notes.get(_cdata(tensor))
        if note is not None and note.stands_for(tensor):
            note.uses += 1
            return note, tensor.shape
        return activations.tell(tensor)


def _unpack(packed: Tensor | tuple[Note, torch.Size]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    note, shape = packed
    return note.take(shape)


def _is_cheap(module: nn.Module) -> bool:
    """Tell whether a module is a norm or an activation function, and none with dropout."""
    if next(module.children(), None) is not None:
        return False
    kind = type(module)
    function = kind.__module__ in ("torch.nn.modules.activation", "transformers.activations")
    return function or kind.__name__.endswith(("Norm", "LayerNorm", "RMSNorm"))


def _cdata(tensor: Tensor) -> int:
    found: int = tensor.untyped_storage()._cdata
    return found
