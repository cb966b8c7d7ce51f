"""Which units of a model are resident and which are streamed, from headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bmkit import env
from bmkit.artifact import EXPERTS
from bmkit.errors import ResourceError
from bmkit.plan import Headers, TensorHeader

SLACK_BYTES = 32 * 2**20
"""What libraries take while a model runs: threads' stacks, allocators' reserves, the tokenizer."""
GPU_BYTES = 640 * 2**20
"""What CUDA holds on a GPU before any tensor: its context, code, and the libraries' workspaces."""
CHUNK, SMALL_CHUNK = 512, 128
"""Tokens of a prompt that go through the blocks together, and under a budget that is tight."""
TINY_CHUNK = 32
"""The same, of models whose attention holds a score of every head, token and place."""
FEW = 64
"""Tokens that go through the fused blocks at a time."""
LOAD_BYTES = 32 * 2**20
"""What a part of a matrix takes while it is read and converted."""
SCORE_BYTES = 16 * 2**20
"""Logits that are in memory at a time while text is scored."""
HOST_BYTES = 256 * 2**20
"""Of a budget in RAM beside a GPU, what is left to all but weights that wait there."""
_BY_HEADS = """
    big_bird bigbird_pegasus bloom codegen cpmant deberta deberta-v2 fsmt gemma2 git got_ocr2
    gpt_neo gpt_neox_japanese gpt_oss gptj granite_swa granitemoe_swa led longt5 megatron-bert
    mpnet mpt mt5 mvp nllb-moe openai-gpt pegasus_x prophetnet reformer rembert roformer
    switch_transformers t5 t5gemma trocr umt5 vaultgemma xglm xlm xlnet
"""
BY_HEADS = frozenset(_BY_HEADS.split())
"""Model types whose attention holds a score of every head, token and place."""
WHOLE = frozenset(
    ("mamba", "mamba2", "openai-gpt", "recurrent_gemma", "reformer", "rwkv", "xlm", "xlnet")
)
"""Model types that read a prompt as a whole: they have no cache of keys and values."""
GROUP = {"int8": None, "int4": 64}
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Placement:
    """Where a model's units are, and what that takes."""

    resident: frozenset[int]
    units: tuple[int, ...]
    """Bytes of each unit: the blocks, then the parts of the head."""
    head_parts: int
    fixed_bytes: int
    """All but weights: caches, activations, scratch, slack."""
    slot_bytes: int
    tokens: int
    """Tokens of a sequence, prompt and answer, that the caches are planned for."""
    chunk: int = CHUNK
    rows: int = 1
    """Sequences that are answered together."""
    rest_bytes: int = 0
    """Of `fixed_bytes`, what weights outside of the units take."""

    @property
    def streamed_bytes(self) -> int:
        """Return the bytes that are read again for every token."""
        return sum(size for i, size in enumerate(self.units) if i not in self.resident)

    @property
    def peak_bytes(self) -> int:
        """Return the most memory that this takes, on top of what is loaded before the model."""
        kept = sum(self.units[i] for i in self.resident)
        return self.fixed_bytes + kept + self.slot_bytes


