"""bmkit's own delta methods as PEFT tuners: what PEFT's own can do, on many kinds of models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from bmkit.deltas.own import AdapterConfig, BitFitConfig, ParallelAdapterConfig, register

IDS = torch.tensor([[5, 9, 3, 7, 2, 11], [4, 4, 8, 1, 30, 12]])
DECODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
ENCODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**DECODER))


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    )


def moe() -> Any:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **DECODER,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=24,
        )
    )


def gemma() -> Any:
    return Gemma3ForCausalLM(Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=4))


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(**ENCODER, num_labels=3))


def roberta() -> Any:
    return RobertaForMaskedLM(RobertaConfig(**ENCODER, pad_token_id=1))


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=40,
            d_model=16,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


def bart() -> Any:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=40,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            max_position_embeddings=40,
        )
    )


def vit() -> Any:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_labels=3,
            initializer_range=0.3,
        )
    )


# A model; a leaf, a feed-forward or an attention, and a whole block of it; what has a bias.
MODELS: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    "llama": (llama, "o_proj", "mlp", "model.layers.1"),
    "gpt2": (gpt2, "mlp.c_proj", "attn", "transformer.h.1"),
    "moe": (moe, "o_proj", "mlp", "model.layers.1"),
    "gemma": (gemma, "down_proj", "self_attn", "model.layers.1"),
    "bert": (bert, "attention.output.dense", "output", "bert.encoder.layer.1"),
    "roberta": (roberta, "intermediate.dense", "attention", "roberta.encoder.layer.1"),
    "t5": (t5, "SelfAttention.o", "DenseReluDense", "decoder.block.1"),
    "bart": (bart, "fc2", "self_attn", "model.decoder.layers.1"),
    "vit": (vit, "fc2", "mlp", "vit.layers.1"),
}


def fresh(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    torch.manual_seed(int(torch.randint(10**6, (1,), generator=DRAWS)))  # no delta drawn alike
    return model


DRAWS = torch.Generator().manual_seed(7)


def inputs(name: str) -> dict[str, Tensor]:
    if name == "vit":
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}
    return {"input_ids": IDS, "labels": torch.tensor([0, 2]) if name == "bert" else IDS}


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs(name)).logits
    return found


def train(model: Any, name: str, steps: int = 6, rate: float = 1e-2) -> list[float]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(**inputs(name)).loss
        loss.backward()
        for key, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (key in trained), key
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def configs(name: str) -> dict[str, Any]:
    _, leaf, inner, block = MODELS[name]
    return {
        "leaf": AdapterConfig(target_modules=[leaf], bottleneck_dim=4, non_linearity="relu"),
        "inner": AdapterConfig(target_modules=[inner], reduction_factor=2),
        "block": AdapterConfig(target_modules=[block], dropout=0.1),
        "compacter": AdapterConfig(target_modules=[inner], linear="phm", bottleneck_dim=8),
        "low_rank": AdapterConfig(target_modules=[leaf], linear="low_rank", low_rank_rank=3),
        "parallel": ParallelAdapterConfig(target_modules=[leaf], bottleneck_dim=4),
        "parallel_inner": ParallelAdapterConfig(target_modules=[inner], bottleneck_dim=4),
        "bitfit": BitFitConfig(target_modules=[leaf]),
    }


METHODS = list(configs("llama"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_a_delta_is_nothing_at_first_learns_and_is_loaded_as_it_was(
    name: str, method: str, tmp_path: Path
) -> None:
    config = configs(name)[method]
    base = logits(fresh(name), name)
    names = list(fresh(name).state_dict())
    model = get_peft_model(fresh(name), config)
    assert torch.equal(logits(model, name), base)
    losses = train(model, name)
    assert losses[-1] < losses[0]
    trained = logits(model, name)
    assert not torch.equal(trained, base)
    with model.disable_adapter():
        assert torch.equal(logits(model, name), base)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(name), tmp_path), name), trained)
    slim = PeftModel.from_pretrained(fresh(name), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(slim, name), trained)
    native = fresh(name)
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native, name), trained)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(model.unload(), name), base)
    assert torch.equal(logits(twin, name), trained)  # a copy has hooks of its own
    bare = twin.unload()
    assert torch.equal(logits(bare, name), base)
    assert list(bare.state_dict()) == names


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_added_chosen_loaded_and_deleted_as_those_of_peft(
    method: str, tmp_path: Path
) -> None:
    model = get_peft_model(fresh("llama"), configs("llama")[method], "one")
    train(model, "llama")
    one = logits(model, "llama")
    model.add_adapter("two", configs("llama")[method])
    assert torch.equal(logits(model, "llama"), one)
    model.set_adapter("two")
    assert torch.equal(logits(model, "llama"), logits(fresh("llama"), "llama"))
    train(model, "llama", rate=3e-2)
    two = logits(model, "llama")
    assert not torch.equal(one, two)
    model.set_adapter("one")
    assert torch.equal(logits(model, "llama"), one)
    model.save_pretrained(tmp_path)
    model.delete_adapter("two")
    assert not any(".two" in key for key in model.state_dict())
    model.load_adapter(tmp_path / "two", "three")
    assert torch.equal(logits(model, "llama"), one)
    model.set_adapter("three")
    assert torch.equal(logits(model, "llama"), two)
    model.delete_adapter("one")
    assert torch.equal(logits(model, "llama"), two)
    alone = PeftModel.from_pretrained(fresh("llama"), tmp_path / "one")
    assert torch.equal(logits(alone, "llama"), one)


@pytest.mark.parametrize("method", METHODS)
def test_a_delta_is_injected_without_a_wrapper(method: str) -> None:
    model = inject_adapter_in_model(configs("llama")[method], fresh("llama"), "mine")
    losses = train(model, "llama")
    assert losses[-1] < losses[0]
    states = get_peft_model_state_dict(model, adapter_name="mine")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.replace(".mine", "") for n in trained} == set(states)
    again = inject_adapter_in_model(configs("llama")[method], fresh("llama"), "yours")
    result = set_peft_model_state_dict(again, states, adapter_name="yours")
    assert not result.unexpected_keys
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_blocks_give_the_same_gradients(method: str) -> None:
    found: list[dict[str, Tensor]] = []
    for again in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(llama(), configs("llama")[method]).train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for p in model.parameters():
            if p.requires_grad:
                p.data += torch.randn_like(p) * 0.1
        for _ in range(2):
            torch.manual_seed(1)  # the same dropout
            model(**inputs("llama")).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        copy.deepcopy(model)
    for name, gradient in found[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("method", METHODS)
def test_float32_deltas_work_on_a_bfloat16_base(method: str, tmp_path: Path) -> None:
    def make() -> Any:
        return fresh("llama").to(torch.bfloat16)

    model = get_peft_model(make(), configs("llama")[method])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(logits(model, "llama"), logits(make(), "llama"))
    train(model, "llama")
    trained = logits(model, "llama")
    assert trained.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path), "llama"), trained)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "bitfit"])
def test_what_is_not_linear_is_not_merged(method: str) -> None:
    model = get_peft_model(fresh("llama"), configs("llama")[method])
    train(model, "llama")
    before = logits(model, "llama")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="isn't linear"):
            merge()
    assert torch.equal(logits(model, "llama"), before)


def test_biases_are_merged_where_there_are_some_and_given_back() -> None:
    model = get_peft_model(fresh("bert"), BitFitConfig(target_modules=["dense", "LayerNorm"]))
    train(model, "bert")
    trained, base = logits(model, "bert"), logits(fresh("bert"), "bert")
    model.merge_adapter()
    torch.testing.assert_close(logits(model, "bert"), trained, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, "bert"), trained)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, "bert"), base)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged, "bert"), trained, rtol=0, atol=1e-5)
    assert list(merged.state_dict()) == list(fresh("bert").state_dict())


def test_biases_without_a_place_are_not_merged() -> None:
    model = get_peft_model(fresh("llama"), BitFitConfig(target_modules=["q_proj", "norm"]))
    train(model, "llama")
    before = logits(model, "llama")
    with pytest.raises(ValueError, match=r"q_proj has no bias to merge into, and 2 layers more"):
        model.merge_and_unload()
    assert torch.equal(logits(model, "llama"), before)


@pytest.mark.parametrize("method", ["inner", "bitfit"])
def test_modules_to_save_are_trained_and_loaded(method: str, tmp_path: Path) -> None:
    config = configs("bert")[method]
    config.modules_to_save = ["classifier"]
    model = get_peft_model(fresh("bert"), config)
    train(model, "bert")
    trained = logits(model, "bert")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in stored
    assert torch.equal(logits(PeftModel.from_pretrained(fresh("bert"), tmp_path), "bert"), trained)
    bare, base = model.unload(), fresh("bert")
    for key, value in base.bert.state_dict().items():
        assert torch.equal(bare.bert.state_dict()[key], value)
    bare.classifier = base.classifier  # the trained one stays, as it does with PEFT's own
    assert torch.equal(logits(bare, "bert"), logits(base, "bert"))


def test_registering_again_does_nothing() -> None:
    from peft.utils import PeftType

    before = list(PeftType)
    register()
    assert list(PeftType) == before
    assert PeftType("BMKIT_ADAPTER") is PeftType["BMKIT_ADAPTER"]
    assert before.count(PeftType["BMKIT_BITFIT"]) == 1
    assert copy.deepcopy(PeftType["BMKIT_BITFIT"]) is PeftType["BMKIT_BITFIT"]
