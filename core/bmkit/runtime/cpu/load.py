"""Load a checkpoint into a decoder; warm the kernels before, and look whether it is right after."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bmkit import model as models
from bmkit.errors import InputError, counted
from bmkit.plan import read_json
from bmkit.runtime import experts
from bmkit.runtime.budget import Placement
from bmkit.runtime.cpu.decoder import FEW, NAMES, Decoder, Delta, head_name
from bmkit.runtime.cpu.source import Files, Source, plain
from bmkit.runtime.family import lora_part
from bmkit.runtime.generate import EVERY

TOLERANCE = 1e-4
"""How far the fused blocks may be from the model's own code, relative to the largest value."""


def load_decoder(
    path: Path,
    *,
    threads: int,
    quant: str | None = None,
    placement: Placement | None = None,
    said: Sequence[int] | None = None,
) -> Decoder:
    """Load the checkpoint at `path`, of a family that `runtime.family` covers.

    Without a placement all of it is resident. With `said`, its head says only those tokens. Raises
    InputError for tensors that are missing or can't be used.
    """
    config = models.load_config(path)
    source = Files(path, quant=quant)
    if missing := _missing(config, source):
        raise InputError(
            f"{path}: {counted(len(missing), 'tensor is', 'tensors are')} missing, as {missing[0]}",
            hint="the weights belong to another config.json; fetch the checkpoint again",
        )
    _require_shapes(path, config, source)
    divided = experts.read(path)
    if divided is not None:
        _require_experts(path, config, divided)
    if placement is None:
        return Decoder(config, source, threads=threads, said=said, experts=divided)
    return Decoder(
        config,
        source,
        threads=threads,
        resident=set(placement.resident),
        head_parts=placement.head_parts,
        chunk=placement.chunk,
        said=said,
        experts=divided,
    )


def _missing(config: Any, source: Source) -> list[str]:
    modules = ["model.embed_tokens", "model.norm", head_name(config)]
    needed = [name for name in NAMES if not name.endswith(("q_norm", "k_norm"))]
    for i in range(config.num_hidden_layers):
        modules += [f"model.layers.{i}.{name}" for name in needed]
    return [name for name in modules if source.shape(name) is None]


