"""The decoder computes the chosen neurons alone, and gives what transformers with masks gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from bmkit.deltas import plugged
from bmkit.errors import InputError
from bmkit.nn.rounding import Grid, dequantize, quantize, round_matrix
from bmkit.runtime import experts
from bmkit.runtime.cpu import experts as compiled
from bmkit.runtime.cpu import load, pack
from bmkit.runtime.cpu.decoder import Decoder
from bmkit.runtime.cpu.pack import Packed, Shape
from bmkit.runtime.cpu.source import Fetched, Files, plain
from bmkit.runtime.experts import DENSE, Experts, Router

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, biases, odd widths": LlamaConfig(
        **{**SIZES, "hidden_size": 40, "intermediate_size": 84, "head_dim": 10},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    ),
    "mistral, gelu": MistralConfig(**SIZES, hidden_act="gelu", sliding_window=70),
    "qwen3": Qwen3Config(**SIZES),
}
IDS = torch.randint(0, 97, (160,), generator=torch.Generator().manual_seed(1)).tolist()


def model_of(config: Any) -> Any:
    """Return a random model whose norms and biases do something."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def experts_of(
    config: Any, size: int, shared: int, chosen: tuple[int, ...], *, inner: int | None = None
) -> Experts:
    """Return random routers, of two layers if `inner` is given."""
    generator = torch.Generator().manual_seed(size + shared)
    others = config.intermediate_size // size - shared

    def router() -> Router:
        weight = torch.randn(others, inner or config.hidden_size, generator=generator)
        bias = torch.randn(others, generator=generator)
        if inner is None:
            return Router(weight, bias)
        first = torch.randn(inner, config.hidden_size, generator=generator) * 0.1
        return Router(weight, bias, first, torch.randn(inner, generator=generator))

    routers = tuple(None if count == DENSE else router() for count in chosen)
    return Experts(size, shared, chosen, routers)


def masked(model: Any, divided: Experts) -> Any:
    """Let transformers' own code compute with masks, written out here by the format alone."""
    for layer, router, count in zip(
        model.model.layers, divided.routers, divided.chosen, strict=True
    ):
        if router is not None:
            layer.mlp.forward = _forward(layer.mlp, router, divided, count)
    return model


def _forward(mlp: nn.Module, router: Router, divided: Experts, count: int) -> Any:
    def forward(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if router.inner_weight is not None:
            flat = torch.tanh(flat @ router.inner_weight.T + router.inner_bias)
        scores = flat @ router.weight.T + router.bias
        inner = (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).reshape(len(flat), -1)
        for row, score in zip(inner, scores.tolist(), strict=True):
            ranked = sorted(range(len(score)), key=lambda e: (-score[e], e))
            for e in ranked[count:]:
                low = (divided.shared + e) * divided.size
                row[low : low + divided.size] = 0
        return mlp.down_proj(inner.view(*x.shape[:-1], -1))

    return forward


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return found


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, atol=4e-5 * float(abs(wanted).max()) + 1e-6)


def stored(model: Any, store: str) -> Fetched:
    """Return the weights as `store` keeps them; the model gets what these stand for."""
    state = dict(model.state_dict())

    def fetch(module: str) -> Packed | None:
        weight, bias = state.get(f"{module}.weight"), state.get(f"{module}.bias")
        if weight is None or weight.ndim == 1:
            return plain(state).fetch(module)
        kind, _, group = store.partition("-")
        if kind.startswith("int"):
            values, scale = quantize(weight, int(kind[3:]), int(group) if group else None)
            weight.copy_(dequantize(values, scale))
            return pack.pack_integers(values, scale, int(kind[3:]), bias)
        if kind.startswith("zero"):
            bits = int(kind[4:])
            grid = Grid(bits, int(group) if group else None, False, scale_dtype=torch.bfloat16)
            found = round_matrix(weight, grid)
            weight.copy_(found.dense())
            return pack.pack_integers(found.values, found.scale, bits, bias, zero=found.zero)
        whole = weight.to(getattr(torch, kind))
        weight.copy_(whole.float())
        return pack.pack_floats(whole, bias)

    return Fetched(fetch)


