"""Trained soft tokens: rows behind the vocabulary, that may stand anywhere in a prompt.

The model's table of tokens stays as it is, and so does a head that is tied to it: ids behind the
vocabulary are looked up in a small table of their own (prompt tuning, arXiv 2104.08691; mixed
templates, arXiv 2111.01998). No head ever says one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bmkit.deltas import soft_encoders
from bmkit.deltas.held import base_of
from bmkit.deltas.modules import WRAPPED
from bmkit.deltas.soft_encoders import Way
from bmkit.errors import InputError, RecipeError
from bmkit.prompting.encode import SoftRow

NAME = "bmkit_soft_rows"
"""What a model calls its rows, which are a module of it."""
ROWS = 4096
"""How many rows of a table are widened at a time."""


class SoftRows(nn.Module):
    """Trainable rows of a table of tokens; their ids begin at `start`."""

    def __init__(
        self, start: int, values: Tensor, rows: Sequence[SoftRow], encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.start, self.about = start, tuple(rows)
        self.values = nn.Parameter(values)  # [rows, width], in float32 at least
        self.encoder = encoder

    def forward(self) -> Tensor:
        """Return the rows [rows, width], as the model reads them."""
        if self.encoder is None:
            return self.values
        added: Tensor = self.encoder(self.values)
        return self.values + added

    def settle(self) -> None:
        """Let the rows be what their encoder has made of them, and the encoder be gone."""
        with torch.no_grad():
            self.values.copy_(self())
        self.encoder = None

    def embed(
        self, module: nn.Embedding, forward: Callable[..., Tensor], ids: Tensor, *more: Any
    ) -> Tensor:
        """Return what `forward` says of `ids`, with the rows in the places of trained tokens."""
        soft = ids >= self.start
        found = forward(ids.masked_fill(soft, 0), *more)
        numbers = (ids - self.start).masked_fill(~soft, 0)
        own = _scaled(module, nn.functional.embedding(numbers, self().to(module.weight.dtype)))
        return torch.where(soft.unsqueeze(-1), own.to(found.dtype), found)


def add(
    model: Any,
    rows: Sequence[SoftRow],
    *,
    seed: int = 0,
    way: Way = "none",
    hidden_size: int | None = None,
) -> SoftRows:
    """Give a model the rows of a template (`Encoder.soft_rows`), to be trained; return them.

    A row begins as its token's, or is drawn as if it were of the vocabulary. With a `way`, an
    encoder works on them meanwhile (see `soft_encoders`). Nothing else of the model is trained or
    frozen by this. Deltas on the table of tokens must be there before. Raises RecipeError if the
    model has rows already, or its table of tokens isn't one.
    """
    table = table_of(model)
    values = initial(table.weight, [() if r.token is None else (r.token,) for r in rows], seed)
    made = soft_encoders.encoder(way, values.shape[1], hidden_size, seed)
    soft = SoftRows(table.num_embeddings, values, rows, made if made is None else made.to(values))
    attach(model, soft)
    return soft


def attach(model: Any, soft: SoftRows) -> None:
    """Let a model read rows. Raises RecipeError as `add` does."""
    base = base_of(model)
    if of(base) is not None:
        raise RecipeError("the model has trained tokens already")
    found = list(_tables(base))
    for module, table in found:
        if table.num_embeddings != soft.start or table.embedding_dim != soft.values.shape[1]:
            raise RecipeError(
                f"trained tokens of width {soft.values.shape[1]} behind {soft.start} others don't "
                f"fit a table of {table.num_embeddings} x {table.embedding_dim}"
            )
        vars(module)["forward"] = partial(soft.embed, table, module.forward)
    base.add_module(NAME, soft)


def detach(model: Any) -> SoftRows:
    """Take a model's rows off, and return them. Raises InputError if it has none."""
    base = base_of(model)
    soft = require(base)
    for module in base.modules():
        there = vars(module).get("forward")
        if isinstance(there, partial) and getattr(there.func, "__self__", None) is soft:
            before = there.args[1]
            if getattr(before, "__func__", None) is type(module).forward:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = before
    delattr(base, NAME)
    return soft