def place(
    headers: Headers,
    *,
    rows: int,
    tokens: int,
    budget: int | None,
    quant: str | None = None,
    besides: int = 0,
    row: int = 0,
    token: int = 0,
    chunk: int = CHUNK,
) -> Placement:
    """Decide what is resident, in `budget` bytes if given, for `rows` sequences of `tokens`.

    `besides` are bytes of adapters, always resident; `row` more bytes come with each row, and
    `token` with each token of it that there is more room for than planned. `chunk` tokens of a
    prompt are read at once if all is resident. Rows are answered one after the other before
    anything is refused.

    Raises ResourceError, naming the smallest budget that works, if this one doesn't.
    """
    layers = int(headers.config["num_hidden_layers"])
    blocks = [0] * layers
    files: list[set[Path]] = [set() for _ in range(layers)]
    for tensor in headers.tensors:
        parts = tensor.name.split(".")
        if parts[:2] == ["model", "layers"] and not tensor.name.endswith("_shape"):
            blocks[int(parts[2])] += _bytes(tensor, headers, quant)
            files[int(parts[2])].add(tensor.file)
    head = _head_bytes(headers, quant)
    slot = max(blocks)
    apart = max((size for size, own in zip(blocks, files, strict=True) if len(own) > 1), default=0)
    head_parts = math.ceil(head / slot)
    units = (*blocks, *([math.ceil(head / head_parts)] * head_parts))
    while True:
        fixed = _fixed(headers, rows, tokens, chunk) + besides + rows * row
        everything = frozenset(range(layers + 1))
        whole = Placement(everything, (*blocks, head), 1, fixed, 0, tokens, chunk, rows)
        if budget is None or whole.peak_bytes <= budget:
            return _roomy(whole, headers, budget, token)
        if quant is not None:  # rounding it anew for every token would take too long
            if rows > 1:
                rows //= 2
                continue
            least = math.ceil(whole.peak_bytes / 2**20)
            raise ResourceError(
                f"--cpu-memory {env.format_bytes(budget)} is too small for --quant while loading",
                hint=f"the smallest that works is --cpu-memory {least}MiB; to stream rounded "
                f"weights, write them first: bmkit compress {quant} -m MODEL",
            )
        fixed = _fixed(headers, rows, tokens, SMALL_CHUNK) + besides + rows * row
        # A block that two files share is read, others are mapped: there may be two of each.
        slots = 2 * slot + 2 * apart
        streamed = Placement(
            frozenset(), units, head_parts, fixed, slots, tokens, SMALL_CHUNK, rows
        )
        if streamed.peak_bytes <= budget:
            break
        if rows == 1:
            need = math.ceil(streamed.peak_bytes / 2**20)
            raise ResourceError(
                f"--cpu-memory {env.format_bytes(budget)} is too small: this needs {need} MiB",
                hint=f"the smallest that works is --cpu-memory {need}MiB",
            )
        rows //= 2
    chosen = spread(units, budget - streamed.peak_bytes)
    return _roomy(replace(streamed, resident=frozenset(chosen)), headers, budget, token)


def _roomy(found: Placement, headers: Headers, budget: int | None, token: int) -> Placement:
    """Let prompts be longer than they are planned for, as far as a budget leaves room."""
    if budget is None:
        return found
    sizes = Sizes.of(headers.config)
    each = (2 * 4 * sizes.layers * sizes.kv * _ceil(sizes.dim, 32) + token) * found.rows
    more = max(budget - found.peak_bytes, 0) // each // 64 * 64
    context = int(headers.config.get("max_position_embeddings") or 2**20)
    tokens = max(min(found.tokens + more, context + FEW), found.tokens)
    return replace(
        found, tokens=tokens, fixed_bytes=found.fixed_bytes + (tokens - found.tokens) * each
    )


def room_in_ram(limit: int | None) -> int | None:
    """Return what a budget in RAM beside a GPU leaves to weights that wait there."""
    return None if limit is None else max(limit - HOST_BYTES, 0)


def lora_bytes(adapters: Sequence[Headers]) -> int:
    """Return what LoRA adapters take: all together, and each alone where there are several."""
    whole: dict[str, list[tuple[int, int]]] = {}
    alone = copied = 0
    for headers in adapters:
        for t in headers.tensors:
            copied += 4 * t.numel
            if len(t.shape) == 2 and ".lora_" in t.name:
                whole.setdefault(t.name, []).append((t.shape[0], t.shape[1]))
                alone += 4 * t.shape[0] * _round_up(t.shape[1])
    joined = 0
    for name, shapes in whole.items():
        if ".lora_A" in name:
            joined += 4 * sum(rank for rank, _ in shapes) * _round_up(shapes[0][1])
        else:
            joined += 4 * shapes[0][0] * _round_up(sum(rank for _, rank in shapes))
    return copied + joined + (alone if len(adapters) > 1 else 0)


