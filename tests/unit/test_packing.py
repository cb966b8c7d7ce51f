"""Packed rows: the losses of the rows by themselves, in few sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bmkit.data.batch import Padding
from bmkit.data.chat import IGNORED, Example
from bmkit.train import head as heads
from bmkit.train.loss import next_token_loss
from bmkit.train.packing import Packing, block_diagonal, pack, packable, way

VOCABULARY = 47
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.4,
}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1))


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    more = {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4, "layer_types": kinds}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **more))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.4, **sizes))


def opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16}
    more = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, init_std=0.4, **sizes, **more))


def mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2
    )
    return MambaForCausalLM(config)


def made(maker: Any) -> Any:
    torch.manual_seed(0)
    return maker().eval()


def examples(lengths: tuple[int, ...] = (5, 9, 20, 3, 9, 7, 12, 6)) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, tokens in enumerate(lengths):
        ids = torch.randint(0, VOCABULARY, (tokens,), generator=generator).tolist()
        hidden = i % 3 + 1  # of the prompt, without loss
        rows.append({"input_ids": ids, "labels": [IGNORED] * hidden + ids[hidden:]})
    return rows


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("maker", [llama, qwen2, gemma3, gpt2, opt])
@pytest.mark.parametrize("apart", [False, True], ids=["own logits", "head apart"])
def test_the_loss_and_its_gradients_are_those_of_the_rows_alone(maker: Any, apart: bool) -> None:
    model = made(maker)
    head = heads.find(model) if apart else None
    rows = examples()
    total, labels = 0.0, 0
    for row in rows:
        loss, count = next_token_loss(model, Padding(0)([row]))
        loss.backward()
        total, labels = total + float(loss.detach()), labels + count
    wanted = gradients(model)
    found_way = way(model)
    assert found_way == ("mask" if maker is opt else "positions")
    packed = pack(rows, 26)
    assert len(packed) == 3
    loss, count = next_token_loss(model, Packing(0, found_way)(packed), head=head)
    loss.backward()
    assert count == labels
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-3)


def test_the_window_of_the_tiny_gemma3_is_shorter_than_its_rows_and_matters() -> None:
    model = made(gemma3)
    assert max(len(e["input_ids"]) for e in examples()) > model.config.sliding_window
    model.config.layer_types = ["full_attention"] * 2
    rows = Padding(0)(examples())
    full = next_token_loss(model, rows)[0].detach()
    assert float(full) != pytest.approx(float(next_token_loss(made(gemma3), rows)[0].detach()))


@pytest.mark.parametrize("maker", [llama, opt])
def test_a_lora_model_packs_as_its_base_does(maker: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.5)
    model = get_peft_model(made(maker), config).train()
    assert packable(model) is None
    assert model.training


def soft_prompt() -> Any:
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def prefix() -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    return get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes))


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=64))


@pytest.mark.parametrize("maker", [mamba, soft_prompt, prefix, t5, bert])
def test_a_model_that_would_mix_rows_is_refused(maker: Any) -> None:
    reason = packable(made(maker))
    assert reason is not None and "keep packed rows apart" in reason


@given(st.lists(st.integers(2, 40), min_size=1, max_size=40), st.integers(8, 32))
def test_every_row_is_packed_once_and_whole(lengths: list[int], most: int) -> None:
    rows: list[Example] = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(lengths)]
    found: list[int] = []
    for packed in pack(rows, most):
        starts = [t for t, p in enumerate(packed["position_ids"]) if p == 0]
        ends = [*starts[1:], len(packed["input_ids"])]
        for start, end in zip(starts, ends, strict=True):
            (row,) = set(packed["input_ids"][start:end])
            assert end - start == lengths[row]
            assert packed["labels"][start:end] == [IGNORED, *[row] * (end - start - 1)]
            assert packed["position_ids"][start:end] == list(range(end - start))
            found.append(row)
        assert len(packed["input_ids"]) <= most or len(starts) == 1
    assert sorted(found) == list(range(len(lengths)))


@given(st.lists(st.integers(2, 30), min_size=1, max_size=60))
def test_no_more_than_half_as_many_sequences_again_as_tokens_need(lengths: list[int]) -> None:
    rows: list[Example] = [{"input_ids": [0] * n, "labels": [0] * n} for n in lengths]
    needed = -(-sum(lengths) // 32)
    large = sum(n > 16 for n in lengths)  # no two of them go together
    assert len(pack(rows, 32)) <= max(needed, large) * 1.5 + 1


def test_a_mask_lets_tokens_see_those_before_them_in_their_row() -> None:
    packed = pack([{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 2)], 8)
    batch = Packing(0, "mask")([*packed, {k: v[:3] for k, v in packed[0].items()}])
    mask = batch["attention_mask"]
    assert torch.equal(mask, block_diagonal(batch["position_ids"]))
    row = [0, 0, 0, 1, 1]
    for q in range(5):
        for k in range(5):
            assert bool(mask[0, 0, q, k]) == (row[q] == row[k] and k <= q)


def test_padding_is_a_row_of_its_own_without_loss() -> None:
    packed = pack(examples((6, 3)), 6)
    batch = Packing(9)(packed)
    assert batch["input_ids"].shape == (2, 6)
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 0, 1, 2]
    assert (batch["labels"][1, 3:] == IGNORED).all()
    assert (batch["input_ids"][1, 3:] == 9).all()
