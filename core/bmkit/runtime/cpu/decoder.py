"""A decoder of the Llama family: packed weights, fused blocks for few tokens, GEMM for many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bmkit.runtime.cpu import block as kernels
from bmkit.runtime.cpu.pack import Packed, lay_out, pack_floats, round_up

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose blocks are these, bias or none, query and key norms or none, window or none."""
ACTIVATIONS = {
    "silu": kernels.SILU,
    "swish": kernels.SILU,
    "gelu": kernels.GELU,
    "gelu_pytorch_tanh": kernels.GELU_TANH,
    "relu": kernels.RELU,
}
FEW = 16
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

Fetch = Callable[[str], Packed | None]


@dataclass
class Layer:
    """One block: its slab, where its matrices lie in it, and its numbers."""

    slab: np.ndarray
    table: np.ndarray
    numbers: np.ndarray


class Cache:
    """Keys and values of several sequences, `slots` tokens each at most; `done` says how many."""

    def __init__(self, layers: int, sequences: int, kv: int, slots: int, dim: int) -> None:
        shape = (layers, sequences, kv, slots, dim)
        self.keys = np.zeros(shape, np.float32)
        self.values = np.zeros(shape, np.float32)
        self.done = np.zeros(sequences, np.int64)

    @property
    def slots(self) -> int:
        """Return how many tokens a sequence can have."""
        return int(self.keys.shape[3])


