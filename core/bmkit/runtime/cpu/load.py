"""Bring a checkpoint's weights into packed slabs, one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bmkit import model as models
from bmkit import plan
from bmkit.errors import InputError
from bmkit.nn.rounding import quantize
from bmkit.runtime.cpu import pack
from bmkit.runtime.cpu.decoder import NAMES, Decoder, covers, plain_fetch
from bmkit.runtime.cpu.pack import Packed

TOLERANCE = 1e-4
"""How far the fused blocks may be from the model's own code, relative to the largest value."""
QUANT = {"int8": (8, None), "int4": (4, 64)}
"""Bits and group of what `quant` means; widths that the group doesn't divide take 32."""


class Weights:
    """The tensors of a checkpoint, read when they are asked for, packed as they are stored.

    Packed integers stay packed. With `quant`, float matrices are rounded while they are read:
    linear layers to its bits, the embedding and the head to 8.
    """

    def __init__(self, path: Path, *, quant: str | None = None) -> None:
        self.path, self.quant = path, quant
        self.headers = plan.read_headers(path)
        self.files = {t.name: t.file for t in self.headers.tensors}
        self.stack = ExitStack()
        self.open: dict[Path, Any] = {}

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def tensor(self, name: str) -> Tensor | None:
        """Return the tensor of that name, or None."""
        file = self.files.get(name)
        if file is None:
            return None
        if file not in self.open:
            self.open[file] = self.stack.enter_context(safe_open(file, framework="pt"))
        found: Tensor = self.open[file].get_tensor(name)
        return found

    def fetch(self, name: str) -> Packed | None:
        """Return module `name`'s matrix, a vector (of a norm) as one row in float32; or None.

        Raises InputError for a layout that nothing here reads, or a weight that is not finite.
        """
        bias = self.tensor(f"{name}.bias")
        if f"{name}.weight_packed" in self.files:
            return self._integers(name, bias)
        weight = self.tensor(f"{name}.weight")
        if weight is None:
            return None
        if weight.dtype not in pack.KINDS:
            raise InputError(f"{self.path}: {name} is stored as {weight.dtype}")
        if not weight.isfinite().all():
            raise InputError(f"{self.path}: {name} holds NaN or infinite weights")
        if weight.ndim == 1:
            return pack.pack_floats(weight.float()[None])
        return self._rounded(name, weight, bias)

    def _rounded(self, name: str, weight: Tensor, bias: Tensor | None) -> Packed:
        if self.quant is None:
            return pack.pack_floats(weight, bias)
        bits, group = QUANT[self.quant]
        if name.endswith(("embed_tokens", "lm_head")):
            bits, group = 8, None
        inputs = weight.shape[1]
        if group is not None and inputs % group:
            group = 32 if inputs % 32 == 0 else None
        values, scale = quantize(weight, bits, group)
        found = pack.pack_integers(values, scale, bits, bias)
        return found or pack.pack_floats(weight, bias)

    def _integers(self, name: str, bias: Tensor | None) -> Packed:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        parts = {
            suffix: self.tensor(f"{name}.weight_{suffix}")
            for suffix in ("packed", "scale", "shape")
        }
        packed, scale, shape = parts.values()
        if packed is None or scale is None or shape is None:
            raise InputError(f"{self.path}: {name} lacks its scale or shape")
        bits = self.headers.packed_bits
        values = unpack_from_int32(packed, bits, torch.Size(shape.tolist()))
        found = pack.pack_integers(values.to(torch.int8), scale, bits, bias)
        if found is None:
            raise InputError(
                f"{self.path}: {name} has {scale.shape[1]} groups of {values.shape[1]} inputs",
                hint="groups of 32, 64, 128 or whole rows are read",
            )
        return found


def readable(path: Path, config: Any) -> bool:
    """Tell whether the checkpoint at `path` can run here: its family, and how it is stored."""
    if not covers(config):
        return False
    found = plan.read_headers(path).config.get("quantization_config")
    if not found:
        return True
    groups = (found.get("config_groups") or {}).values()
    return found.get("format") == "pack-quantized" and all(
        (g.get("weights") or {}).get("symmetric") and not g.get("input_activations") for g in groups
    )


def warm(threads: int) -> None:
    """Compile the kernels, or read them from where they are kept, before any model is opened."""
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
    shapes = {"model.embed_tokens": (8, 8), "model.norm": (8,)}
    for name in NAMES:
        shapes[f"model.layers.0.{name}"] = (8,) if "norm" in name else (8, 8)
    decoder = Decoder(
        config,
        plain_fetch({f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}),
        threads=threads,
    )
    decoder.chain(decoder.cache(1, 32), 0, [0] * 20)
    decoder.step(decoder.cache(1, 32), [0])


def largest_difference(decoder: Decoder, *, layers: int = 2, tokens: int = 20) -> float:
    """Run the first layers here and in transformers' own code, on random embeddings.

    Returns the largest difference of the hidden states, relative to their largest value; float32
    leaves some 1e-6. Weights are the same on both sides, so it measures whether the blocks compute
    what the model's own code does.
    """
    import copy

    from accelerate import init_empty_weights
    from transformers import AutoModel

    layers = min(layers, len(decoder.layers))
    config = copy.deepcopy(decoder.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(decoder.state(layers), assign=True, strict=False)
    model.norm = torch.nn.Identity()
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, decoder.hidden, generator=generator)
    with torch.inference_mode():
        wanted = model(inputs_embeds=h[None], use_cache=False).last_hidden_state[0].numpy()
    whole, decoder.layers = decoder.layers, decoder.layers[:layers]
    try:
        cache = decoder.cache(2, tokens)
        many = decoder.many(h.numpy().copy(), cache, 0)
        few = decoder.few_in_a_row(h.numpy().copy(), cache, 1)
    finally:
        decoder.layers = whole
    scale = abs(wanted).max()
    return float(max(abs(many - wanted).max(), abs(few - wanted).max()) / scale)


def load_decoder(path: Path, *, threads: int, quant: str | None = None) -> Decoder:
    """Load the checkpoint at `path`, of which `readable` is true.

    Peak memory: the packed model, and one layer's matrices besides. Raises InputError for tensors
    that are missing or can't be used.
    """
    config = models.load_config(path)
    with Weights(path, quant=quant) as weights:
        if missing := _missing(config, weights.files):
            raise InputError(
                f"{path}: {len(missing)} tensors are missing, as {missing[0]}",
                hint="the weights belong to another config.json; fetch the checkpoint again",
            )
        return Decoder(config, weights.fetch, threads=threads)


def _missing(config: Any, stored: Sequence[str] | dict[str, Path]) -> list[str]:
    modules = ["model.embed_tokens", "model.norm"]
    if not getattr(config, "tie_word_embeddings", False):
        modules.append("lm_head")
    needed = [name for name in NAMES if not name.endswith(("q_norm", "k_norm"))]
    for i in range(config.num_hidden_layers):
        modules += [f"model.layers.{i}.{name}" for name in needed]
    ends = (".weight", ".weight_packed")
    return [m for m in modules if not any(m + end in stored for end in ends)]
