"""Dividing models of several families into experts, and computing by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen2MoeConfig,
)

from bmkit.compress import moefy
from bmkit.compress.options.experts import Moefy
from bmkit.errors import InputError, RecipeError
from bmkit.nn.feed_forward import find
from bmkit.report import Silent
from bmkit.runtime import experts
from bmkit.runtime.experts import DENSE, Experts, Router, attach, chosen_mask

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "vocab_size": 300,
    "num_attention_heads": 2,
}
PLAIN = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=8),
    "opt": OPTConfig(**PLAIN, ffn_dim=48, word_embed_proj_dim=32),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "falcon": FalconConfig(**SMALL, ffn_hidden_size=48),
    "bert": BertConfig(**SMALL),
}
GATES = {"llama": "mlp.gate_proj", "gemma3": "mlp.gate_proj"}


def saved(config: Any, path: Path) -> Any:
    torch.manual_seed(0)
    kind: Any = AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.25)
    model.save_pretrained(path)
    return model


def rows_of(count: int = 9, length: int = 20) -> Tensor:
    return torch.randint(3, 290, (count, length), generator=torch.Generator().manual_seed(1))


def walked(path: Path, folder: Path, **options: Any) -> Any:
    step = Moefy(method="moefy", **{"size": 4, "active": 0.5, **options})
    return moefy.walk_blocks(path, step, rows_of(), folder, seed=0, device=CPU, reporter=Silent())


STACKS = {
    "opt": "model.decoder.layers",
    "gpt-neox": "gpt_neox.layers",
    "bert": "bert.encoder.layer",
    "falcon": "transformer.h",
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_model_in_its_new_order_says_what_it_said(name: str, tmp_path: Path) -> None:
    model = saved(FAMILIES[name], tmp_path / "m")
    moved, found, figures = walked(tmp_path / "m", tmp_path / "w")
    rows = rows_of(2)
    before = model(input_ids=rows).logits
    state = model.state_dict()
    for stored, (dim, order) in moved.items():
        assert sorted(order.tolist()) == list(range(48))
        assert order.tolist() != list(range(48))
        whole = stored if stored in state else f"{model.base_model_prefix}.{stored}"
        state[whole].copy_(state[whole].index_select(dim, order))
    assert torch.allclose(model(input_ids=rows).logits, before, rtol=1e-3, atol=1e-3)
    assert figures.blocks == 3
    assert figures.active == pytest.approx(0.5, abs=0.03)
    assert 0.5 < figures.energy < 1
    assert 0.5 < figures.recall <= 1
    assert (found.size, found.shared) == (4, 2)
    # Computing by experts is computing with the others at zero.
    attached = attach(model, found)
    by_experts = model(input_ids=rows).logits
    assert not torch.allclose(by_experts, before, atol=1e-2)
    attached.detach()
    for i, block in enumerate(model.get_submodule(STACKS.get(name, "model.layers"))):
        one = find(block)
        assert one is not None
        assert one.gate == GATES.get(name)
        brute_force(block, one, found, i)
    assert torch.allclose(model(input_ids=rows).logits, by_experts, rtol=1e-4, atol=1e-4)


def brute_force(block: Any, one: Any, found: Experts, i: int) -> None:
    """Let a block compute, token by token, only the neurons that are chosen."""
    up, down = (block.get_submodule(n) for n in (one.up, one.down))
    seen: list[Tensor] = []
    up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    router = found.routers[i]
    assert router is not None

    def compute(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = seen.pop().reshape(-1, 32)
        activations = args[0].reshape(len(x), -1)
        keep = chosen_mask(router, x, chosen=found.chosen[i], shared=found.shared, size=found.size)
        made = []
        for a, k in zip(activations, keep, strict=True):
            made.append(down.weight[:, k] @ a[k] + (0 if down.bias is None else down.bias))
        return torch.stack(made).reshape(out.shape)

    down.register_forward_hook(compute)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": "mlp"},
        {"router": "similarity"},
        {"cluster": "weights"},
        {"cluster": "coactivation"},
    ],
)
def test_a_stopped_walk_goes_on_and_ends_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    saved(FAMILIES["llama"], tmp_path / "m")
    moved, found, figures = walked(tmp_path / "m", tmp_path / "w", **options)
    files = sorted((tmp_path / "w").glob("*.safetensors"))
    kept = [f.stat().st_mtime_ns for f in (files[0], files[3])]
    for file in (*files[1:3], *files[4:]):
        file.unlink()
    again = walked(tmp_path / "m", tmp_path / "w", **options)
    assert [f.stat().st_mtime_ns for f in (files[0], files[3])] == kept
    assert figures == again[2]
    assert {n: o.tolist() for n, (_, o) in moved.items()} == {
        n: o.tolist() for n, (_, o) in again[0].items()
    }
    for folder, those in (("a", found), ("b", again[1])):
        (tmp_path / folder).mkdir()
        experts.write(tmp_path / folder, those)
    a, b = ((tmp_path / folder / experts.FILE).read_bytes() for folder in "ab")
    assert a == b


def test_routers_are_fitted_to_what_earlier_blocks_say_by_then(tmp_path: Path) -> None:
    saved(FAMILIES["llama"], tmp_path / "m")
    routers = []
    for active in (0.3, 1.0):
        _, found, _ = walked(tmp_path / "m", tmp_path / f"w{active}", active=active)
        routers.append(found.routers)
    for i, (few, all_) in enumerate(zip(*routers, strict=True)):
        assert torch.equal(few.weight, all_.weight) == (i == 0)


def test_with_all_neurons_active_nothing_is_lost(tmp_path: Path) -> None:
    saved(FAMILIES["opt"], tmp_path / "m")
    _, found, figures = walked(tmp_path / "m", tmp_path / "w", active=1.0)
    assert found.chosen == (10, 10, 10)
    assert (figures.active, figures.recall) == (1.0, 1.0)
    assert figures.energy == pytest.approx(1.0, rel=1e-5)


def test_a_router_that_is_fitted_captures_more_than_one_that_is_not(tmp_path: Path) -> None:
    """Blocks whose neurons see one input each: which are needed is plain from the input."""
    model = saved(FAMILIES["opt"], tmp_path / "m")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.weight.copy_(torch.eye(32).repeat(2, 1)[:48])
    model.save_pretrained(tmp_path / "m")
    energy = {
        router: walked(tmp_path / "m", tmp_path / router, router=router, shared=0.0)[2].energy
        for router in ("linear", "mlp", "similarity")
    }
    assert energy["mlp"] >= energy["linear"] - 1e-3
    assert energy["linear"] > 0.6


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300),
        Qwen2MoeConfig(
            **GROUPED,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        Phi3Config(**GROUPED, pad_token_id=0),
    ],
    ids=["gpt2", "qwen2-moe", "phi3"],
)
def test_models_without_a_known_feed_forward_are_refused(config: Any, tmp_path: Path) -> None:
    saved(config, tmp_path / "m")
    with pytest.raises(InputError, match="no feed-forward is known"):
        walked(tmp_path / "m", tmp_path / "w")


def test_sizes_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    saved(FAMILIES["llama"], tmp_path / "m")
    with pytest.raises(RecipeError, match="size: 5 does not divide a feed-forward of 48") as raised:
        walked(tmp_path / "m", tmp_path / "w", size=5)
    assert raised.value.hint == "size may be 8, 16, 24, 48"
    with pytest.raises(RecipeError, match="experts: 7"):
        walked(tmp_path / "m", tmp_path / "w", experts=7)
    assert walked(tmp_path / "m", tmp_path / "w", experts=12)[1].size == 4


def test_experts_of_another_model_are_refused(tmp_path: Path) -> None:
    model = saved(FAMILIES["llama"], tmp_path / "m")
    router = Router(torch.zeros(10, 32), torch.zeros(10))
    for wrong in (
        Experts(4, 2, (3, 3), (router, router)),
        Experts(8, 2, (3, 3, 3), (router,) * 3),
        Experts(4, 2, (3, DENSE, 3), (Router(torch.zeros(10, 16), torch.zeros(10)), None, router)),
    ):
        with pytest.raises(InputError, match="block"):
            attach(model, wrong)


def test_gradients_reach_the_neurons_that_are_computed_and_routers_that_learn(
    tmp_path: Path,
) -> None:
    model = saved(FAMILIES["llama"], tmp_path / "m")
    router = Router(torch.randn(10, 32), torch.tensor([9.0] * 3 + [-99.0] * 7))
    divided = Experts(4, 2, (3, DENSE, 3), (router, None, router))
    for learns in (False, True):
        attached = attach(model, divided, learns=learns)
        before = len(list(model.parameters()))
        model.zero_grad()
        model(input_ids=rows_of(2), labels=rows_of(2)).loss.backward()
        gradient = model.model.layers[0].mlp.up_proj.weight.grad
        assert bool(gradient[:20].any()) and not gradient[20:].any()
        assert model.model.layers[1].mlp.up_proj.weight.grad[20:].any()
        learned = attached.routed["0"].weight.grad
        assert (learned is not None and bool(learned.any())) == learns
        after = attached.detach()
        assert len(list(model.parameters())) == before - 4 * learns
        assert not any("router" in name for name in model.state_dict())
        assert after.routers[1] is None and after.routers[0] is not None
        assert torch.equal(after.routers[0].weight, router.weight)


def test_of_some_blocks_their_experts_are_left() -> None:
    routers = tuple(Router(torch.full((10, 32), float(i)), torch.zeros(10)) for i in range(3))
    left = Experts(4, 2, (3, 4, 5), routers).of([0, 2])
    assert left.chosen == (3, 5)
    assert left.routers == (routers[0], routers[2])
