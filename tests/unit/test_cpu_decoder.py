"""The packed decoder against plain transformers: families, storage, batches, trees, prompts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from bmkit.deltas import plugged
from bmkit.errors import InputError
from bmkit.nn.rounding import Grid, dequantize, quantize, round_matrix
from bmkit.runtime import family
from bmkit.runtime.cpu import load, pack
from bmkit.runtime.cpu.decoder import Decoder
from bmkit.runtime.cpu.pack import Packed
from bmkit.runtime.cpu.source import Fetched, Files, plain

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, biases, untied": LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "llama 3 rotations": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama, gelu": LlamaConfig(**SIZES, hidden_act="gelu"),
    "llama, tanh gelu": LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"),
    "llama, relu": LlamaConfig(**SIZES, hidden_act="relu"),
    "one kv head": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "as many kv heads": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
    "mistral, window, wide heads": MistralConfig(**SIZES, sliding_window=7, head_dim=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, some windows": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}


def model_of(config: Any) -> Any:
    """Return a random model whose norms and biases do something."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return found


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, atol=4e-5 * float(abs(wanted).max()) + 1e-6)


IDS = torch.randint(0, 97, (90,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Decoder]:
    config = CONFIGS[request.param]
    assert family.covers(config.to_dict())
    model = model_of(config)
    return model, Decoder(config, plain(dict(model.state_dict())), threads=2)


def test_one_token_after_the_other(pair: tuple[Any, Decoder]) -> None:
    model, decoder = pair
    wanted = logits_of(model, IDS)
    cache = decoder.cache(2, 128)
    for i, token in enumerate(IDS):
        close(decoder.step(cache, [token], [1])[0], wanted[i])
        cache.done[1] += 1


@pytest.mark.parametrize("cut", [1, 5, 20, 64, 65, 89])
def test_a_prompt_in_two_parts(pair: tuple[Any, Decoder], cut: int) -> None:
    model, decoder = pair
    wanted = logits_of(model, IDS)
    cache = decoder.cache(1, 90)
    close(decoder.chain(cache, 0, IDS[:cut])[0], wanted[cut - 1])
    close(decoder.chain(cache, 0, IDS[cut:])[0], wanted[-1])


def test_sequences_side_by_side_do_not_see_each_other(pair: tuple[Any, Decoder]) -> None:
    model, decoder = pair
    prompts = [IDS[:3], IDS[3:75], IDS[75:80], IDS[80:]]
    cache = decoder.cache(4, 128)
    for place, prompt in enumerate(prompts):
        decoder.chain(cache, place, prompt)
    places = [2, 0, 3]
    found = decoder.step(cache, [7, 8, 9], places)
    for token, place, logits in zip([7, 8, 9], places, found, strict=True):
        close(logits, logits_of(model, [*prompts[place], token])[-1])


def test_a_tree_of_guesses_is_each_branch_by_itself(pair: tuple[Any, Decoder]) -> None:
    model, decoder = pair
    prompt = IDS[:12]
    parents = [-1, 0, 0, 1, 2, 4]
    tokens = [5, 6, 7, 8, 9, 10]
    depth, sees = [0] * 6, np.eye(6, dtype=np.bool_)
    for t, parent in enumerate(parents):
        if parent >= 0:
            depth[t] = depth[parent] + 1
            sees[t] |= sees[parent]
    cache = decoder.cache(1, 64)
    decoder.chain(cache, 0, prompt)
    found = decoder.step(cache, tokens, [0] * 6, depth=depth, sees=sees)
    for t in range(6):
        branch = [tokens[u] for u in range(6) if sees[t, u]]
        close(found[t], logits_of(model, prompt + branch)[-1])


def test_the_self_test_finds_nothing(pair: tuple[Any, Decoder]) -> None:
    assert load.largest_difference(pair[1]) < 1e-5
    assert load.tiny_difference(pair[1].config) < 1e-5


def test_the_self_test_finds_a_wrong_block() -> None:
    config = CONFIGS["llama"]
    decoder = Decoder(config, plain(dict(model_of(config).state_dict())), threads=2)
    decoder.scaling *= 1.01
    assert load.largest_difference(decoder) > load.TOLERANCE


def test_other_families_are_not_covered() -> None:
    assert not family.covers(Phi3Config(**SIZES, pad_token_id=0).to_dict())
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not family.covers(LlamaConfig(**SIZES, rope_parameters=dynamic).to_dict())


@pytest.mark.parametrize("store", ["bfloat16", "float16", "int8", "int4-32", "zero4-32", "zero8"])
@pytest.mark.parametrize("name", ["llama", "llama, biases, untied", "qwen3"])
def test_stored_small_equals_the_widened_weights(name: str, store: str) -> None:
    config = CONFIGS[name]
    if "4" in store:  # groups must divide every width
        sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
        config = type(config)(**{**config.to_dict(), **sizes})
    model = model_of(config)
    state = dict(model.state_dict())

    def fetch(module: str) -> Packed | None:
        weight, bias = state.get(f"{module}.weight"), state.get(f"{module}.bias")
        if weight is None or weight.ndim == 1:
            return plain(state).fetch(module)
        if store.startswith("int"):
            bits, group = (8, None) if store == "int8" else (4, 32)
            values, scale = quantize(weight, bits, group)
            weight.copy_(dequantize(values, scale))
            return pack.pack_integers(values, scale, bits, bias)
        if store.startswith("zero"):
            bits, group = (8, None) if store == "zero8" else (4, 32)
            found = round_matrix(weight, Grid(bits, group, False, scale_dtype=torch.bfloat16))
            weight.copy_(found.dense())
            return pack.pack_integers(found.values, found.scale, bits, bias, zero=found.zero)
        stored = weight.to(getattr(torch, store))
        weight.copy_(stored.float())
        return pack.pack_floats(stored, bias)

    decoder = Decoder(config, Fetched(fetch), threads=2)
    decoder.embed([0])
    wanted = logits_of(model, IDS)  # after fetching: the weights are as they were stored
    cache = decoder.cache(2, 128)
    close(decoder.chain(cache, 0, IDS)[0], wanted[-1])
    for i, token in enumerate(IDS):
        close(decoder.step(cache, [token], [1])[0], wanted[i])
        cache.done[1] += 1


# --- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama, biases, untied", "qwen3"])
@pytest.mark.parametrize("store", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("resident", "parts"), [(set(), 1), (set(), 3), ({1}, 2), ({0, 2, 3}, 1), ({3, 4}, 2)]
)
def test_streamed_from_files_equals_resident(
    tmp_path: Path, name: str, store: str, resident: set[int], parts: int
) -> None:
    config = CONFIGS[name]
    if store == "int8":  # 48 isn't a multiple of 32: the slow way; 64 goes straight
        config = type(config)(**{**config.to_dict(), "hidden_size": 64, "head_dim": 16})
    model = model_of(config).to(torch.float32 if store == "float32" else torch.bfloat16)
    model.save_pretrained(tmp_path)
    quant = "int8" if store == "int8" else None
    sources = [Files(tmp_path, quant=quant) for _ in range(2)]
    whole = Decoder(config, sources[0], threads=2)
    streamed = Decoder(config, sources[1], threads=2, resident=resident, head_parts=parts)
    assert load.largest_difference(streamed) < 1e-5  # reading ahead goes on meanwhile
    found = []
    for decoder in (whole, streamed):
        cache = decoder.cache(1, 128)
        logits = [decoder.chain(cache, 0, IDS[:70])]
        for token in IDS[70:80]:
            logits.append(decoder.step(cache, [token]))
            cache.done[0] += 1
        logits.append(decoder.chain(cache, 0, IDS[80:]))
        found.append(np.concatenate(logits))
    np.testing.assert_array_equal(found[0], found[1])
    if quant is None:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        close(found[0][-1], logits_of(loaded, IDS)[-1])
    streamed.store.close()


# --- adapters ------------------------------------------------------------------------------------


def adapter(
    tmp_path: Path, config: Any, name: str, rank: int, targets: list[str], *, rs: bool = False
) -> Path:
    """Save a PEFT adapter whose update is not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(rank)
    lora = LoraConfig(r=rank, lora_alpha=7, target_modules=targets, use_rslora=rs)
    model = get_peft_model(model_of(config), lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path / name)
    return tmp_path / name


def named(paths: list[Path]) -> dict[str, Path]:
    return {path.name: path for path in paths}


@pytest.mark.parametrize("name", ["llama", "llama, biases, untied", "qwen3"])
def test_adapters_equal_pefts(tmp_path: Path, name: str) -> None:

    config = CONFIGS[name]
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    paths = [
        adapter(tmp_path, config, "a", 3, every),
        adapter(tmp_path, config, "b", 40, ["q_proj", "down_proj", "k_proj"], rs=True),
    ]
    assert all(family.plain_lora(path) for path in paths)
    model = model_of(config)
    decoder = Decoder(config, plain(dict(model.state_dict())), threads=2)
    for chosen in (paths[:1], paths[1:], paths):
        load.attach(decoder, named(chosen))
        wanted = logits_of(plugged.load(model_of(config), named(chosen)), IDS)
        cache = decoder.cache(2, 128)
        close(decoder.chain(cache, 0, IDS)[0], wanted[-1])
        for i, token in enumerate(IDS):
            close(decoder.step(cache, [token], [1])[0], wanted[i])
            cache.done[1] += 1


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    other = LlamaConfig(**{**SIZES, "hidden_size": 64})
    path = adapter(tmp_path, other, "a", 3, ["q_proj"])
    config = CONFIGS["llama"]
    decoder = Decoder(config, plain(dict(model_of(config).state_dict())), threads=2)
    with pytest.raises(InputError, match="doesn't fit"):
        load.attach(decoder, {"a": path})


def test_what_is_no_plain_lora_is_left_to_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for name, more in (("dora", {"use_dora": True}), ("bias", {"bias": "all"})):
        lora = LoraConfig(r=2, target_modules=["q_proj"], **more)
        get_peft_model(model_of(CONFIGS["llama, biases, untied"]), lora).save_pretrained(
            tmp_path / name
        )
        assert not family.plain_lora(tmp_path / name)
    assert not family.plain_lora(tmp_path)


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "mistral, window, wide heads", "qwen3"])
def test_a_tokens_logits_are_the_same_bits_alone_beside_others_and_in_a_tree(
    tmp_path: Path, name: str, quant: str | None
) -> None:
    from bmkit.runtime.speculation.tree import Tree

    config = copy.deepcopy(CONFIGS[name])
    config.max_position_embeddings = 256
    if getattr(config, "sliding_window", None):
        config.sliding_window = 70  # begins in the middle of a span of the cache
    model_of(config).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (160,), generator=torch.Generator().manual_seed(0)).tolist()
    for threads in (1, 2, 3):
        decoder = load.load_decoder(tmp_path, threads=threads, quant=quant)
        for start in (5, 60, 126, 130):
            one = decoder.cache(1, 200)
            decoder.chain(one, 0, ids[:start])
            alone = []
            for token in ids[start : start + 12]:
                alone.append(decoder.step(one, [token])[0].copy())
                one.done[0] += 1
            tree = Tree.of(ids[start])
            tree.add([1, 2, 3], "", [1] * 3)
            nodes = [0, *tree.add(ids[start + 1 : start + 8], "", [1] * 7)]
            tree.add([7, 8], "", [1] * 2, nodes[3])
            nodes += tree.add(ids[start + 8 : start + 12], "", [1] * 4, nodes[-1])
            many = decoder.cache(3, 200)
            decoder.chain(many, 0, ids[:40])
            decoder.chain(many, 1, ids[:start])
            count = len(tree)
            sees = np.zeros((count + 1, count + 1), np.bool_)
            sees[0, 0] = True
            sees[1:, 1:] = tree.sees()
            logits = decoder.step(
                many,
                [ids[40], *tree.tokens],
                [0, *[1] * count],
                depth=[0, *tree.depths],
                sees=sees,
            )
            for node, wanted in zip(nodes, alone, strict=True):
                np.testing.assert_array_equal(logits[1 + node], wanted)
