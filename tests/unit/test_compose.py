"""Several deltas on one model, against plain PEFT and the plain base."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from bmkit.deltas import compose
from bmkit.deltas.own import AdapterConfig, BitFitConfig, ParallelAdapterConfig
from bmkit.errors import InputError

IDS = torch.tensor([[5, 9, 3, 7, 2, 11], [4, 4, 8, 1, 30, 12]])


def llama(seed: int = 1) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    torch.manual_seed(seed)  # so that no delta is drawn twice alike
    return model


def t5(seed: int = 1) -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    torch.manual_seed(seed)
    return model


MODELS: dict[str, Callable[..., Any]] = {"llama": llama, "t5": t5}


def configs(kind: str) -> dict[str, PeftConfig]:
    """One delta of each type; several of them are on the same modules."""
    q, ff, norm = ("q_proj", "mlp", "input_layernorm") if kind == "llama" else (
        "SelfAttention.q",
        "DenseReluDense",
        "layer_norm",
    )  # fmt: skip
    task = "CAUSAL_LM" if kind == "llama" else "SEQ_2_SEQ_LM"
    return {
        "lora": LoraConfig(r=2, target_modules=[q], task_type=task),
        "ia3": IA3Config(target_modules=[q], feedforward_modules=[], task_type=task),
        "adapter": AdapterConfig(target_modules=[q, ff], bottleneck_dim=4, task_type=task),
        "parallel": ParallelAdapterConfig(target_modules=[ff], bottleneck_dim=4, task_type=task),
        "bitfit": BitFitConfig(target_modules=[q, norm], task_type=task),
        "norms": LNTuningConfig(target_modules=[norm], task_type=task),
        "prefix": PrefixTuningConfig(num_virtual_tokens=2, task_type=task),
    }


PAIRS = list(itertools.combinations(configs("llama"), 2))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        if getattr(model.config, "is_encoder_decoder", False):
            found: Tensor = model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits
        else:
            found = model(input_ids=IDS).logits
    return found


def train(model: Any, steps: int = 4) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_deltas_train_together_and_each_is_saved_without_the_other(
    pair: tuple[str, str], kind: str, tmp_path: Path
) -> None:
    make, every = MODELS[kind], configs(kind)
    base = logits(make())
    model = compose.attach(make(), {name: every[name] for name in pair})
    losses = train(model)
    assert losses[-1] < losses[0]
    both = logits(model)
    with compose.active(model, None):
        assert torch.equal(logits(model), base)
    for name in pair:
        compose.save(model, name, tmp_path / name)
        trained = compose.parameters(model, name)
        assert trained and all(p.requires_grad for p in trained.values())
        values = load_file(tmp_path / name / "adapter_model.safetensors")
        assert not any("base_layer" in key or "embed" in key.split(".") for key in values)
        if name != "prefix":  # of which the file has what its encoder gives
            assert sorted(t.sum().item() for t in values.values()) == sorted(
                p.sum().item() for p in trained.values()
            )
        with compose.active(model, [name]):
            alone = logits(model)
        plain = PeftModel.from_pretrained(make(2), tmp_path / name)
        assert torch.equal(logits(plain), alone)
        assert not torch.equal(alone, base)
    assert torch.equal(logits(model), both)
    again = compose.load(make(3), {name: tmp_path / name for name in pair})
    assert torch.equal(logits(again), both)
    for name in pair:
        compose.save(again, name, tmp_path / f"{name}-again")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / name / file).read_bytes() == (
                tmp_path / f"{name}-again" / file
            ).read_bytes()
    left, right = pair
    with compose.active(again, [right]):
        wanted = logits(again)
    again = compose.unplug(again, left)
    assert compose.names(again) == [right]
    assert torch.equal(logits(again), wanted)
    again = compose.unplug(again, right)
    assert torch.equal(logits(again), base)
    assert list(again.state_dict()) == list(make().state_dict())


def test_six_types_work_at_once_and_any_of_them_alone(tmp_path: Path) -> None:
    model = compose.attach(llama(), configs("llama"))
    assert compose.names(model) == [
        *("norms", "lora", "ia3", "adapter", "parallel", "bitfit", "prefix")
    ]
    train(model)
    every = logits(model)
    for name in compose.names(model):
        compose.save(model, name, tmp_path / name)
    again = compose.load(llama(2), {n: tmp_path / n for n in compose.names(model)})
    assert torch.equal(logits(again), every)
    assert not any(p.requires_grad for p in again.parameters())
    some = ["lora", "bitfit"]
    with compose.active(model, some):
        found = logits(model)
    assert torch.equal(found, logits(compose.load(llama(), {n: tmp_path / n for n in some})))


def test_only_deltas_are_trained_and_the_base_keeps_its_values() -> None:
    every = configs("llama")
    model = compose.attach(llama(), {n: every[n] for n in ("lora", "adapter", "norms")})
    train(model)
    deltas = {id(p) for n in compose.names(model) for p in compose.parameters(model, n).values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == deltas
    plain = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    for name, parameter in llama().named_parameters():
        assert torch.equal(plain[name], parameter)


def test_two_deltas_of_one_type_on_the_same_layers_add_up(tmp_path: Path) -> None:
    one, other = (LoraConfig(r=r, target_modules=["q_proj"]) for r in (2, 3))
    model = compose.attach(llama(), {"one": one, "other": other})
    train(model)
    weight = llama().model.layers[1].self_attn.q_proj.weight.detach().clone()
    for name, rank in (("one", 2), ("other", 3)):
        compose.save(model, name, tmp_path / name)
        values = load_file(tmp_path / name / "adapter_model.safetensors")
        key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
        weight += 8 / rank * values[key.format("B")] @ values[key.format("A")]
    x = torch.randn(3, 16)
    found = model.model.layers[1].self_attn.q_proj(x)
    torch.testing.assert_close(found, x @ weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),  # whose layers share weights
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5, 9]),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
    ids=["vera", "tokens", "prompt"],
)
def test_deltas_that_are_more_than_layers_go_with_others(other: PeftConfig, tmp_path: Path) -> None:
    every = {"other": other, "adapter": configs("llama")["adapter"]}
    model = compose.attach(llama(), every)
    losses = train(model)
    assert losses[-1] < losses[0]
    for name in every:
        compose.save(model, name, tmp_path / name)
        with compose.active(model, [name]):
            alone = logits(model)
        assert torch.equal(logits(PeftModel.from_pretrained(llama(2), tmp_path / name)), alone)
    with compose.active(model, ()):
        assert torch.equal(logits(model), logits(llama()))
    again = compose.load(llama(2), {name: tmp_path / name for name in every})
    assert torch.equal(logits(again), logits(model))
    for name in every:
        again = compose.unplug(again, name)
    assert torch.equal(logits(again), logits(llama()))
    assert list(again.state_dict()) == list(llama().state_dict())


def test_modules_that_are_trained_whole_belong_to_their_delta(tmp_path: Path) -> None:
    head = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = compose.attach(llama(), {"head": head, "adapter": configs("llama")["adapter"]})
    train(model)
    with compose.active(model, None):
        assert torch.equal(logits(model), logits(llama()))
    compose.save(model, "head", tmp_path / "head")
    with compose.active(model, ["head"]):
        alone = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(2), tmp_path / "head")), alone)
    with compose.active(model, ["adapter"]):
        wanted = logits(model)
    assert torch.equal(logits(compose.unplug(model, "head")), wanted)


def test_a_name_may_be_that_of_a_module_or_hold_dots(tmp_path: Path) -> None:
    every = configs("llama")
    names = {"up": every["lora"], "run.1/b": every["adapter"], "mlp": every["bitfit"]}
    model = compose.attach(llama(), names)
    train(model)
    assert compose.names(model) == list(names)
    for i, name in enumerate(names):
        compose.save(model, name, tmp_path / str(i))
        with compose.active(model, [name]):
            alone = logits(model)
        assert torch.equal(logits(PeftModel.from_pretrained(llama(2), tmp_path / str(i))), alone)


def test_deltas_on_a_bfloat16_base_are_float32() -> None:
    every = configs("llama")
    model = compose.attach(
        llama().to(torch.bfloat16), {n: every[n] for n in ("lora", "adapter", "bitfit", "ia3")}
    )
    for name in compose.names(model):
        kinds = {p.dtype for p in compose.parameters(model, name).values()}
        assert kinds == {torch.float32}, name
    losses = train(model)
    assert losses[-1] < losses[0]
    assert logits(model).dtype == torch.bfloat16


def test_a_loaded_delta_stays_frozen_beside_a_new_one(tmp_path: Path) -> None:
    every = configs("llama")
    first = compose.attach(llama(), {"lora": every["lora"]})
    train(first)
    compose.save(first, "lora", tmp_path)
    model = compose.load(llama(), {"lora": tmp_path})
    model = compose.attach(model, {"adapter": every["adapter"]})
    assert torch.equal(logits(model), logits(first))
    losses = train(model)
    assert losses[-1] < losses[0]
    with compose.active(model, ["lora"]):
        assert torch.equal(logits(model), logits(first))
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(compose.parameters(model, "adapter"))


@pytest.mark.parametrize("name", ["lora", "adapter", "bitfit", "norms", "prefix"])
def test_weights_are_swapped_while_the_delta_stays(name: str, tmp_path: Path) -> None:
    config = configs("llama")[name]
    found = {}
    for seed in (1, 2):
        one = compose.attach(llama(seed), {"x": config})
        train(one, 2 * seed)
        compose.save(one, "x", tmp_path / str(seed))
        found[seed] = logits(compose.load(llama(), {"x": tmp_path / str(seed)}))
    model = compose.load(llama(), {"y": tmp_path / "1"})
    for seed in (2, 1):
        compose.swap(model, "y", tmp_path / str(seed))
        assert torch.equal(logits(model), found[seed])
    file = tmp_path / "2" / "adapter_config.json"
    key = {"adapter": "scale", "lora": "lora_alpha", "prefix": "prefix_projection"}.get(name)
    if key:
        file.write_text(json.dumps({**json.loads(file.read_text()), key: 3}))
        with pytest.raises(InputError, match=f"place of `y`: {key} is 3"):
            compose.swap(model, "y", tmp_path / "2")
    assert torch.equal(logits(model), found[1])


def test_a_module_that_another_delta_reads_outlives_its_own(tmp_path: Path) -> None:
    every = {
        "lora": LoraConfig(r=2, target_modules=["gate_proj"]),
        "parallel": ParallelAdapterConfig(
            target_modules=["down_proj"], input_modules=["gate_proj"], bottleneck_dim=4
        ),
    }
    model = compose.attach(llama(), every)
    train(model)
    with compose.active(model, ["parallel"]):
        wanted = logits(model)
    model = compose.unplug(model, "lora")
    assert torch.equal(logits(model), wanted)
    model = compose.unplug(model, "parallel")
    assert list(model.state_dict()) == list(llama().state_dict())


def test_generating_follows_the_active_deltas() -> None:
    every = configs("llama")
    base = llama().generate(IDS[:1], max_new_tokens=8, do_sample=False)
    model = compose.attach(llama(), {n: every[n] for n in ("lora", "adapter", "prefix")})
    train(model, 12)
    model.eval()
    assert not torch.equal(model.generate(input_ids=IDS[:1], max_new_tokens=8), base)
    with compose.active(model, None):
        assert torch.equal(model.generate(input_ids=IDS[:1], max_new_tokens=8), base)


def test_adapters_behind_one_module_keep_their_order() -> None:
    one, other = (AdapterConfig(target_modules=["mlp"], bottleneck_dim=d) for d in (3, 4))
    model = compose.attach(llama(), {"one": one, "other": other})
    train(model)
    both = logits(model)
    with compose.active(model, ["other", "one"]):
        assert torch.equal(logits(model), both)
    with compose.active(model, ["other"]), compose.active(model, ["one"]):
        pass
    assert torch.equal(logits(model), both)
    layer = model.model.layers[1].mlp
    x = torch.randn(2, 16)
    first, second = (layer.delta_adapter.bottlenecks[n] for n in ("one", "other"))
    h = llama().model.layers[1].mlp(x)
    h = h + first(h)
    torch.testing.assert_close(layer(x), h + second(h))
