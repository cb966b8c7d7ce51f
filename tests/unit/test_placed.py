"""Models of many kinds on placed weights, against transformers' own loading."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    StableLmConfig,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from bmkit.errors import InputError, ResourceError
from bmkit.nn.rounding import Grid, dequantize, quantize, round_matrix
from bmkit.runtime.cpu import pack
from bmkit.runtime.cpu.pack import kind_of
from bmkit.runtime.placed import load
from bmkit.runtime.placed.link import ThreadLink
from bmkit.runtime.placed.matrix import Matrix
from bmkit.runtime.placed.model import Placed, Room, place_model

CPU = torch.device("cpu")
TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    **TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
OLD = {**TOKENS, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128}
T5_SIZES = {**TOKENS, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4}
BART_SIZES = {f"{p}_layers": 3 for p in ("encoder", "decoder")} | {
    f"{p}_{n}": v
    for p in ("encoder", "decoder")
    for n, v in (("attention_heads", 4), ("ffn_dim", 96))
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED),
    "mistral-window": MistralConfig(**GROUPED, sliding_window=8),
    "qwen3": Qwen3Config(**GROUPED),
    "gpt2": GPT2Config(**OLD),
    "opt-projected": OPTConfig(
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
        ffn_dim=96,
        word_embed_proj_dim=32,
    ),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "gptj": GPTJConfig(**OLD, rotary_dim=8),
    "bloom": BloomConfig(**TOKENS, hidden_size=64, n_layer=4, n_head=4),
    "falcon": FalconConfig(**SIZES),
    "phi": PhiConfig(**SIZES),
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2),
    "gemma": GemmaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, sliding_window=8),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=8),
    "stablelm": StableLmConfig(**GROUPED),
    "cohere": CohereConfig(**GROUPED),
    "olmo": OlmoConfig(**GROUPED),  # not one parameter outside of linear layers
    "olmo2": Olmo2Config(**GROUPED),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2-moe": Qwen2MoeConfig(
        **GROUPED,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    ),
    "mamba": MambaConfig(**TOKENS, hidden_size=64, num_hidden_layers=4, state_size=8),
    "t5": T5Config(**T5_SIZES, decoder_start_token_id=0),
    "t5-gated-untied": T5Config(
        **T5_SIZES,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    ),
    "bart": BartConfig(**TOKENS, **BART_SIZES, d_model=64, max_position_embeddings=128),
}
IDS = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(1))
Make = Callable[..., tuple[Path, Any]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests run side by side, and these models are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Save a random model of a kind, and load it again as transformers does, in float32."""

    def write(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Any]:
        config = CONFIGS[name]
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        torch.manual_seed(0)
        model = kind.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # biases and norms too are no round numbers
            parameter.data += torch.randn_like(parameter) * 0.08
        model.to(dtype).save_pretrained(tmp_path / name)
        return tmp_path / name, kind.from_pretrained(tmp_path / name, dtype=torch.float32).eval()

    return write


def put(path: Path, **options: Any) -> Placed:
    options = {"device": CPU, "dtype": torch.float32, **options}
    return place_model(path, load.empty(path), **options)


def least(path: Path, quant: str | None = None) -> int:
    """Return the room in bytes that holds two blocks at a time, and no more."""
    placed = put(path, quant=quant)
    placed.close()
    blocks = [u.bytes for u in placed.units if u.name.rpartition(".")[2].isdigit()]
    return placed.units[0].bytes + 2 * max(blocks)


@torch.inference_mode()
def answers(model: Any) -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(IDS)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(input_ids=IDS, attention_mask=mask, **options)
    also = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return made, model(input_ids=IDS, **also).logits


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_placement_gives_what_transformers_gives(make: Make, name: str) -> None:
    path, plain = make(name)
    wanted, logits = answers(plain)
    tight = least(path)
    half, link = Room(tight + tight // 2), ThreadLink
    for room, way in ((Room(), None), (half, None), (Room(tight), None), (Room(tight), link())):
        placed = put(path, room=room, link=way)
        found, scores = answers(placed.model)
        placed.close()
        assert torch.equal(found, wanted), (room, way)
        assert far(scores, logits) < 1e-5, (room, way)
    assert len(placed.resident) < len(placed.units)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mixtral", "t5-gated-untied", "opt-projected"])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quant_is_the_dense_model_with_its_weights_rounded(
    make: Make, name: str, quant: str
) -> None:
    path, plain = make(name)
    bits = {"int8": 8, "int4": 4}[quant]
    head = plain.get_output_embeddings()
    table = plain.get_input_embeddings()

    def rounded(weight: Tensor, bits: int) -> Tensor:
        inputs = weight.shape[-1]
        group = None if bits == 8 else next((g for g in (64, 32) if inputs % g == 0), None)
        flat = weight.detach().reshape(-1, inputs)
        return dequantize(*quantize(flat, bits, group)).reshape(weight.shape)

    done: set[int] = set()
    for module in plain.modules():
        for weight in module._parameters.values():
            if weight is None or weight.ndim < 2 or id(weight) in done:
                continue
            many = bits
            if weight is table.weight or (head is not None and weight is head.weight):
                many = 8
            elif type(module) is Conv1D:
                weight.data = rounded(weight.T, bits).T
                done.add(id(weight))
                continue
            elif type(module) is not nn.Linear and "Experts" not in type(module).__name__:
                continue
            weight.data = rounded(weight, many)
            done.add(id(weight))
    wanted, logits = answers(plain)
    for room in (Room(), Room(least(path, quant))):
        placed = put(path, quant=quant, room=room)
        found, scores = answers(placed.model)
        placed.close()
        assert torch.equal(found, wanted)
        assert far(scores, logits) < 1e-5