def of(model: Any) -> SoftRows | None:
    """Return a model's rows, or None."""
    found = base_of(model)._modules.get(NAME)
    return found if isinstance(found, SoftRows) else None


def require(model: Any) -> SoftRows:
    """Return a model's rows. Raises InputError if it has none."""
    if (soft := of(model)) is None:
        raise InputError("the model has no trained tokens")
    return soft


def table_of(model: Any) -> nn.Embedding:
    """Return a model's table of tokens, the encoder's if it has one.

    Raises RecipeError if there is none, or it does more than look rows up and scale them.
    """
    return next(_tables(base_of(model)))[1]


def tables_of(model: Any) -> list[nn.Embedding]:
    """Return all of a model's tables of tokens: an encoder's and a decoder's may be two."""
    return [table for _, table in _tables(base_of(model))]


@torch.no_grad()
def initial(table: Tensor, starts: Sequence[Sequence[int]], seed: int = 0) -> Tensor:
    """Return what rows begin as [rows, width], in float32 at least.

    Each is the mean of the rows of its tokens in `table` [vocabulary, width]; without tokens it is
    drawn from a normal distribution with the mean and the deviation of each column.
    """
    dtype = torch.promote_types(table.dtype, torch.float32)
    rows = torch.empty(len(starts), table.shape[1], dtype=dtype)
    if not all(starts):
        mean, deviation = _moments(table)
        draw = torch.Generator().manual_seed(seed)
    for row, tokens in zip(rows, starts, strict=True):
        if tokens:
            row.copy_(table[list(tokens)].to(dtype).mean(0))
        else:
            row.copy_(mean + deviation * torch.randn(len(mean), generator=draw, dtype=mean.dtype))
    return rows.to(table.device)


def _moments(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and deviation of each column, in float64; memory: some thousand rows."""
    total = table.new_zeros(2, table.shape[1], dtype=torch.float64)
    for low in range(0, len(table), ROWS):
        wide = table[low : low + ROWS].double()
        total += torch.stack((wide.sum(0), wide.square().sum(0)))
    mean, square = (total / len(table)).cpu()
    return mean, (square - mean.square()).clamp_min(0).sqrt()


def _tables(base: Any) -> Iterator[tuple[nn.Module, nn.Embedding]]:
    """Yield the modules that look tokens up, and the tables in them: two in an encoder-decoder."""
    halves = [base]
    if base.config.is_encoder_decoder:
        halves = [base.get_encoder(), base.get_decoder()]
    seen: set[int] = set()
    for half in halves:
        module = getattr(half, "get_input_embeddings", lambda: None)()
        table = module
        while inside := next((w for w in WRAPPED if w in getattr(table, "_modules", ())), None):
            table = getattr(table, inside)
        if not isinstance(module, nn.Module) or not isinstance(table, nn.Embedding):
            kind = type(table).__name__
            raise RecipeError(
                f"soft tokens need a plain table of tokens, and the model's is {kind}"
            )
        if id(module) not in seen:
            seen.add(id(module))
            _require_plain(table)
            yield module, table


@torch.no_grad()
def _require_plain(table: nn.Embedding) -> None:
    ids = torch.arange(min(2, table.num_embeddings), device=table.weight.device)
    if not torch.equal(type(table).forward(table, ids), _scaled(table, table.weight[ids])):
        raise _refused(f"{type(table).__name__} does more than looking them up")


def _refused(why: str) -> RecipeError:
    hint = "prefix, prompt and p_tuning deltas need none"
    return RecipeError(f"soft tokens need a plain table of tokens: {why}", hint=hint)


def _scaled(table: nn.Embedding, rows: Tensor) -> Tensor:
    """Return rows as the table gives them: some are scaled."""
    scale = getattr(table, "embed_scale", None)
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