def experts_bytes(headers: Headers, quant: str | None) -> int:
    """Return what a model that is divided into experts takes beside its weights.

    These are its routers, what tokens choose, and the matrix that is turned while it is loaded.
    """
    file = headers.path / EXPERTS
    if not file.is_file():
        return 0
    largest = 0
    for tensor in headers.tensors:
        if tensor.name.split(".")[:2] == ["model", "layers"] and len(tensor.shape) == 2:
            largest = max(largest, tensor.bytes, _bytes(tensor, headers, quant))
    inner = int(headers.config.get("intermediate_size") or 0)
    hidden = int(headers.config.get("hidden_size") or 0)
    return 2 * file.stat().st_size + 2 * largest + 4 * FEW * (2 * inner + 2 * hidden)


def spread(sizes: tuple[int, ...], room: int) -> set[int]:
    """Choose units to keep in `room` bytes, evenly over the order of use.

    Streamed units so have resident ones between them, behind whose computing their reading hides.
    """
    for count in range(len(sizes), 0, -1):
        chosen = {i * len(sizes) // count for i in range(count)}
        if sum(sizes[i] for i in chosen) <= room:
            return chosen
    return set()


_NUMBERED = re.compile(r"^((?:.*?\.)?\d+)\.")


def block_of(name: str) -> str | None:
    """Return the block that a parameter is in: its name up to the first number."""
    found = _NUMBERED.match(name)
    return found[1] if found else None


@dataclass(frozen=True)
class Sizes:
    """What a config says of a model's sizes, whatever it calls them."""

    layers: int
    hidden: int
    heads: int
    kv: int
    dim: int
    inner: int
    vocabulary: int
    encoder_decoder: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Read a `config.json`; a model of several parts is taken by its text part."""
        text = config.get("text_config") or config

        def first(*names: str) -> int:
            found = (text.get(n, config.get(n)) for n in names)
            return next((int(v) for v in found if isinstance(v, int) and v > 0), 0)

        layers = first("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "n_layers")
        layers += first("num_decoder_layers")
        hidden = first("hidden_size", "n_embd", "d_model", "dim") or 1
        heads = first("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads") or 1
        dim = first("head_dim", "d_kv") or hidden // heads
        if latent := first("qk_nope_head_dim"):  # keys of two parts, values of another width
            dim = max(latent + first("qk_rope_head_dim"), first("v_head_dim"), dim)
        inner = first("intermediate_size", "n_inner", "decoder_ffn_dim", "ffn_dim", "d_ff")
        return cls(
            max(layers, 1),
            hidden,
            heads,
            first("num_key_value_heads", "num_kv_heads") or heads,
            max(dim, 1),
            inner or 4 * hidden,
            first("vocab_size"),
            bool(config.get("is_encoder_decoder")),
        )


def computed_bytes(dtype: str, device: str, headers: Headers) -> int:
    """Return the bytes of a number that is computed, as `model.compute_dtype` chooses its dtype.

    On the CPU they are those of float32, whatever is asked for.
    """
    if not device.startswith("cuda"):
        return 4
    config = headers.config
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return 2 if "16" in (str(stored) if dtype == "auto" else dtype) else 4


def place_any(
    headers: Headers,
    *,
    rows: int,
    tokens: int,
    prompt: int,
    budget: int | None,
    quant: str | None = None,
    besides: int = 0,
    gpu: bool = False,
    width: int = 4,
) -> Placement:
    """Do as `place` does for a model of any kind, in transformers' own code.

    `prompt` of the `tokens` are read at once; `width` is the bytes of a computed number. On a GPU,
    the budget is the GPU's. Rows are answered one after the other before anything is refused.
    """
    blocks: dict[str, int] = {}
    parts: dict[str, int] = {}  # parameters, the experts of a block as one
    files: dict[str, set[Path]] = {}
    rest = head = 0
    tied = bool(headers.config.get("tie_word_embeddings", True))
    for tensor in headers.tensors:
        block, size = block_of(tensor.name), _any_bytes(tensor, headers, quant, width, gpu=gpu)
        if block is not None:
            blocks[block] = blocks.get(block, 0) + size
            files.setdefault(block, set()).add(tensor.file)
            part = block + re.sub(r"\d+", "*", tensor.name[len(block) :])
            parts[part] = parts.get(part, 0) + _copied(tensor, quant)
        elif _is_table(tensor, headers):
            head = max(head, size)
        else:
            rest += width * tensor.numel + 64
    largest = max((*parts.values(), 0))
    experts = any(".experts." in name for name in parts)
    sizes = Sizes.of(headers.config)
    tables = head if tied else 2 * head
    slot = max((*blocks.values(), 2**20))
    apart = max((blocks[name] for name, own in files.items() if len(own) > 1), default=0)
    slots = 2 * slot + (0 if gpu else 2 * apart)
    kind = str((headers.config.get("text_config") or headers.config).get("model_type"))
    by_heads = kind in BY_HEADS
    head_parts = math.ceil(head / slot)
    streamed_units = (*blocks.values(), *([math.ceil(head / max(head_parts, 1))] * head_parts))
    last = None
    while True:
        fixed = (
            rest
            + besides
            + _any_fixed(
                sizes, rows, tokens, prompt, width, experts=experts, by_heads=by_heads, gpu=gpu
            )
        )
        whole = (*blocks.values(), tables)
        found = Placement(
            frozenset(range(len(whole))), whole, 1, fixed, 0, tokens, prompt, rows, rest
        )
        load = 0 if gpu else 4 * largest + LOAD_BYTES
        if budget is None or found.peak_bytes + load <= budget:
            return found
        at_once = min(prompt, TINY_CHUNK if by_heads else SMALL_CHUNK)
        if sizes.encoder_decoder or kind in WHOLE:
            at_once = prompt
        fixed = rest + besides + load
        fixed += _any_fixed(
            sizes, rows, tokens, at_once, width, experts=experts, by_heads=by_heads, gpu=gpu
        )
        least = Placement(
            frozenset(), streamed_units, head_parts, fixed, slots, tokens, at_once, rows, rest
        )
        if least.peak_bytes <= budget:
            room = budget - least.peak_bytes
            kept = frozenset(spread(streamed_units, room))
            return Placement(
                kept, streamed_units, head_parts, fixed, slots, tokens, at_once, rows, rest
            )
        last = least
        if rows == 1:
            break
        rows //= 2
    need = math.ceil(last.peak_bytes / 2**20)
    flag = "--gpu-memory" if gpu else "--cpu-memory"
    raise ResourceError(
        f"{flag} {env.format_bytes(budget)} is too small: this needs {need} MiB",
        hint=f"the smallest that works is {flag} {need}MiB",
    )


_MADE = re.compile(r"\.c_(attn|proj|fc)\.weight$|\.experts\.|_packed$")


def _copied(tensor: TensorHeader, quant: str | None) -> int:
    """Return the bytes of a tensor that loading has in hand as a whole, not part by part."""
    if _MADE.search(tensor.name) and not (".c_" in tensor.name and quant is None):
        return tensor.bytes
    return tensor.bytes if tensor.shape[-1:] == (1,) else 0


def _is_table(tensor: TensorHeader, headers: Headers) -> bool:
    """Tell whether a tensor has a row for every token: an embedding, or an output head."""
    vocabulary = Sizes.of(headers.config).vocabulary
    return len(tensor.shape) == 2 and vocabulary > 0 and tensor.shape[0] == vocabulary


OURS = ("_packed", "_kept", "_scale", "_zero_point", "_places")
"""Tensors of packed matrices, which lie in slabs as on the CPU."""


def _any_bytes(
    tensor: TensorHeader, headers: Headers, quant: str | None, width: int, *, gpu: bool
) -> int:
    """Return what a tensor takes at most, packed where it can be, else in the compute dtype.

    On the CPU, bfloat16 stays so where float32 is computed in.
    """
    linear = len(tensor.shape) == 2
    quant = "int8" if quant and _is_table(tensor, headers) else quant
    if tensor.name.endswith(OURS) or (linear and width == 4 and not gpu):
        return _bytes(tensor, headers, quant)
    if quant and len(tensor.shape) in (2, 3) and tensor.shape[-1] >= 32:
        return tensor.numel * BITS[quant] // 8 + tensor.numel // 4 + 128
    return width * tensor.numel + 64


def _any_fixed(
    s: Sizes,
    rows: int,
    tokens: int,
    prompt: int,
    width: int,
    *,
    experts: bool,
    by_heads: bool,
    gpu: bool,
) -> int:
    cache = 2 * width * s.layers * s.kv * s.dim * rows * _ceil(tokens, 64)
    if s.encoder_decoder:
        cache *= 2
    at_once = rows * min(prompt, tokens)
    activations = width * at_once * (8 * s.hidden + 4 * s.inner + 6 * s.heads * s.dim)
    scores = 2 * width * rows * min(prompt, tokens) * tokens  # masks
    if by_heads:
        scores += 4 * 4 * rows * s.heads * min(prompt, tokens) * tokens
    # Of the layer that is computed: its cache grows by a copy, keys and values are repeated.
    scores += 2 * width * rows * tokens * s.dim * (s.heads + 2 * s.kv)
    logits = 3 * 4 * s.vocabulary * (rows + 1)
    unpacked = 2 * 16 * 2**20 + (3 * width * s.hidden * s.inner if experts else 0)
    return (
        cache
        + activations
        + scores
        + logits
        + unpacked
        + (GPU_BYTES if gpu else SLACK_BYTES + 2**24)
    )


def _round_up(count: int) -> int:
    return -(-count // 32) * 32


def _bytes(tensor: TensorHeader, headers: Headers, quant: str | None) -> int:
    """Return what a tensor takes in a slab."""
    shape = tensor.shape
    if tensor.name.endswith("_packed"):
        bits = headers.bits_of(tensor.name)
        inputs = _round_up(shape[1] * 32 // bits)
        return shape[0] * inputs * max(bits, 4) // 8 + 64  # 2 and 3 bits are kept as 4
    if tensor.name.endswith("_kept"):  # in memory the zeros are there
        bits = headers.bits_of(tensor.name)
        return shape[0] * _round_up(headers.numel(tensor) // shape[0]) * bits // 8 + 64
    if tensor.name.endswith(("_zero_point", "_places")):
        return 0  # these lie in scales and weights
    if tensor.name.endswith("_scale") or len(shape) < 2:
        return 4 * tensor.numel + 64
    rows, inputs = shape[0], _round_up(shape[1])
    if quant is not None:
        groups = math.ceil(inputs / (GROUP[quant] or inputs)) * (2 if quant == "int4" else 1)
        return rows * (inputs * BITS[quant] // 8 + 4 * groups) + 128
    return rows * inputs * (2 if tensor.dtype == "BF16" else 4) + 64


def _head_bytes(headers: Headers, quant: str | None) -> int:
    tied = bool(headers.config.get("tie_word_embeddings", False))
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    names = {name, f"{name}_packed", f"{name}_scale"}
    found = [t for t in headers.tensors if t.name in names]
    return sum(_bytes(t, headers, "int8" if quant else None) for t in found)


def _fixed(headers: Headers, rows: int, tokens: int, chunk: int) -> int:
    config = headers.config
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    dim = int(config.get("head_dim") or hidden // heads)
    kv = int(config.get("num_key_value_heads") or heads)
    inner = int(config["intermediate_size"])
    layers = int(config["num_hidden_layers"])
    cache = 2 * 4 * layers * kv * _ceil(dim, 32) * rows * _ceil(tokens, 64)
    activations = 4 * chunk * (8 * hidden + 5 * inner + 8 * heads * dim)
    scratch = 4 * max(inner, heads * dim, hidden) * hidden
    scratch += 4 * FEW * (3 * hidden + 5 * heads * dim + 2 * kv * dim + 2 * inner + 8 * heads * FEW)
    logits = 3 * 4 * int(config["vocab_size"]) * (rows + 1)
    return cache + activations + scratch + logits + SLACK_BYTES + LOAD_BYTES


def _ceil(count: int, step: int) -> int:
    return -(-count // step) * step