def test_float16_is_widened_exactly(make: Make) -> None:
    path, plain = make("phi", torch.float16)
    placed = put(path)
    assert torch.equal(answers(placed.model)[0], answers(plain)[0])
    placed.close()


def test_a_copy_waits_for_the_computing_that_uses_its_slot(make: Make) -> None:
    """Slots are held up between copies: a model that read one too early would say otherwise."""
    path, plain = make("llama")
    placed = put(path, room=Room(least(path)), link=ThreadLink(lambda: time.sleep(0.002)))
    assert torch.equal(answers(placed.model)[0], answers(plain)[0])
    assert len(placed.resident) == 1
    placed.close()


def test_units_that_ram_has_no_room_for_come_from_disk(make: Make) -> None:
    path, plain = make("qwen3")
    room = least(path)
    placed = put(path, room=Room(room, ram=0), link=ThreadLink())
    assert not placed.tiers.in_ram  # type: ignore[attr-defined]
    assert torch.equal(answers(placed.model)[0], answers(plain)[0])
    placed.close()


def test_the_decoder_of_two_stacks_is_read_ahead_and_not_the_encoder(make: Make) -> None:
    path, plain = make("t5")
    placed = put(path, room=Room(least(path)))
    made = plain.generate(input_ids=IDS, max_new_tokens=40, min_new_tokens=40)
    store = placed.tiers.store  # type: ignore[attr-defined]
    with torch.inference_mode():
        assert torch.equal(
            placed.model.generate(input_ids=IDS, max_new_tokens=40, min_new_tokens=40), made
        )
    placed.close()
    decoder = sum(u.bytes for u in placed.units if u.name.startswith(("decoder", "head")))
    encoder = sum(u.bytes for u in placed.units if u.name.startswith("encoder"))
    assert store.bytes_read < 40 * decoder + 3 * (encoder + decoder)


def test_a_room_too_small_says_how_much_is_missing(make: Make) -> None:
    path, _ = make("gemma2")
    with pytest.raises(ResourceError, match="the weights need 1 MiB at least, 0 MiB are left"):
        put(path, room=Room(least(path) - 1))


def test_missing_weights_are_named(make: Make) -> None:
    from safetensors.torch import load_file, save_file

    path, _ = make("gpt2")
    tensors = load_file(path / "model.safetensors")
    del tensors["transformer.h.2.mlp.c_fc.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensor is missing, as transformer\.h\.2\.mlp"):
        put(path)


def test_weights_that_are_no_numbers_are_refused(make: Make) -> None:
    from safetensors.torch import load_file, save_file

    path, _ = make("gemma2")
    room = least(path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 5] = torch.inf
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="holds NaN or infinite weights"):
        put(path)
    placed = put(path, room=Room(room))
    with pytest.raises(InputError, match="holds NaN or infinite weights"):
        answers(placed.model)
    placed.close()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_packed_integers_of_a_checkpoint_stay_packed(
    make: Make, bits: int, symmetric: bool
) -> None:
    from safetensors.torch import load_file, save_file

    from bmkit.compress import pack as stored

    path, plain = make("gemma2")
    tensors = load_file(path / "model.safetensors")
    grid = Grid(bits, None if bits == 8 else 32, symmetric, scale_dtype=torch.bfloat16)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        found = round_matrix(tensors.pop(name), grid)
        packed = stored.pack(found, grid)
        tensors |= {name.removesuffix("weight") + k: v for k, v in packed.items()}
        plain.get_parameter(name).data = found.dense()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = stored.config(grid, ["lm_head"])
    (path / "config.json").write_text(json.dumps(config))
    wanted, logits = answers(plain)
    for room in (Room(), Room(least(path))):
        placed = put(path, room=room)
        found, scores = answers(placed.model)
        placed.close()
        assert torch.equal(found, wanted)
        assert far(scores, logits) < 1e-5
    block = next(u for u in placed.units if u.name == "model.layers.1")
    assert {p.matrix.shape.kind for p in block.packed} == {kind_of(bits, zero=not symmetric)}