def _require_shapes(path: Path, config: Any, source: Source) -> None:
    heads, hidden = config.num_attention_heads, config.hidden_size
    kv = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or hidden // heads
    inner = config.intermediate_size
    sizes = {
        "self_attn.q_proj": (heads * dim, hidden),
        "self_attn.k_proj": (kv * dim, hidden),
        "self_attn.v_proj": (kv * dim, hidden),
        "self_attn.o_proj": (hidden, heads * dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (1, hidden),
        "post_attention_layernorm": (1, hidden),
        "self_attn.q_norm": (1, dim),
        "self_attn.k_norm": (1, dim),
    }
    wanted = {"model.embed_tokens": (config.vocab_size, hidden), "model.norm": (1, hidden)}
    wanted[head_name(config)] = (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        wanted |= {f"model.layers.{i}.{name}": size for name, size in sizes.items()}
    for name, size in wanted.items():
        shape = source.shape(name)
        if shape is not None and (shape.rows, shape.inputs) != size:
            raise InputError(
                f"{path}: {name} has the shape {[shape.rows, shape.inputs]}, its config wants "
                f"{list(size)}",
                hint="the weights belong to another config.json; fetch the checkpoint again",
            )


def _require_experts(path: Path, config: Any, divided: experts.Experts) -> None:
    """Raise InputError for experts of another model."""
    wanted = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    blocks = range(len(divided.routers))
    found = {(r.hidden, divided.width(i)) for i in blocks if (r := divided.routers[i]) is not None}
    if len(divided.routers) != wanted[0] or found - {wanted[1:]}:
        raise InputError(
            f"{path / experts.FILE} belongs to another model than its config.json",
            hint="build it again; without the file the checkpoint is an ordinary dense one",
        )


def warm(threads: int, *, divided: bool = False) -> None:
    """Compile the kernels, or read them from where they are kept, before any model is opened.

    Those of feed-forwards that are `divided` into experts take some seconds more.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    tensors = {"model.embed_tokens.weight": torch.zeros(8, 8), "model.norm.weight": torch.zeros(8)}
    for name in NAMES:
        shape = (8,) if "norm" in name else (8, 8)
        tensors[f"model.layers.0.{name}.weight"] = torch.zeros(shape)
    one = experts.Router(torch.zeros(1, 8), torch.zeros(1))
    only = experts.Experts(8, 0, (1,), (one,)) if divided else None
    decoder = Decoder(config, plain(tensors), threads=threads, experts=only)
    decoder.chain(decoder.cache(1, FEW + 1), 0, [0] * (FEW + 1))
    decoder.step(decoder.cache(1, 64), [0])
    tiny_difference(config)  # imports what the self-test needs


def tiny_difference(config: Any) -> float:
    """Do as `largest_difference` does, on a small random model of the same kind: in no memory.

    The config's kind of norm, rotation, activation, window and its biases are kept, its sizes not.
    """
    from transformers import AutoModelForCausalLM

    small = _without_quantization(copy.deepcopy(config))
    share = small.num_attention_heads // (small.num_key_value_heads or small.num_attention_heads)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 40, "head_dim": 16}
    sizes |= {"num_attention_heads": 2 * share, "num_key_value_heads": 2, "num_hidden_layers": 2}
    for name, value in sizes.items():
        setattr(small, name, value)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)
    if getattr(small, "sliding_window", None):
        small.sliding_window = 8
    if getattr(small, "layer_types", None):
        small.layer_types = [small.layer_types[0], small.layer_types[-1]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
        ids = torch.randint(0, 40, (FEW + 3,)).tolist()
    decoder = Decoder(small, plain(dict(model.state_dict())), threads=1)
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0, [9, -1]].numpy()
    cache = decoder.cache(2, len(ids))
    found = [decoder.chain(cache, 0, ids[:10])[0], decoder.chain(cache, 1, ids)[0]]
    return float(
        max(abs(a - b).max() for a, b in zip(found, wanted, strict=True)) / abs(wanted).max()
    )


def _without_quantization(config: Any) -> Any:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def largest_difference(decoder: Decoder, *, layers: int = 2, tokens: int = 20) -> float:
    """Run the first layers here and in transformers' own code, on random embeddings.

    Returns the largest difference of the hidden states, relative to their largest value; float32
    leaves some 1e-6. Weights are the same on both sides, so it measures whether the blocks compute
    what the model's own code does; of experts, all are computed.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModel

    layers = min(layers, decoder.depth)
    config = copy.deepcopy(decoder.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    _without_quantization(config)
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(decoder.state(layers), assign=True, strict=False)
    model.norm = torch.nn.Identity()
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, decoder.hidden, generator=generator)
    with torch.inference_mode():
        wanted = model(inputs_embeds=h[None], use_cache=False).last_hidden_state[0].numpy()
    whole, decoder.depth = decoder.depth, layers
    try:
        with decoder.divided.whole() if decoder.divided is not None else nullcontext():
            cache = decoder.cache(2, tokens)
            many = decoder.many(h.numpy().copy(), cache, 0)
            few = decoder.few_in_a_row(h.numpy().copy(), cache, 1)
    finally:
        decoder.depth = whole
    scale = abs(wanted).max()
    return float(max(abs(many - wanted).max(), abs(few - wanted).max()) / scale)


def attach(
    decoder: Decoder,
    adapters: Mapping[str, Path],
    wholes: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:
    """Put plain LoRA adapters on a decoder by their names; `Decoder.choose` takes one, or all.

    `wholes` names some of them together. Raises InputError for one that doesn't fit the model.
    """
    found = {name: _pairs(decoder, path) for name, path in adapters.items()}
    every = decoder.delta_sets[EVERY] = _deltas(decoder, list(found.values()))
    for name, parts in ({one: (one,) for one in found} | dict(wholes)).items():
        chosen = [found[part] for part in parts]
        decoder.delta_sets[name] = every if len(parts) == len(found) else _deltas(decoder, chosen)
    decoder.choose(EVERY)


Pairs = dict[tuple[int, str], tuple[Tensor, Tensor]]


def _pairs(decoder: Decoder, path: Path) -> Pairs:
    """Read an adapter: by block and module, A [rank, in] and B [out, rank], which is scaled."""
    found: Pairs = {}
    config = read_json(path / "adapter_config.json")
    halves: dict[tuple[int, str], dict[str, Tensor]] = {}
    with safe_open(path / "adapter_model.safetensors", framework="pt") as stream:
        for name in stream.keys():  # noqa: SIM118 - not a dict
            block, module, half = lora_part(name)
            halves.setdefault((block, module), {})[half] = stream.get_tensor(name).float()
    for (block, module), parts in halves.items():
        rank = len(parts["A"]) if "A" in parts else 0
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank or 1)
        shape = decoder.layouts[block].shapes[NAMES[module]] if block < decoder.blocks else None
        sizes = (tuple(parts["A"].shape), tuple(parts["B"].shape)) if len(parts) == 2 else None
        if shape is None or sizes != ((rank, shape.inputs), (shape.rows, rank)):
            raise InputError(
                f"{path} doesn't fit this model: {module} of layer {block} isn't there as it was",
                hint="was it trained on another base?",
            )
        found[block, module] = (parts["A"], parts["B"] * scale)
    return found


def _deltas(decoder: Decoder, adapters: Sequence[Pairs]) -> list[Delta]:
    """Make one update of every block of several adapters, their ranks put together."""
    joined: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}
    for pairs in adapters:
        for where, pair in pairs.items():
            joined.setdefault(where, []).append(pair)
    return [
        Delta(
            {
                NAMES[module]: (torch.cat([a for a, _ in p]), torch.cat([b for _, b in p], 1))
                for (block, module), p in joined.items()
                if block == i
            }
        )
        for i in range(decoder.blocks)
    ]
