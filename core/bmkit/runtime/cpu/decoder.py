"""A decoder of the Llama family: packed weights, fused blocks for few tokens, GEMM for many."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bmkit.runtime.cpu import block as kernels
from bmkit.runtime.cpu.divided import Divided
from bmkit.runtime.cpu.dots import BFLOAT16, FLOAT32, INT8
from bmkit.runtime.cpu.pack import (
    ALIGN,
    PAD,
    Layout,
    Packed,
    empty_slab,
    lay_out,
    pack_floats,
    round_up,
)
from bmkit.runtime.cpu.source import Source
from bmkit.runtime.cpu.store import Store
from bmkit.runtime.cpu.turned import Turned, lay_out_turned, load_turned, turned, unpack_turned
from bmkit.runtime.cpu.window import Window
from bmkit.runtime.experts import Experts
from bmkit.runtime.generate import EVERY

ACTIVATIONS = {
    "silu": kernels.SILU,
    "swish": kernels.SILU,
    "gelu": kernels.GELU,
    "gelu_pytorch_tanh": kernels.GELU_TANH,
    "relu": kernels.RELU,
}
FEW = 64
"""Up to so many tokens go through the fused blocks; more are worth unpacking weights for."""
NAMES = {
    "self_attn.q_proj": kernels.Q,
    "self_attn.k_proj": kernels.K,
    "self_attn.v_proj": kernels.V,
    "self_attn.o_proj": kernels.OUT,
    "mlp.gate_proj": kernels.GATE,
    "mlp.up_proj": kernels.UP,
    "mlp.down_proj": kernels.DOWN,
    "input_layernorm": kernels.NORM_1,
    "post_attention_layernorm": kernels.NORM_2,
    "self_attn.q_norm": kernels.NORM_Q,
    "self_attn.k_norm": kernels.NORM_K,
}
"""The modules of a block by what transformers calls them, in the order of the table."""


class Scratch:
    """Arrays that a pass works in: each kind of them takes as much as its largest pass needs."""

    def __init__(self) -> None:
        self.bytes: dict[str, np.ndarray] = {}
        self.now: dict[str, tuple[int, list[np.ndarray]]] = {}

    def take(
        self, name: str, tokens: int, shapes: Sequence[tuple[int, ...]], *, clear: bool = False
    ) -> list[np.ndarray]:
        """Return float32 arrays of `shapes`, for a pass of `tokens`.

        They hold what a pass of as many tokens has left in them, else anything; zeros with `clear`.
        """
        known = self.now.get(name)
        if known is not None and known[0] == tokens:
            return known[1]
        sizes = [round_up(4 * math.prod(shape), ALIGN) for shape in shapes]
        if self.bytes.get(name, np.empty(0)).nbytes < sum(sizes):
            self.bytes.pop(name, None)
            self.bytes[name] = np.zeros(sum(sizes), np.uint8)
        elif clear:
            self.bytes[name][: sum(sizes)] = 0
        found, at = [], 0
        for shape, size in zip(shapes, sizes, strict=True):
            whole = self.bytes[name][at : at + 4 * math.prod(shape)]
            found.append(whole.view(np.float32).reshape(shape))
            at += size
        self.now[name] = (tokens, found)
        return found


class Delta:
    """Low-rank updates of one block's projections: matrices A [rank, in] and B [out, rank].

    B is scaled already; several adapters are one update whose ranks are put together.
    """

    def __init__(self, pairs: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        self.rank = max((len(a) for a, _ in pairs.values()), default=1)
        matrices: list[Packed | None] = [None] * 14
        for which, (a, b) in pairs.items():
            wide = torch.zeros(len(b), self.rank)
            wide[:, : b.shape[1]] = b
            matrices[2 * which : 2 * which + 2] = [pack_floats(a.float()), pack_floats(wide)]
        layout = lay_out([m.shape if m else None for m in matrices])
        self.table, self.slab = layout.table, empty_slab(layout.bytes)
        views: dict[int, Tensor] = {}
        for row, matrix in enumerate(matrices):
            if matrix is not None:
                layout.write(self.slab, row, matrix)
                raw = layout.part(self.slab, row, 0).view(np.float32)
                whole = torch.from_numpy(raw).view(matrix.shape.rows, -1)
                views[row] = whole[:, : matrix.shape.inputs]
        self.pairs = {  # B's columns beyond the rank of A are zeros
            which: (views[2 * which], views[2 * which + 1][:, : len(a)])
            for which, (a, _) in pairs.items()
        }

    def scratch(self, space: Scratch, tokens: int) -> np.ndarray:
        """Return float32 [7, tokens, rank], the rank rounded up to 32 with zeros."""
        shape = (7, tokens, round_up(self.rank))
        return space.take(f"rank {self.rank}", tokens, [shape], clear=self.rank % PAD > 0)[0]


NO_DELTA = Delta({})


class Cache:
    """Keys and values of several sequences, `slots` tokens each at most; `done` says how many."""

    def __init__(self, layers: int, sequences: int, kv: int, slots: int, dim: int) -> None:
        shape = (layers, sequences, kv, slots, round_up(dim))
        self.keys = np.zeros(shape, np.float32)
        self.values = np.zeros(shape, np.float32)
        self.done = np.zeros(sequences, np.int64)

    @property
    def slots(self) -> int:
        """Return how many tokens a sequence can have."""
        return int(self.keys.shape[3])


class Decoder:
    """The model: what it computes is here, where its weights are is the store's matter.

    Its units are its blocks, then its head in `head_parts` parts. `resident` are the units to keep;
    all if not given. `chunk` tokens of a prompt go through the blocks together. With `said`,
    ascending, logits are those of these tokens alone, in their order. With `experts`, a token
    computes only the neurons that it chooses.
    """

    def __init__(
        self,
        config: Any,
        source: Source,
        *,
        threads: int,
        resident: set[int] | None = None,
        head_parts: int = 1,
        chunk: int = 512,
        said: Sequence[int] | None = None,
        experts: Experts | None = None,
    ) -> None:
        self.chunk, self.said = chunk, said
        self.config, self.source, self.threads = config, source, threads
        self.heads = config.num_attention_heads
        self.kv = getattr(config, "num_key_value_heads", None) or self.heads
        self.hidden = config.hidden_size
        self.dim = getattr(config, "head_dim", None) or self.hidden // self.heads
        self.inner = config.intermediate_size
        self.eps = float(config.rms_norm_eps)
        self.scaling = float(self.dim**-0.5)
        self.rotary = _rotary(config)
        self.turns = (np.zeros((0, self.dim), np.float32), np.zeros((0, self.dim), np.float32))
        self.tied = bool(getattr(config, "tie_word_embeddings", False))
        self.blocks = config.num_hidden_layers
        self.depth = self.blocks  # how many of them a pass goes through: fewer in the self-test
        self.divided = None if experts is None else Divided(experts, ACTIVATIONS[config.hidden_act])
        self.numbers = [self._numbers(i) for i in range(self.blocks)]
        self.last_norm = lay_out([source.shape("model.norm")])
        self.norm_slab = empty_slab(self.last_norm.bytes)
        source.write("model.norm", self.last_norm, 0, self.norm_slab)
        number = None if said is None else len(said)
        self.layouts = layouts(config, source, head_parts, number, self.divided or ())
        self.vocabulary = sum(layout.rows for layout in self.layouts[self.blocks :])
        chosen = set(range(len(self.layouts))) if resident is None else resident
        self.small: dict[int, tuple[np.ndarray, Layout]] = {}  # norms of units that are mapped
        windows = self._map([i for i in range(len(self.layouts)) if i not in chosen])
        self.store = Store(self.layouts, self._load, resident=chosen, windows=windows)
        self.deltas: list[Delta] | None = None
        self.delta_sets: dict[str | None, list[Delta] | None] = {None: None, EVERY: None}
        self.unpacked = np.empty(0, np.float32)
        self._scratch = Scratch()

    def _map(self, streamed: Sequence[int]) -> dict[int, Window]:
        """Return windows on the units that can be computed with where they are stored."""
        found = {}
        for unit in streamed:
            shapes = self.layouts[unit].shapes
            if unit >= self.blocks and self.said is not None:
                continue
            if unit >= self.blocks:
                low = sum(layout.rows for layout in self.layouts[self.blocks : unit])
                assert shapes[0] is not None  # a part of the head
                window = self.source.row_window(head_name(self.config), shapes[0], low)
                if window is not None:
                    found[unit] = window
                continue
            if isinstance(shapes[kernels.DOWN], Turned):
                continue
            prefix = f"model.layers.{unit}."
            rows = [(row, name) for name, row in NAMES.items() if shapes[row] is not None]
            big = [(prefix + n, shapes[row]) for row, n in rows if "norm" not in n]
            mapped = self.source.window([(n, s) for n, s in big if s is not None])
            if mapped is None:
                continue
            found[unit], places = mapped
            table = self.layouts[unit].table.copy()
            for (row, _), place in zip(
                [(row, n) for row, n in rows if "norm" not in n], places, strict=True
            ):
                table[row, kernels.M_WEIGHTS] = place
            self._keep_norms(unit, prefix)
            self.layouts[unit] = Layout(shapes, table, found[unit].size)
        return found

    def _keep_norms(self, unit: int, prefix: str) -> None:
        shapes = self.layouts[unit].shapes
        norms = {row: n for n, row in NAMES.items() if "norm" in n and shapes[row] is not None}
        layout = lay_out([shapes[row] if row in norms else None for row in range(len(shapes))])
        slab = empty_slab(layout.bytes)
        for row, name in norms.items():
            self.source.write(prefix + name, layout, row, slab)
        self.small[unit] = (slab, layout)

    def _norms(self, unit: int, slab: np.ndarray) -> tuple[np.ndarray, Layout]:
        """Return the slab and the layout in which a block's norms are."""
        return self.small.get(unit, (slab, self.layouts[unit]))

    def choose(self, adapter: str | None) -> None:
        """Let one adapter work from now on, by its name; none, or all at once."""
        self.deltas = self.delta_sets[adapter]

    def _load(self, unit: int, slab: np.ndarray) -> None:
        if unit < self.blocks:
            for row, name in enumerate(NAMES):
                whole, layout = f"model.layers.{unit}.{name}", self.layouts[unit]
                if isinstance(layout.shapes[row], Turned):
                    load_turned(self.source, whole, layout, row, slab)
                elif layout.shapes[row] is not None:
                    self.source.write(whole, layout, row, slab)
            return
        low = sum(layout.rows for layout in self.layouts[self.blocks : unit])
        if self.said is not None:
            chosen = self.said[low : low + self.layouts[unit].rows]
            self.source.write_chosen(head_name(self.config), chosen, self.layouts[unit], slab)
            return
        self.source.write_rows(head_name(self.config), low, self.layouts[unit], slab)

    def _numbers(self, i: int) -> np.ndarray:
        kinds = getattr(self.config, "layer_types", None)
        sliding = kinds is None or kinds[i] == "sliding_attention"
        window = getattr(self.config, "sliding_window", None) if sliding else None
        if self.config.model_type == "llama":  # it may say one, and doesn't look at it
            window = None
        if not getattr(self.config, "use_sliding_window", True):
            window = None
        activation = ACTIVATIONS[self.config.hidden_act]
        divided = int(self.divided is not None and i in self.divided)
        numbers = (self.heads, self.kv, self.dim, self.dim, window or 0, activation, divided)
        return np.array(numbers, np.int64)

    @property
    def bytes_a_token(self) -> int:
        """Return the bytes of weights that one decode step reads."""
        return sum(layout.bytes for layout in self.layouts)

    def cache(self, sequences: int, slots: int) -> Cache:
        """Return an empty cache."""
        return Cache(self.config.num_hidden_layers, sequences, self.kv, slots, self.dim)

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Return the embeddings [tokens, hidden]: from the head if it is tied and resident."""
        slab = self.store.resident.get(self.blocks)
        whole = self.tied and self.said is None and len(self.layouts) == self.blocks + 1
        if not whole or slab is None:
            return np.ascontiguousarray(self.source.rows("model.embed_tokens", ids))
        h = np.empty((len(ids), self.hidden), np.float32)
        for row, token in zip(h, ids, strict=True):
            kernels.unpack(slab, self.layouts[self.blocks].table[0], token, row)
        return h

    def angles(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin [tokens, dim] of the rotations at `positions`."""
        known = len(self.turns[0])
        if (last := int(positions.max())) >= known:
            count = 2 * max(last, 128)
            cos, sin = self.rotary(torch.zeros(1), torch.arange(count)[None])
            self.turns = (cos[0].float().numpy(), sin[0].float().numpy())
        return self.turns[0][positions], self.turns[1][positions]

    def step(
        self,
        cache: Cache,
        ids: Sequence[int],
        sequences: Sequence[int] | None = None,
        *,
        depth: Sequence[int] | None = None,
        sees: np.ndarray | None = None,
    ) -> np.ndarray:
        """Run a few tokens, each of a sequence of its own or as `sees` says, and return logits.

        Token t goes to the slot after what is done in its sequence and the tokens of this pass
        before it; `depth` is how far its position is behind what is done, 0 if not given. Nothing
        is counted as done: add to `cache.done` what is to stay. Returns float32
        [tokens, vocabulary].
        """
        count = len(ids)
        sequence = np.asarray(range(count) if sequences is None else sequences, np.int64)
        offsets = np.zeros(count, np.int64)
        if depth is not None:
            offsets[:] = depth
        position = cache.done[sequence] + offsets
        slot = cache.done[sequence]
        seen: dict[int, int] = {}
        for t, s in enumerate(sequence.tolist()):
            slot[t] += seen.get(s, 0)
            seen[s] = seen.get(s, 0) + 1
        if sees is None:
            sees = np.eye(count, dtype=np.bool_)
        h = self.few(self.embed(ids), cache, sequence, slot, position, sees)
        (logits,) = self._scratch.take("logits", count, [(count, self.vocabulary)])
        self._head(h, logits)
        return logits

    def chain(self, cache: Cache, sequence: int, ids: Sequence[int]) -> np.ndarray:
        """Run tokens of one sequence in a row, count them as done; return the last one's logits."""
        out = np.empty((1, self.vocabulary), np.float32)
        for start in range(0, len(ids), self.chunk):
            part = ids[start : start + self.chunk]
            last = start + len(part) == len(ids)
            if len(part) > FEW:
                h = self.many(self.embed(part), cache, sequence)
            else:
                h = self.few_in_a_row(self.embed(part), cache, sequence)
            if last:
                self._head(h[-1:], out)
            cache.done[sequence] += len(part)
        return out

    def all_logits(
        self, cache: Cache, sequence: int, ids: Sequence[int], size: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Run tokens of one sequence in a row, yielding all logits, those of `size` tokens a time.

        Yields the number of the first token, and float32 [tokens, vocabulary] that last until the
        next are asked for.
        """
        for start in range(0, len(ids), self.chunk):
            part = ids[start : start + self.chunk]
            if len(part) > FEW:
                h = self.many(self.embed(part), cache, sequence)
            else:
                h = self.few_in_a_row(self.embed(part), cache, sequence)
            cache.done[sequence] += len(part)
            for low in range(0, len(part), size):
                some = np.ascontiguousarray(h[low : low + size])
                logits = np.empty((len(some), self.vocabulary), np.float32)
                self._head(some, logits)
                yield start + low, logits

    def few_in_a_row(self, h: np.ndarray, cache: Cache, sequence: int) -> np.ndarray:
        """Run a few tokens of one sequence, each seeing those before it; see `few`."""
        count = len(h)
        at = cache.done[sequence] + np.arange(count)
        where = np.full(count, sequence, np.int64)
        return self.few(h, cache, where, at, at, np.tri(count, dtype=np.bool_))

    def few(
        self,
        h: np.ndarray,
        cache: Cache,
        sequence: np.ndarray,
        slot: np.ndarray,
        position: np.ndarray,
        sees: np.ndarray,
    ) -> np.ndarray:
        """Run embeddings `h` [tokens, hidden] through the fused blocks, in place; see `block`."""
        cos, sin = self.angles(position)
        kernels.use_threads(self.running)
        x, heads, mixed, inner = self._space(len(h))
        queries, scores, branch, parts, peaks = self._attention_space(len(h))
        for i in range(self.depth):
            delta = self.deltas[i] if self.deltas else NO_DELTA
            low_rank = delta.scratch(self._scratch, len(h))
            with self.store.use(i) as slab:
                small, norms = self._norms(i, slab)
                kernels.block(
                    kernels.ADDRESS,
                    h,
                    slab,
                    self.layouts[i].table,
                    small,
                    norms.table,
                    self.numbers[i],
                    self.eps,
                    self.scaling,
                    cache.keys[i],
                    cache.values[i],
                    sequence,
                    slot,
                    cache.done,
                    position,
                    sees,
                    cos,
                    sin,
                    x,
                    heads,
                    mixed,
                    inner,
                    queries,
                    scores,
                    branch,
                    parts,
                    peaks,
                    delta.slab,
                    delta.table,
                    low_rank,
                    self.threads,
                    self.running,
                )
                if self.divided is not None and i in self.divided:
                    self.divided.feed_forward(
                        i,
                        h,
                        slab,
                        self.layouts[i],
                        x,
                        inner,
                        self._expert_space(i, len(h)),
                        (delta.slab, delta.table, low_rank),
                        self.running,
                    )
        return h

    @property
    def running(self) -> int:
        """Return on how many threads fused blocks run: one fewer while another one reads weights.

        More threads than cores wait for each other at every barrier.
        """
        return max(self.threads - bool(self.store.slots), 1)

    def _head(self, h: np.ndarray, logits: np.ndarray) -> None:
        x = np.zeros((len(h), round_up(self.hidden)), np.float32)
        norm = self.last_norm.table[0]
        kernels.use_threads(self.running)
        for t in range(len(h)):
            kernels.normalise(h[t], self.norm_slab, norm, self.eps, x[t, : self.hidden])
        column = 0
        for unit in range(self.blocks, len(self.layouts)):
            m = self.layouts[unit].table[0]
            with self.store.use(unit) as slab:
                kernels.product(kernels.ADDRESS, slab, m, x, logits, column, self.running)
            column += int(m[kernels.M_ROWS])

    def _space(self, tokens: int) -> list[np.ndarray]:
        q, k = self.heads * self.dim, self.kv * self.dim
        shapes = [
            (tokens, round_up(self.hidden)),
            (tokens, q + 2 * k),
            (tokens, round_up(q)),
            (2, tokens, round_up(self.inner)),
        ]
        padded = any(n % PAD for n in (self.hidden, q, self.inner))
        return self._scratch.take("block", tokens, shapes, clear=padded)

    def _attention_space(self, tokens: int) -> list[np.ndarray]:
        rows, width = tokens * self.heads // self.kv, round_up(self.dim)
        shapes = [
            (self.threads, rows, width),
            (self.threads, rows, kernels.SPAN),
            (self.threads, rows, tokens),
            (self.threads, self.kv, rows, width),
            (self.threads, 2, self.kv, rows),
        ]
        return self._scratch.take("attention", tokens, shapes, clear=self.dim % PAD > 0)

    def _expert_space(self, block: int, tokens: int) -> list[np.ndarray]:
        assert self.divided is not None  # the caller has looked
        shapes = self.divided.shapes(block, tokens, round_up(self.hidden))
        return self._scratch.take(f"experts {shapes[0][1]}", tokens, shapes, clear=True)

    def _dense(self, unit: int, slab: np.ndarray, which: int, inputs: int) -> Tensor:
        """Unpack a matrix into scratch, where it lasts until the next one comes."""
        m = self.layouts[unit].table[which]
        count = int(m[kernels.M_ROWS]) * inputs
        if self.unpacked.size < count:
            self.unpacked = np.empty(count, np.float32)
        out = self.unpacked[:count].reshape(-1, inputs)
        found = torch.from_numpy(out)
        if isinstance(self.layouts[unit].shapes[which], Turned):
            return unpack_turned(self.layouts[unit], which, slab, found)
        layout, kind = self.layouts[unit], int(m[kernels.M_KIND])
        raw = torch.from_numpy(layout.part(slab, which, 0)).view(len(out), -1)
        # torch's own threads where it can: two thread pools that take turns wait for each other.
        if kind == BFLOAT16:
            return found.copy_(raw.view(torch.bfloat16)[:, :inputs])
        if kind == FLOAT32:
            return raw.view(torch.float32)[:, :inputs]
        if kind == INT8:
            scales = torch.from_numpy(layout.part(slab, which, 1).view(np.float32))
            scales = scales.view(len(out), -1, 1)
            values = raw.view(torch.int8)[:, :inputs].reshape(len(out), scales.shape[1], -1)
            torch.mul(values, scales, out=found.view(values.shape))
            return found
        kernels.unpack_rows(slab, m, 0, out, self.threads)
        return found

    def _floats(self, unit: int, slab: np.ndarray, which: int, part: int) -> Tensor:
        """Return the float32 values of a norm (part 0) or a bias (part 2)."""
        return torch.from_numpy(self.layouts[unit].part(slab, which, part).view(np.float32))

    def state(self, layers: int) -> dict[str, Tensor]:
        """Return the first layers' weights, unpacked, by transformers' names of the base model."""
        found = {}
        for i in range(layers):
            with self.store.use(i) as slab:
                for name, which in NAMES.items():
                    shape = self.layouts[i].shapes[which]
                    if shape is None:
                        continue
                    if "norm" in name:
                        small, layout = self._norms(i, slab)
                        raw = layout.part(small, which, 0).view(np.float32)[: shape.inputs]
                        found[f"layers.{i}.{name}.weight"] = torch.from_numpy(raw).clone()
                        continue
                    whole = self._dense(i, slab, which, shape.inputs).clone()
                    found[f"layers.{i}.{name}.weight"] = whole
                    if shape.bias:
                        found[f"layers.{i}.{name}.bias"] = self._floats(i, slab, which, 2).clone()
        return found

    def _linear(self, unit: int, slab: np.ndarray, which: int, x: Tensor) -> Tensor:
        shape = self.layouts[unit].shapes[which]
        assert shape is not None  # every block has its projections
        bias = self._floats(unit, slab, which, 2) if shape.bias else None
        y = functional.linear(x, self._dense(unit, slab, which, shape.inputs), bias)
        if self.deltas and (pair := self.deltas[unit].pairs.get(which)):
            y += x @ pair[0].T @ pair[1].T
        return y

    def _norm(self, unit: int, slab: np.ndarray, which: int, x: Tensor) -> Tensor:
        small, layout = self._norms(unit, slab)
        weight = torch.from_numpy(layout.part(small, which, 0).view(np.float32))[: x.shape[-1]]
        return functional.rms_norm(x, (x.shape[-1],), weight, self.eps)

    @torch.inference_mode()
    def many(self, embeddings: np.ndarray, cache: Cache, sequence: int) -> np.ndarray:
        """Run many tokens of one sequence; return the hidden states before the last norm."""
        start, count = int(cache.done[sequence]), len(embeddings)
        h = torch.from_numpy(embeddings)
        positions = np.arange(start, start + count)
        cos, sin = (torch.from_numpy(a)[:, None] for a in self.angles(positions))
        for i in range(self.depth):
            with self.store.use(i) as slab:
                h = self._many_block(i, slab, h, cache, sequence, start, cos, sin)
        return h.numpy()

    def _many_block(
        self,
        i: int,
        slab: np.ndarray,
        h: Tensor,
        cache: Cache,
        sequence: int,
        start: int,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        count = len(h)
        x = self._norm(i, slab, kernels.NORM_1, h)
        q, k, v = (
            self._linear(i, slab, which, x).view(count, -1, self.dim)
            for which in (kernels.Q, kernels.K, kernels.V)
        )
        if self.layouts[i].shapes[kernels.NORM_Q] is not None:
            q = self._norm(i, slab, kernels.NORM_Q, q)
            k = self._norm(i, slab, kernels.NORM_K, k)
        q, k = q * cos + _turned(q) * sin, k * cos + _turned(k) * sin
        keys = torch.from_numpy(cache.keys[i, sequence])[..., : self.dim]
        values = torch.from_numpy(cache.values[i, sequence])[..., : self.dim]
        keys[:, start : start + count] = k.transpose(0, 1)
        values[:, start : start + count] = v.transpose(0, 1)
        mixed = self._sdpa(q, keys, values, start, int(self.numbers[i][kernels.N_WINDOW]))
        h = h + self._linear(i, slab, kernels.OUT, mixed.reshape(count, -1))
        x = self._norm(i, slab, kernels.NORM_2, h)
        gate = self._linear(i, slab, kernels.GATE, x)
        inner = _ACTIVATE[int(self.numbers[i][kernels.N_ACTIVATION])](gate)
        inner = inner * self._linear(i, slab, kernels.UP, x)
        if self.divided is not None and i in self.divided:
            inner *= self.divided.mask(i, x)
        return h + self._linear(i, slab, kernels.DOWN, inner)

    def _sdpa(self, q: Tensor, keys: Tensor, values: Tensor, start: int, window: int) -> Tensor:
        """Attend from `q` [tokens, heads, dim] to all that is in the cache, causally."""
        count = len(q)
        until = start + count
        mask = None
        if start or window:
            rows = torch.arange(start, until)[:, None]
            columns = torch.arange(until)[None]
            mask = columns <= rows
            if window:
                mask &= rows - columns < window
        found = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None, :, :until],
            values[None, :, :until],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scaling,
            enable_gqa=self.heads != self.kv,
        )
        return found[0].transpose(0, 1)


_ACTIVATE: dict[int, Callable[[Tensor], Tensor]] = {
    kernels.SILU: functional.silu,
    kernels.GELU: functional.gelu,
    kernels.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    kernels.RELU: functional.relu,
}


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _rotary(config: Any) -> Any:
    """Return the family's rotary module: it is a function of the config alone."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config=config)


def head_name(config: Any) -> str:
    """Return the module whose rows make the logits."""
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return "model.embed_tokens" if tied else "lm_head"


def layouts(
    config: Any,
    source: Source,
    head_parts: int = 1,
    said: int | None = None,
    divided: Container[object] = (),
) -> list[Layout]:
    """Lay out the units of a model: its blocks, then its head, all or `said` rows, in parts.

    In the blocks `divided` into experts, the matrix that goes down is turned if it can be.
    """
    found = []
    for i in range(config.num_hidden_layers):
        shapes = [source.shape(f"model.layers.{i}.{name}") for name in NAMES]
        down = shapes[kernels.DOWN]
        if i in divided and down is not None:
            shapes[kernels.DOWN] = turned(down)
        found.append(lay_out_turned(shapes))
    whole = source.shape(head_name(config))
    assert whole is not None  # `load` has looked
    if said is not None:
        whole = replace(whole, rows=said)
    for part in range(head_parts):
        low, high = part * whole.rows // head_parts, (part + 1) * whole.rows // head_parts
        found.append(lay_out([replace(whole, rows=high - low)]))
    return found
