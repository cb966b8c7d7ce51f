"""A matrix in a slab of packed weights, and the modules that compute with it in place of dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bmkit.runtime.cpu import block as kernels
from bmkit.runtime.cpu.dots import (
    BFLOAT16,
    EIGHTS,
    FLOAT16,
    FLOAT32,
    INT4_ZERO,
    INT8,
    WITH_ZERO,
)
from bmkit.runtime.cpu.pack import Shape

FEW = 32
"""Up to so many tokens a CPU multiplies with packed rows; more are worth unpacking them for."""
OUTLIER = 6.0
"""Inputs larger than this are left out of rounding."""
CHUNK_BYTES = 16 * 2**20
"""A larger matrix is unpacked in parts of this size, where only its product is wanted."""


FLOATS = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}


@dataclass(frozen=True)
class Rounding:
    """How the inputs of a layer are rounded to 8 bits: by one scale, or each token by its own."""

    scale: float | None = None

    def values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return whole numbers and scales of float32 `x` [tokens, inputs]; zeros stay zero."""
        if self.scale is not None:
            step = torch.full((1, 1), self.scale, device=x.device)
            return (x / step).round_().clamp_(-128, 127), step
        largest = x.abs().amax(1, keepdim=True)
        step = (largest / 127).where(largest > 0, torch.ones_like(largest))
        return (x / step).round_().clamp_(-127, 127), step

    def rounded(self, x: Tensor) -> Tensor:
        """Return `x` [..., inputs], rounded; gradients go through as if it weren't."""
        values, step = self.values(x.detach().float().reshape(-1, x.shape[-1]))
        found = (values * step).reshape(x.shape).to(x.dtype)
        return x + (found - x.detach()) if x.requires_grad else found