def check(decoder: Decoder, model: Any) -> None:
    """Compare one token after the other, few and many of a prompt, and rows side by side."""
    decoder.embed([0])
    wanted = logits_of(model, IDS[:90])
    cache = decoder.cache(2, 128)
    for i, token in enumerate(IDS[:40]):
        close(decoder.step(cache, [token], [1])[0], wanted[i])
        cache.done[1] += 1
    close(decoder.chain(cache, 1, IDS[40:70])[0], wanted[69])
    close(decoder.chain(cache, 0, IDS[:80])[0], wanted[79])
    found = decoder.step(cache, [IDS[70], IDS[80]], [1, 0])
    close(found, wanted[[70, 80]])


DIVISIONS = {
    "16": (16, 0, (3, 5, 2), None),
    "32, one shared": (32, 1, (1, 2, 5), None),
    "16, shared, dense block, two layers": (16, 2, (3, DENSE, 0), 24),
    "all of them": (16, 0, (12, 12, 12), None),
    "24, two layers": (24, 3, (1, 1, 2), 40),
}


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize(
    "store", ["float32", "bfloat16", "int8", "int8-64", "int4-32", "int4", "zero4-32", "zero8"]
)
def test_logits_are_those_of_the_masked_model(store: str, division: str) -> None:
    config = CONFIGS["llama"]
    size, shared, chosen, inner = DIVISIONS[division]
    divided = experts_of(config, size, shared, chosen, inner=inner)
    model = model_of(config)
    decoder = Decoder(config, stored(model, store), threads=2, experts=divided)
    check(decoder, masked(model, divided))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [12, 4, 1])
def test_any_size_and_family(name: str, size: int) -> None:
    config = CONFIGS[name]
    divided = experts_of(config, size, 1, (2, 7, 4))
    model = model_of(config)
    decoder = Decoder(config, stored(model, "bfloat16"), threads=2, experts=divided)
    check(decoder, masked(model, divided))


@given(
    scores=st.lists(
        st.sampled_from([-0.0, 0.0, 1.0, -1.0, 2.5, -3e38, 3e38, 1e-40]) | st.floats(width=32),
        min_size=1,
        max_size=70,
    ).filter(lambda found: not np.isnan(found).any()),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_the_highest_scores_are_chosen_and_of_equal_ones_the_first(
    scores: list[float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(scores)))
    chosen = np.full(len(scores), 7, np.int32)
    keys = np.empty(len(scores), np.int32)
    compiled.choose(np.array(scores, np.float32), count, keys, chosen)
    ranked = sorted(range(len(scores)), key=lambda e: (-scores[e], e))
    wanted = [int(e in ranked[:count]) for e in range(len(scores))]
    assert chosen.tolist() == wanted


def saved(tmp_path: Path, config: Any, divided: Experts, dtype: torch.dtype) -> Path:
    """Write a checkpoint that is divided into experts."""
    model_of(config).to(dtype).save_pretrained(tmp_path)
    experts.write(tmp_path, divided)
    return tmp_path


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "mistral, gelu"])
def test_a_tokens_logits_are_the_same_bits_alone_beside_others_and_in_a_tree(
    tmp_path: Path, name: str, quant: str | None
) -> None:
    from bmkit.runtime.speculation.tree import Tree

    config = CONFIGS[name]
    divided = experts_of(config, 12, 1, (3, 6, 2), inner=20)
    saved(tmp_path, config, divided, torch.bfloat16)
    for threads in (1, 2, 3):
        decoder = load.load_decoder(tmp_path, threads=threads, quant=quant)
        start = 61
        one = decoder.cache(1, 200)
        decoder.chain(one, 0, IDS[:start])
        alone = []
        for token in IDS[start : start + 12]:
            alone.append(decoder.step(one, [token])[0].copy())
            one.done[0] += 1
        tree = Tree.of(IDS[start])
        tree.add([1, 2, 3], "", [1] * 3)
        nodes = [0, *tree.add(IDS[start + 1 : start + 8], "", [1] * 7)]
        tree.add([7, 8], "", [1] * 2, nodes[3])
        nodes += tree.add(IDS[start + 8 : start + 12], "", [1] * 4, nodes[-1])
        many = decoder.cache(3, 200)
        decoder.chain(many, 0, IDS[:40])
        decoder.chain(many, 1, IDS[:start])
        count = len(tree)
        sees = np.zeros((count + 1, count + 1), np.bool_)
        sees[0, 0] = True
        sees[1:, 1:] = tree.sees()
        logits = decoder.step(
            many, [IDS[40], *tree.tokens], [0, *[1] * count], depth=[0, *tree.depths], sees=sees
        )
        for node, wanted in zip(nodes, alone, strict=True):
            np.testing.assert_array_equal(logits[1 + node], wanted)