def covers(config: Any) -> bool:
    """Tell whether a checkpoint of this config can run here."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type", "default")} if "rope_type" in rope else {"default"}
    return (
        config.model_type in FAMILY
        and getattr(config, "hidden_act", None) in ACTIVATIONS
        and kinds <= {"default", "llama3", "linear", "yarn"}
    )


class Decoder:
    """The model, its weights fetched by name; see `covers` for what it can be."""

    def __init__(self, config: Any, fetch: Fetch, *, threads: int) -> None:
        self.config, self.threads = config, threads
        heads = config.num_attention_heads
        self.kv = getattr(config, "num_key_value_heads", None) or heads
        self.heads = heads
        self.hidden = config.hidden_size
        self.dim = getattr(config, "head_dim", None) or self.hidden // heads
        self.inner = config.intermediate_size
        self.eps = float(config.rms_norm_eps)
        self.scaling = float(self.dim**-0.5)
        self.rotary = _rotary(config)
        self.layers = [self._layer(i, fetch) for i in range(config.num_hidden_layers)]
        tied = bool(getattr(config, "tie_word_embeddings", False))
        embedding, last = fetch("model.embed_tokens"), fetch("model.norm")
        out = None if tied else fetch("lm_head")
        assert embedding is not None  # every checkpoint of the family has one
        ends = lay_out([embedding, last, out or embedding if not tied else None])
        self.end_table = ends.table
        if tied:
            self.end_table[2] = self.end_table[0]
        self.ends = ends.fill()
        self.vocabulary = int(self.end_table[2, kernels.M_ROWS])
        self._scratch: dict[int, tuple[np.ndarray, ...]] = {}

    def _layer(self, i: int, fetch: Fetch) -> Layer:
        plan = lay_out([fetch(f"model.layers.{i}.{name}") for name in NAMES])
        kinds = getattr(self.config, "layer_types", None)
        sliding = kinds is None or kinds[i] == "sliding_attention"
        window = getattr(self.config, "sliding_window", None) if sliding else None
        if not getattr(self.config, "use_sliding_window", True):
            window = None
        numbers = np.array(
            [
                self.heads,
                self.kv,
                self.dim,
                self.dim,
                window or 0,
                ACTIVATIONS[self.config.hidden_act],
            ],
            np.int64,
        )
        table = plan.table
        return Layer(plan.fill(), table, numbers)

    @property
    def bytes_a_token(self) -> int:
        """Return the bytes of weights that one decode step reads."""
        row = self.end_table[2]
        head = row[kernels.M_ROWS] * (row[kernels.M_ROW_BYTES] + row[kernels.M_SCALE_BYTES])
        return sum(layer.slab.nbytes for layer in self.layers) + int(head)

    def cache(self, sequences: int, slots: int) -> Cache:
        """Return an empty cache."""
        return Cache(len(self.layers), sequences, self.kv, slots, self.dim)

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Return the embeddings [tokens, hidden]."""
        h = np.empty((len(ids), self.hidden), np.float32)
        for row, token in zip(h, ids, strict=True):
            kernels.unpack(self.ends, self.end_table[0], token, row)
        return h

    def angles(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin [tokens, dim] of the rotations at `positions`."""
        cos, sin = self.rotary(torch.zeros(1), torch.from_numpy(positions)[None])
        return cos[0].float().numpy(), sin[0].float().numpy()

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
        slot = position.copy()
        if sees is None:
            sees = np.eye(count, dtype=np.bool_)
        else:
            seen: dict[int, int] = {}
            for t, s in enumerate(sequence.tolist()):
                slot[t] = cache.done[s] + seen.get(s, 0)
                seen[s] = seen.get(s, 0) + 1
        h = self.few(self.embed(ids), cache, sequence, slot, position, sees)
        logits = self._space(count)[-1]
        self._head(h, logits)
        return logits

    def chain(self, cache: Cache, sequence: int, ids: Sequence[int]) -> np.ndarray:
        """Run tokens of one sequence in a row, count them as done; return the last one's logits."""
        out = np.empty((1, self.vocabulary), np.float32)
        for start in range(0, len(ids), 512):
            part = ids[start : start + 512]
            last = start + len(part) == len(ids)
            if len(part) > FEW:
                h = self.many(self.embed(part), cache, sequence)
            else:
                h = self.few_in_a_row(self.embed(part), cache, sequence)
            if last:
                self._head(h[-1:], out)
            cache.done[sequence] += len(part)
        return out

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
        x, heads, mixed, inner, _ = self._space(len(h))
        scores = np.empty((self.threads, cache.slots + len(h)), np.float32)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            kernels.block(
                kernels.ADDRESS,
                h,
                layer.slab,
                layer.table,
                layer.numbers,
                self.eps,
                self.scaling,
                keys,
                values,
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
                scores,
                self.threads,
            )
        return h

    def _head(self, h: np.ndarray, logits: np.ndarray) -> None:
        x = np.zeros((len(h), round_up(self.hidden)), np.float32)
        norm, out = self.end_table[1], self.end_table[2]
        kernels.head(kernels.ADDRESS, h, self.ends, norm, out, self.eps, x, logits, self.threads)

    def _space(self, tokens: int) -> tuple[np.ndarray, ...]:
        if tokens not in self._scratch:
            q, k = self.heads * self.dim, self.kv * self.dim
            self._scratch[tokens] = (
                np.zeros((tokens, round_up(self.hidden)), np.float32),
                np.zeros((tokens, q + 2 * k), np.float32),
                np.zeros((tokens, round_up(q)), np.float32),
                np.zeros((2, tokens, round_up(self.inner)), np.float32),
                np.zeros((tokens, self.vocabulary), np.float32),
            )
        return self._scratch[tokens]

    def _dense(self, layer: Layer, which: int, inputs: int) -> Tensor:
        m = layer.table[which]
        out = np.empty((int(m[kernels.M_ROWS]), inputs), np.float32)
        kernels.unpack_rows(layer.slab, m, 0, out, self.threads)
        return torch.from_numpy(out)

    def state(self, layers: int) -> dict[str, Tensor]:
        """Return the first layers' weights, unpacked, by transformers' names of the base model."""
        found = {}
        for i, layer in enumerate(self.layers[:layers]):
            for name, which in NAMES.items():
                m = layer.table[which]
                if m[kernels.M_KIND] < 0:
                    continue
                whole = self._dense(layer, which, self._inputs(which))
                found[f"layers.{i}.{name}.weight"] = whole if m[kernels.M_ROWS] > 1 else whole[0]
                if m[kernels.M_BIAS] >= 0:
                    at, count = m[kernels.M_BIAS], m[kernels.M_ROWS]
                    bias = layer.slab[at : at + 4 * count].view(np.float32)
                    found[f"layers.{i}.{name}.bias"] = torch.from_numpy(bias)
        return found

    def _inputs(self, which: int) -> int:
        if which in (kernels.NORM_Q, kernels.NORM_K):
            return int(self.dim)
        widths = {kernels.OUT: self.heads * self.dim, kernels.DOWN: self.inner}
        return int(widths.get(which, self.hidden))

    def _linear(self, layer: Layer, which: int, x: Tensor) -> Tensor:
        m = layer.table[which]
        bias = None
        if m[kernels.M_BIAS] >= 0:
            at, count = m[kernels.M_BIAS], m[kernels.M_ROWS]
            bias = torch.from_numpy(layer.slab[at : at + 4 * count].view(np.float32))
        return functional.linear(x, self._dense(layer, which, x.shape[-1]), bias)

    def _norm(self, layer: Layer, which: int, x: Tensor) -> Tensor:
        at = layer.table[which, kernels.M_WEIGHTS]
        weight = torch.from_numpy(layer.slab[at : at + 4 * x.shape[-1]].view(np.float32))
        return functional.rms_norm(x, (x.shape[-1],), weight, self.eps)

    @torch.inference_mode()
    def many(self, embeddings: np.ndarray, cache: Cache, sequence: int) -> np.ndarray:
        """Run many tokens of one sequence; return the hidden states before the last norm."""
        start, count = int(cache.done[sequence]), len(embeddings)
        h = torch.from_numpy(embeddings)
        positions = np.arange(start, start + count)
        cos, sin = (torch.from_numpy(a)[:, None] for a in self.angles(positions))
        for layer, all_keys, all_values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = self._norm(layer, kernels.NORM_1, h)
            q, k, v = (
                self._linear(layer, i, x).view(count, -1, self.dim)
                for i in (kernels.Q, kernels.K, kernels.V)
            )
            if layer.table[kernels.NORM_Q, kernels.M_KIND] >= 0:
                q = self._norm(layer, kernels.NORM_Q, q)
                k = self._norm(layer, kernels.NORM_K, k)
            q, k = q * cos + _turned(q) * sin, k * cos + _turned(k) * sin
            keys = torch.from_numpy(all_keys[sequence])
            values = torch.from_numpy(all_values[sequence])
            keys[:, start : start + count] = k.transpose(0, 1)
            values[:, start : start + count] = v.transpose(0, 1)
            mixed = self._sdpa(q, keys, values, start, int(layer.numbers[kernels.N_WINDOW]))
            h = h + self._linear(layer, kernels.OUT, mixed.reshape(count, -1))
            x = self._norm(layer, kernels.NORM_2, h)
            gate = self._linear(layer, kernels.GATE, x)
            inner = _ACTIVATE[int(layer.numbers[kernels.N_ACTIVATION])](gate)
            inner = inner * self._linear(layer, kernels.UP, x)
            h = h + self._linear(layer, kernels.DOWN, inner)
        return h.numpy()

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


def plain_fetch(tensors: dict[str, Tensor]) -> Fetch:
    """Return a fetch of float tensors by module name."""

    def fetch(name: str) -> Packed | None:
        weight = tensors.get(f"{name}.weight")
        if weight is None:
            return None
        if weight.ndim == 1:
            return pack_floats(weight.float()[None])
        return pack_floats(weight, tensors.get(f"{name}.bias"))

    return fetch
