"""Hidden states of the frozen first blocks, computed once for each row and kept on disk.

When all that is trained lies in the last blocks and behind them, the first blocks say the same
about a row in each epoch. From the second one on they are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmkit.data.chat import Example
from bmkit.errors import InputError
from bmkit.nn import walk
from bmkit.train.checkpointing import restore
from bmkit.train.stored_states import StoredStates

Loss = Callable[[Any, dict[str, Tensor]], tuple[Tensor, int]]
Collate = Callable[[Sequence[Example]], dict[str, Tensor]]


def numbered(examples: Sequence[Example]) -> list[Example]:
    """Return `examples`, each with its number as `row`."""
    return [{**example, "row": [i]} for i, example in enumerate(examples)]


def with_rows(collate: Collate) -> Collate:
    """Return `collate` with `row` and `row_tokens` [batch] beside what it makes of the rows.

    It must make one row of each example, with padding on the right.
    """

    def collated(examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = collate(examples)
        batch["row"] = torch.tensor([e["row"][0] for e in examples])
        batch["row_tokens"] = torch.tensor([len(e["input_ids"]) for e in examples])
        return batch

    return collated


class FrozenPrefix:
    """The first blocks of a model, that are frozen, and what they say about each row.

    `around` a loss, it keeps the states of rows that it sees for the first time, as `dtype` (that
    of the model's own arithmetic if not given; other ones round, in each epoch alike), and leaves
    the blocks out for batches whose rows it knows. `limit` bounds the bytes on disk: rows beyond it
    run through all blocks. Memory: the states of one batch. Raises InputError with the reason if
    `cacheable` gives one.
    """

    def __init__(
        self,
        model: Any,
        folder: Path,
        *,
        limit: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        reason = cacheable(model)
        if reason is not None:
            raise InputError(
                f"the frozen blocks' states can't be kept: {reason}",
                hint="train without keeping them",
            )
        self.blocks = _blocks(model)
        self.count = frozen_blocks(model)
        self.dtype = dtype
        self.states = StoredStates(folder, limit=limit)
        self.skipped = 0
        """Batches that ran through the last blocks only."""

    def around(self, loss: Loss) -> Loss:
        """Return `loss` for batches of `with_rows`, with the first blocks left out where it can."""

        def lean(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
            batch = dict(batch)
            rows = batch.pop("row").tolist()
            tokens = batch.pop("row_tokens").tolist()
            known = all(self.states.tokens(row) == n for row, n in zip(rows, tokens, strict=True))
            with self._known(rows) if known else self._new(rows, tokens):
                return loss(model, batch)

        return lean

    def close(self) -> None:
        """Remove the files."""
        self.states.remove()

    @contextmanager
    def _known(self, rows: list[int]) -> Iterator[None]:
        """Give the block behind the frozen ones their states, and run none of them."""
        self.skipped += 1
        states = [self.states.read(row) for row in rows]
        with injected(self.blocks[: self.count], states):
            yield

    @contextmanager
    def _new(self, rows: list[int], tokens: list[int]) -> Iterator[None]:
        """Keep what the frozen blocks say, and let the model go on with what is kept."""

        def keep(_: nn.Module, __: Any, hidden: Tensor) -> Tensor:
            kept = hidden.detach().to(self.dtype or hidden.dtype)
            if not kept.isfinite().all():  # float16 ends at 65504
                kept = hidden.detach()
            for state, row, count in zip(kept, rows, tokens, strict=True):
                self.states.write(row, state[:count])
            return kept.to(hidden.dtype)

        handle = self.blocks[self.count - 1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def injected(blocks: Sequence[Any], states: Sequence[Tensor]) -> Iterator[None]:
    """Let the first of `blocks` say `states` (one [time, width] a row), and others hand them on.

    What the model makes for its blocks besides (masks, positions) stays its own.
    """

    def first(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        padded = torch.zeros_like(hidden, requires_grad=False)
        for i, state in enumerate(states):
            padded[i, : len(state)] = state.to(hidden.device, hidden.dtype)
        return padded

    def other(*args: Any, **kwargs: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    before = [vars(block).get("forward") for block in blocks]
    for i, block in enumerate(blocks):
        block.forward = other if i else first
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            restore(block, forward)


def frozen_blocks(model: Any) -> int:
    """Return how many of the model's first blocks hold nothing that is trained."""
    count = 0
    for block in _blocks(model):
        if any(p.requires_grad for p in block.parameters()):
            break
        count += 1
    return count


def _blocks(model: Any) -> list[Any]:
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(core.get_submodule(walk.stack(core)[0]))


def cacheable(model: Any) -> str | None:
    """Return why the states of the model's frozen first blocks can't be kept, or None if they can.

    A few tokens are run through the model: nothing trained may have a part in the states, they must
    be the same each time, and the model must say the same with the states in the blocks' place.
    """
    try:
        blocks = _blocks(model)
    except InputError as exc:
        return str(exc)
    count = frozen_blocks(model)
    if not count:
        return "the first block is trained"
    if not any(p.requires_grad for p in model.parameters()):
        return "nothing is trained"
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    if any("forward" in vars(block) for block in blocks[:count]):
        return "something else stands in for the first blocks"
    if getattr(core.config.get_text_config(), "num_kv_shared_layers", 0):
        return "later blocks use keys and values of earlier ones"
    if any(getattr(module, "layerdrop", 0) for module in core.modules()):
        return "blocks are dropped at random (layerdrop)"
    modes = [(module, module.training) for module in model.modules()]
    try:
        return _probe(model, blocks[:count])
    finally:
        for module, training in modes:
            module.training = training


def _probe(model: Any, blocks: list[Any]) -> str | None:
    """Run the model as it trains, twice, then as it predicts, with its blocks and without them."""
    seen: list[Any] = []
    handle = blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    try:
        model.train()
        for _ in range(2):
            _outputs(model)
        model.eval()
        wanted = _outputs(model)
        _outputs(model, other=True)  # whatever else blocks hand on, it is that of these tokens now
    finally:
        handle.remove()
    first, second, states, _ = seen
    if not isinstance(states, Tensor) or states.shape[:2] != (2, TOKENS):
        return "the blocks say more than one state a token"
    if states.requires_grad:
        return f"something in front of block {len(blocks)} is trained"
    if not torch.equal(first, second):
        return f"there is dropout in front of block {len(blocks)}; set it to 0"
    with injected(blocks, list(states)):
        found = _outputs(model)
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-5):
        return "later blocks need more of the first ones than their states"
    return None


TOKENS = 8
"""Tokens of each of the two rows that are run through a model to look at it."""


def _outputs(model: Any, *, other: bool = False) -> Tensor:
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    vocabulary = core.config.get_text_config().vocab_size
    ids = torch.arange(2 * TOKENS, device=model.device).view(2, TOKENS) % vocabulary
    ids = (ids + 7) % vocabulary if other else ids
    out: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    return out.detach()