def test_closing_ends_the_threads(make: Make) -> None:
    path, _ = make("llama")
    placed = put(path, room=Room(least(path)))
    reader: threading.Thread = placed.tiers.store.reader  # type: ignore[attr-defined]
    assert reader.is_alive()
    placed.close()
    assert not reader.is_alive()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "t5", "falcon"])
@pytest.mark.parametrize("link", [None, ThreadLink])
def test_gradients_go_through_streamed_weights(make: Make, name: str, link: Any) -> None:
    from peft import LoraConfig, get_peft_model

    path, plain = make(name)
    room = Room(least(path))
    placed = put(path, room=room, link=link() if link else None, checkpoint=True)
    targets = {"gpt2": ["c_attn"], "t5": ["q", "wo"], "falcon": ["query_key_value", "dense"]}
    found = []
    for model in (plain, placed.model):
        torch.manual_seed(3)
        wrapped = get_peft_model(
            model,
            LoraConfig(
                r=4,
                target_modules=targets.get(name, ["q_proj", "down_proj", "o_proj"]),
                lora_dropout=0.2,
                init_lora_weights=False,
            ),
        ).train()
        torch.manual_seed(4)  # the same drops, and the same again on the way back
        also = {"use_cache": False}
        for _ in range(2):  # the second time, the way is known and read ahead
            loss = wrapped(input_ids=IDS, labels=IDS, **also).loss
            loss.backward()
        grads = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
        assert all(g is not None for g in grads.values())
        found.append((float(loss), grads))
    placed.close()
    (wanted_loss, wanted), (loss, grads) = found
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert list(grads) == list(wanted)
    for key, grad in grads.items():
        assert far(grad, wanted[key]) < 2e-4, key
    assert len(placed.resident) < len(placed.units)


def test_the_way_back_is_read_ahead() -> None:
    from bmkit.runtime.cpu.store import Order

    order = Order([0, 1, 2, 3])
    there_and_back = [0, 1, 2, 3, 3, 2, 1, 0]
    for unit in there_and_back * 2:
        order.used(unit)
    right = 0
    for unit, after in itertools.pairwise(there_and_back):
        order.used(unit)
        right += order.following(unit, {unit}) == after
    assert right == 6  # all but where it turns: there the unit itself is used again


@pytest.mark.parametrize("outlier", [0.0, 40.0])
def test_w8a8_sums_integers_exactly(outlier: float) -> None:
    """Against sums in Python's own integers; a row and a token of zeros stay zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator)
    weight[3] = 0
    x = torch.randn(5, 40, generator=generator)
    x[2] = 0
    x[1, 7] = outlier or x[1, 7]
    values, scale = quantize(weight, 8)
    packed = pack.pack_integers(values, scale, 8)
    assert packed is not None
    layout = pack.lay_out([packed.shape])
    slab = pack.empty_slab(layout.bytes)
    layout.write(slab, 0, packed)
    matrix = Matrix(packed.shape, layout.table[0], torch.float32, CPU)
    matrix.bind(torch.from_numpy(slab))
    found = matrix.rounded(x)
    wanted = torch.zeros(5, 24)
    for t in range(5):
        row = [0.0 if outlier and j == 7 else float(v) for j, v in enumerate(x[t])]
        step = max(map(abs, row)) / 127 or 1.0
        near = [round(v / step) for v in row]
        for i in range(24):
            total = sum(a * int(b) for a, b in zip(near, values[i], strict=True))
            wanted[t, i] = total * step * float(scale[i])
            if outlier:
                wanted[t, i] += float(x[t, 7]) * int(values[i, 7]) * float(scale[i])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not found[2].any() and not found[:, 3].any()
    far_off = (found - x @ weight.T).abs().max() / (x @ weight.T).abs().max()
    assert far_off < 0.02


def test_w8a8_through_a_model_stays_near_it(make: Make) -> None:
    path, plain = make("gemma2")
    placed = put(path, quant="int8", w8a8=True)
    with torch.inference_mode():
        found = placed.model(input_ids=IDS).logits
        wanted = plain(input_ids=IDS).logits
    placed.close()
    assert 1e-4 < far(found, wanted) < 0.1