class Matrix:
    """A matrix [rows, inputs] whose bytes lie in a slab, while there is one: `slab` is set then.

    `m` says where in the slab, in the numbers of `cpu.block`; int4 values of 32 inputs are 16
    bytes, the low halves first.
    """

    def __init__(self, shape: Shape, m: np.ndarray, dtype: torch.dtype, device: torch.device):
        self.shape, self.m, self.dtype, self.device = shape, m, dtype, device
        self.slab: Tensor | None = None
        self.raw: np.ndarray | None = None
        self.apart_bias: Tensor | None = None
        """The bias, where the matrix lies in a file and the bias does not."""
        self.w8a8 = False
        """Whether the inputs of products are rounded to int8 too, but for outliers."""
        self.rounding: Rounding | None = None
        """How the checkpoint wants the inputs rounded."""
        self.hold: Callable[[], AbstractContextManager[None]] = nullcontext
        """Brings the slab for a while, where it is streamed apart from its module."""

    def bind(self, slab: Tensor | None) -> None:
        """Set the slab, uint8 [bytes] on the device; None takes it away."""
        self.slab = slab
        here = slab is not None and self.device.type == "cpu" and self.shape.kind != FLOAT16
        self.raw = slab.numpy() if here and slab is not None else None

    def _part(self, which: int, size: int, first: int = 0) -> Tensor:
        assert self.slab is not None, "a unit's weights are used outside of its forward pass"
        start = int(self.m[1 + which]) + first
        return self.slab[start : start + size]

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        """Return the rows from `low` to `high`, unpacked: [rows, inputs] in the compute dtype."""
        shape = self.shape
        count = (shape.rows if high is None else high) - low
        raw = self._part(0, count * shape.row_bytes, low * shape.row_bytes).view(count, -1)
        if shape.kind in FLOATS:
            return raw.view(FLOATS[shape.kind])[:, : shape.inputs].to(self.dtype)
        groups = shape.groups
        part = self._part(1, 4 * count * groups, 4 * low * groups)
        words = part.view(torch.int32).view(count, groups, 1)
        if shape.kind in EIGHTS:
            values = raw.view(torch.int8)[:, : shape.inputs]
        else:
            halves = raw.view(count, -1, 1, 16)
            both = torch.cat((halves & 15, halves >> 4), 2).view(count, -1)
            values = both[:, : shape.inputs].view(torch.int8)
            values = values if shape.kind == INT4_ZERO else values - 8
        found = values.to(self.dtype).view(count, groups, -1)
        if shape.kind in WITH_ZERO:
            found -= ((words << 24) >> 24).to(self.dtype)  # the lowest byte, signed
            words = words & -256
        found *= words.view(torch.float32).to(self.dtype)
        return found.view(count, shape.inputs)

    def bias(self) -> Tensor | None:
        """Return the bias [rows], None if there is none."""
        if self.apart_bias is not None:
            return self.apart_bias
        if not self.shape.bias:
            return None
        return self._part(2, 4 * self.shape.rows).view(torch.float32).to(self.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """Return x · Wᵀ + bias: [..., rows] of `x` [..., inputs]."""
        count = x.numel() // max(x.shape[-1], 1)
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        if self.rounding is not None:
            if self._multiplies_integers(count) and not needs_grad:
                return self._of_integers(x, self.bias())
            x = self.rounding.rounded(x)
        if self.raw is not None and 0 < count <= FEW and not needs_grad:
            return self._few(x, count)
        fits = self.shape.rows % 8 == 0  # what `_int_mm` takes
        if self.w8a8 and fits and self.shape.groups == 1 and count > 0 and not needs_grad:
            return self.rounded(x, self.bias())
        if needs_grad:
            y: Tensor = _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
            return y if (bias := self.bias()) is None else y + bias
        return self.many(x, self.bias())

    def many(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x · Wᵀ + bias for many tokens, unpacking a part of the rows at a time."""
        rows = self.shape.rows
        if x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.dtype)
        step = max(1, CHUNK_BYTES // (self.dtype.itemsize * self.shape.inputs))
        if step >= rows:
            return functional.linear(x, self.dense(), bias)
        y = x.new_empty(*x.shape[:-1], rows)
        for low in range(0, rows, step):
            high = min(low + step, rows)
            part = None if bias is None else bias[low:high]
            y[..., low:high] = functional.linear(x, self.dense(low, high), part)
        return y

    def rounded(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x · Wᵀ + bias of int8 rows, each token of `x` rounded to int8 with its own scale.

        Sums are int32, as in BMInf. Inputs above `OUTLIER` in any token, which would take the
        others' precision, go through a product in the compute dtype (LLM.int8, arXiv 2208.07339).
        A token of zeros stays zero.
        """
        shape = self.shape
        flat = x.reshape(-1, shape.inputs).to(self.dtype)
        scales = self._row_scales()
        apart = (flat.abs() > OUTLIER).any(0)
        columns = apart.nonzero()[:, 0]
        values, step = Rounding().values(flat.masked_fill(apart, 0).float())
        y = self._sums(values) * step * scales
        if len(columns):
            raw = self._part(0, shape.rows * shape.row_bytes)
            weights = raw.view(torch.int8).view(shape.rows, -1)  # [rows, width]
            some = weights[:, columns].float() * scales[:, None]
            y += flat[:, columns].float() @ some.T
        found = y.to(x.dtype) if bias is None else (y + bias.float()).to(x.dtype)
        return found.view(*x.shape[:-1], shape.rows)

    def _multiplies_integers(self, count: int) -> bool:
        """Tell whether there is an integer product for so many tokens that is worth it."""
        fits = self.shape.rows % 8 == 0 and self.shape.groups == 1 and count > 0
        return fits and self.device.type == "cuda"

    def _of_integers(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x · Wᵀ + bias by int32 sums, the inputs rounded as the checkpoint says."""
        assert self.rounding is not None  # the caller has looked
        flat = x.reshape(-1, self.shape.inputs)
        values, step = self.rounding.values(flat.float())
        y = self._sums(values) * step * self._row_scales()
        found = (y if bias is None else y + bias.float()).to(x.dtype)
        return found.view(*x.shape[:-1], self.shape.rows)

    def _sums(self, values: Tensor) -> Tensor:
        """Return the products of whole numbers [tokens, inputs] with all rows, in float32."""
        shape, tokens = self.shape, len(values)
        padded = functional.pad(
            values.to(torch.int8), (0, shape.width - shape.inputs, 0, max(0, 32 - tokens))
        )
        raw = self._part(0, shape.rows * shape.row_bytes)
        weights = raw.view(torch.int8).view(shape.rows, -1)  # [rows, width]
        return torch._int_mm(padded, weights.T)[:tokens].float()

    def _row_scales(self) -> Tensor:
        return self._part(1, 4 * self.shape.rows).view(torch.float32)

    def backward(self, grad: Tensor) -> Tensor:
        """Return grad · W: [..., inputs] of `grad` [..., rows]."""
        rows = self.shape.rows
        step = max(1, CHUNK_BYTES // (self.dtype.itemsize * self.shape.inputs))
        found = grad.new_zeros(*grad.shape[:-1], self.shape.inputs)
        for low in range(0, rows, step):
            high = min(low + step, rows)
            found += grad[..., low:high] @ self.dense(low, high).to(grad.dtype)
        return found

    def _few(self, x: Tensor, count: int) -> Tensor:
        shape = self.shape
        flat = x.detach().reshape(count, shape.inputs).float()
        if shape.width != shape.inputs:
            flat = functional.pad(flat, (0, shape.width - shape.inputs))
        y = np.empty((count, shape.rows), np.float32)
        kernels.use_threads(torch.get_num_threads())
        kernels.product(
            kernels.ADDRESS,
            self.raw,
            self.m,
            flat.contiguous().numpy(),
            y,
            0,
            torch.get_num_threads(),
        )
        if self.apart_bias is not None:
            y += self.apart_bias.numpy()
        return torch.from_numpy(y).view(*x.shape[:-1], shape.rows).to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows [..., inputs] of the matrix, unpacked, as an embedding does."""
        shape = self.shape
        flat = ids.reshape(-1)
        raw = self._part(0, shape.rows * shape.row_bytes).view(shape.rows, -1)[flat]
        if shape.kind in FLOATS:
            found = raw.view(FLOATS[shape.kind])[:, : shape.inputs].to(self.dtype)
        else:
            groups = shape.groups
            scales = self._part(1, 4 * shape.rows * groups).view(torch.float32)
            picked = scales.view(shape.rows, groups, 1)[flat].to(self.dtype)
            assert shape.kind == INT8  # embeddings are rounded to 8 bits
            values = raw.view(torch.int8)[:, : shape.inputs].to(self.dtype)
            found = values.view(len(flat), groups, -1) * picked
        return found.reshape(*ids.shape, shape.inputs)


class _Frozen(torch.autograd.Function):
    """A product with frozen packed weights, which are unpacked again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.many(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with ctx.matrix.hold():
            return ctx.matrix.backward(grads[0]), None


class PackedLinear(nn.Linear):
    """A linear layer on a `Matrix`; its `weight` is unpacked when somebody asks for it."""

    asked_for_dtype = False
    """Whether the model looks at its weight's dtype in every pass, and at nothing else of it."""

    def __init__(self, matrix: Matrix) -> None:
        nn.Module.__init__(self)
        self.matrix = matrix
        self.in_features, self.out_features = matrix.shape.inputs, matrix.shape.rows

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the weight [out, in]; without its unit, of the right shape and kind only."""
        shape = self.matrix.shape
        if self.matrix.slab is None or self.asked_for_dtype:
            nothing = torch.zeros(1, dtype=self.matrix.dtype, device=self.matrix.device)
            return nothing.expand(shape.rows, shape.inputs)
        return self.matrix.dense()

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """Return the bias [out] or None."""
        if self.matrix.slab is None and self.matrix.shape.bias:
            return torch.zeros(self.out_features, device=self.matrix.device)
        return self.matrix.bias()

    def forward(self, input: Tensor) -> Tensor:
        """Return input · Wᵀ + bias."""
        return self.matrix.multiply(input)


class PackedConv1D(PackedLinear):
    """GPT-2's linear layer: its weight is [in, out]; rows are kept as of any linear layer."""

    nx: int
    nf: int

    def __init__(self, matrix: Matrix) -> None:
        super().__init__(matrix)
        self.nx, self.nf = matrix.shape.inputs, matrix.shape.rows

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the weight [in, out]."""
        return super().weight.T


class PackedEmbedding(nn.Embedding):
    """An embedding on a `Matrix`; `embedding_class` puts it under a subclass's own code."""

    matrix: Matrix
    asked_for_dtype = False

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the weight [rows, dim]."""
        return PackedLinear.weight.fget(self)  # type: ignore[attr-defined, no-any-return]

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows that `input` names."""
        return self.matrix.rows(input)


def embedding_class(own: type[nn.Embedding]) -> type[nn.Embedding]:
    """Return a class that computes as `own` does, on packed rows."""
    if own is nn.Embedding:
        return PackedEmbedding
    return type(f"Packed{own.__name__}", (own, PackedEmbedding), {})


class HeadParts(nn.Linear):
    """An output head whose rows are streamed in parts, one after the other."""

    def __init__(self, parts: Sequence[Matrix], dtype: torch.dtype, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.parts = list(parts)
        self.in_features = self.parts[0].shape.inputs
        self.out_features = sum(p.shape.rows for p in self.parts)
        self.dtype, self.device = dtype, device

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return a tensor of the weight's shape and kind; its values are streamed."""
        nothing = torch.full((1,), torch.nan, dtype=self.dtype, device=self.device)
        return nothing.expand(self.out_features, self.in_features)

    bias = None  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        """Return input · Wᵀ + bias."""
        found = []
        for part in self.parts:
            with part.hold():
                found.append(part.multiply(input))
        return torch.cat(found, -1)


class Stack:
    """Matrices of the same size, packed as one, that are taken out by number: experts' weights."""

    def __init__(self, matrix: Matrix, count: int) -> None:
        self.matrix, self.count = matrix, count
        self.each = matrix.shape.rows // count
        self.shape = torch.Size((count, self.each, matrix.shape.inputs))
        self.dtype, self.device = matrix.dtype, matrix.device

    def __getitem__(self, which: Any) -> Tensor:
        """Return matrix number `which`, unpacked: [rows, inputs]."""
        low = int(which) * self.each
        return self.matrix.dense(low, low + self.each)
