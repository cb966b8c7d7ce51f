"""What the matrices of bottlenecks are, against products written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from bmkit.deltas.own import AdapterConfig

IDS = torch.tensor([[5, 9, 3, 7, 2, 11]])


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def noise(model: nn.Module) -> dict[str, Tensor]:
    """Give deltas values that matter; return them by their names behind the module's."""
    draws = torch.Generator().manual_seed(1)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=draws) * 0.3
            found[name.partition("layers.")[2]] = parameter.data
    return found


class Net(nn.Module):
    """A module with a block that gives what it is told to, of the width of its last layer."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda h: h) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.wrap = Block(wrap), wrap

    def forward(self, x: Tensor) -> Any:
        return self.block(x)


class Block(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two, self.wrap = nn.Linear(8, 12), nn.Linear(12, 6, bias=False), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.two(torch.relu(self.one(x))))


def values(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    tag = f".{adapter}."
    return {n.partition(tag)[2]: p for n, p in model.named_parameters() if tag in n}


def test_compacter_is_a_sum_of_kronecker_products() -> None:
    config = AdapterConfig(
        target_modules=["q_proj", "down_proj"],
        linear="phm",
        reduction_factor=2,
        hypercomplex_division=4,
        phm_rank=2,
        non_linearity="relu",
    )
    model = inject_adapter_in_model(config, llama(), "a")
    v = noise(model)
    held = "delta_adapter.bmkit_adapter_layers.a."
    rules = [v[name] for name in v if "rule" in name]
    assert [tuple(r.shape) for r in rules] == [(4, 4, 4)]  # one for all
    x = torch.randn(3, 16)
    for layer in (0, 1):
        where = f"{layer}.self_attn.q_proj.{held}"
        matrices = {}
        for way in ("down", "up"):
            left, right = (v[f"{where}{way}.{side}"] for side in ("left", "right"))
            matrices[way] = sum(torch.kron(rules[0][i], left[i] @ right[i]) for i in range(4))
        assert matrices["down"].shape == (8, 16)
        module = model.model.layers[layer].self_attn.q_proj
        h = functional.linear(x, module.weight)
        inner = torch.relu(functional.linear(h, matrices["down"], v[f"{where}down.bias"]))
        wanted = h + functional.linear(inner, matrices["up"], v[f"{where}up.bias"])
        torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_the_rule_of_compacter_is_shared_and_learned_as_told(
    shared: bool, learn: bool, tmp_path: Path
) -> None:
    config = AdapterConfig(
        target_modules=["self_attn", "mlp"],
        linear="phm",
        bottleneck_dim=8,
        shared_phm_rule=shared,
        learn_phm=learn,
        phm_rank=None,
    )
    model = get_peft_model(llama(), config)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "rule" in n]
    assert len(trained) == (0 if not learn else 1 if shared else 8)
    noise(model)
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("rule" in name for name in stored) == (1 if shared else 8)
    for slim in (False, True):
        base = llama()
        torch.manual_seed(9)  # another rule is drawn
        again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=slim)
        with torch.no_grad():
            assert torch.equal(again(input_ids=IDS).logits, wanted)
        used = {id(m.shared[0].weight) for m in again.modules() if hasattr(m, "shared")}
        assert len(used) == (1 if shared else 8)


def test_low_rank_matrices_are_products_of_any_rank() -> None:
    config = AdapterConfig(
        target_modules=["two"],
        linear="low_rank",
        low_rank_rank=3,
        bottleneck_dim=5,
        non_linearity="linear",
    )
    model = inject_adapter_in_model(config, Net(), "a")
    noise(model)
    v, x = values(model, "a"), torch.randn(2, 8)
    h = Net()(x)
    down, up = (v[f"{way}.left"] @ v[f"{way}.right"] for way in ("down", "up"))
    assert torch.linalg.matrix_rank(down) == 3
    inner = h @ down.T + v["down.bias"]
    torch.testing.assert_close(model(x), h + inner @ up.T + v["up.bias"])


@pytest.mark.parametrize("linear", ["dense", "low_rank", "phm"])
def test_the_way_down_is_drawn_with_the_deviation_that_is_asked_for(linear: str) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(512, 512))
    config = AdapterConfig(
        target_modules=["0"],
        linear=linear,
        bottleneck_dim=512,
        init_std=0.02,
        low_rank_rank=64,
        phm_rank=64,
        hypercomplex_division=16,
    )
    model = inject_adapter_in_model(config, block, "a")
    bottleneck = model[0].delta_adapter.bottlenecks["a"]
    assert bottleneck.down.matrix().std().item() == pytest.approx(0.02, rel=0.1)
    assert not bottleneck.up.matrix().any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"non_linearity": "gelu_neww"}, "did you mean `gelu_new`"),
        ({"linear": "sparse"}, "`sparse` is not one of dense, low_rank, phm"),
        ({"bottleneck_dim": 4, "reduction_factor": 2}, "not both"),
        ({"bottleneck_dim": 0}, "bottleneck_dim: 0 is not above 0"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"target_modules": []}, "name the modules"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AdapterConfig(**{"target_modules": ["mlp"], **options})