@pytest.mark.parametrize("store", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("resident", "parts"), [(set(), 1), ({1}, 2), ({0, 3}, 1)])
def test_streamed_from_files_equals_resident(
    tmp_path: Path, store: str, resident: set[int], parts: int
) -> None:
    config = CONFIGS["llama"]
    divided = experts_of(config, 16, 1, (3, DENSE, 4))
    dtype = torch.float32 if store == "float32" else torch.bfloat16
    path = saved(tmp_path, config, divided, dtype)
    quant = "int8" if store == "int8" else None
    found = []
    for keep in (None, resident):
        decoder = Decoder(
            config,
            Files(path, quant=quant),
            threads=2,
            resident=keep,
            head_parts=1 if keep is None else parts,
            experts=experts.read(path),
        )
        assert load.largest_difference(decoder) < 1e-5
        cache = decoder.cache(1, 128)
        logits = [decoder.chain(cache, 0, IDS[:70])]
        for token in IDS[70:80]:
            logits.append(decoder.step(cache, [token]))
            cache.done[0] += 1
        found.append(np.concatenate(logits))
        decoder.store.close()
    np.testing.assert_array_equal(found[0], found[1])
    if quant is None:
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        close(found[0][-1], logits_of(masked(loaded, divided), IDS[:80])[-1])


def test_the_self_test_finds_a_wrong_expert() -> None:
    config = CONFIGS["llama"]
    model = model_of(config)
    divided = experts_of(config, 16, 1, (3, 3, 3))
    decoder = Decoder(config, plain(dict(model.state_dict())), threads=2, experts=divided)
    assert load.largest_difference(decoder) < 1e-5
    assert decoder.divided is not None
    decoder.divided.blocks[1].numbers[0] = 8  # then half of the neurons are never computed
    assert load.largest_difference(decoder) > load.TOLERANCE


class Strange(Shape):
    """A kind of matrix that nothing here turns."""


def test_what_can_not_be_turned_is_masked() -> None:
    config = CONFIGS["llama, biases, odd widths"]
    divided = experts_of(config, 12, 1, (3, 2, 6))
    model = model_of(config)
    source = stored(model, "int8")

    def fetch(module: str) -> Packed | None:
        found = source.fetch(module)
        if found is None or not module.endswith("down_proj"):
            return found
        return replace(found, shape=Strange(**vars(found.shape)))

    decoder = Decoder(config, Fetched(fetch), threads=2, experts=divided)
    check(decoder, masked(model, divided))


# --- adapters ------------------------------------------------------------------------------------


def test_adapters_on_experts_equal_pefts(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = CONFIGS["llama, biases, odd widths"]
    divided = experts_of(config, 12, 1, (3, 2, 6))
    paths = {}
    for name, rank, targets in (
        ("a", 3, ["gate_proj", "up_proj", "down_proj", "q_proj"]),
        ("b", 40, ["down_proj", "up_proj"]),
    ):
        torch.manual_seed(rank)
        model = get_peft_model(model_of(config), LoraConfig(r=rank, target_modules=targets))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.2)
        model.save_pretrained(tmp_path / name)
        paths[name] = tmp_path / name
    decoder = Decoder(
        config, plain(dict(model_of(config).state_dict())), threads=2, experts=divided
    )
    load.attach(decoder, paths)

    wanted = plugged.load(model_of(config), paths)
    masked(wanted, divided)
    check(decoder, wanted)


# --- files ---------------------------------------------------------------------------------------


def test_experts_of_another_model_are_refused(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    for wrong in (
        experts_of(config, 16, 0, (3, 3)),
        experts_of(CONFIGS["llama, biases, odd widths"], 12, 0, (3, 3, 3)),
    ):
        path = saved(tmp_path, config, wrong, torch.bfloat16)
        with pytest.raises(InputError, match="another model"):
            load.load_decoder(path, threads=1)
