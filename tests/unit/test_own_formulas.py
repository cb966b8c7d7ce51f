"""What bmkit's delta methods compute, against the papers' formulas written out."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from bmkit.deltas.own import AdapterConfig, BitFitConfig, ParallelAdapterConfig
from bmkit.deltas.tuners.parallel_adapter import source
from bmkit.deltas.tuners.width import input_width, output_width

IDS = torch.tensor([[5, 9, 3, 7, 2, 11]])


def llama(layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=layers,
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


@pytest.mark.parametrize("output", ["tensor", "tuple", "list", "output"])
def test_an_adapter_changes_the_first_thing_that_a_block_gives(output: str) -> None:
    wrap: dict[str, Callable[[Tensor], Any]] = {
        "tensor": lambda h: h,
        "tuple": lambda h: (h, "rest", None),
        "list": lambda h: [h, "rest"],
        "output": lambda h: BaseModelOutput(last_hidden_state=h, attentions=(h,)),
    }
    x = torch.randn(2, 3, 8)
    h = Net()(x)
    config = AdapterConfig(
        target_modules=["block"], bottleneck_dim=5, non_linearity="tanh", scale=0.5
    )
    model = inject_adapter_in_model(config, Net(wrap[output]), "a")
    noise(model)
    v = values(model, "a")
    inner = torch.tanh(h @ v["down.weight"].T + v["down.bias"])  # [.., 5]
    wanted = h + 0.5 * (inner @ v["up.weight"].T + v["up.bias"])
    found = model(x)
    torch.testing.assert_close(found if output == "tensor" else found[0], wanted)
    if output == "output":
        assert isinstance(found, BaseModelOutput)
        assert torch.equal(found.attentions[0], h)
        assert found.last_hidden_state is found[0]
    elif output != "tensor":
        assert type(found) is type(wrap[output](h)) and found[1] == "rest"


def test_active_adapters_read_one_after_the_other() -> None:
    x, h = torch.randn(2, 8), None
    model = get_peft_model(Net(), AdapterConfig(target_modules=["two"], bottleneck_dim=3), "a")
    model.add_adapter("b", AdapterConfig(target_modules=["two"], bottleneck_dim=4))
    model.set_requires_grad("b")
    noise(model)
    for order in (["a", "b"], ["b", "a"]):
        model.base_model.set_adapter(order)
        h = Net()(x)
        for name in order:
            v = values(model, name)
            inner = functional.gelu(h @ v["down.weight"].T + v["down.bias"], approximate="tanh")
            h = h + inner @ v["up.weight"].T + v["up.bias"]
        torch.testing.assert_close(model(x), h)


def test_a_parallel_adapter_goes_from_the_input_of_one_module_to_the_output_of_another() -> None:
    x = torch.randn(2, 3, 8)
    config = ParallelAdapterConfig(
        target_modules=".*two", input_modules=["net.0.one"], bottleneck_dim=3
    )
    net = nn.Module()
    net.net = nn.ModuleList([Block(lambda h: h)])
    layer = net.net[0]
    base = layer(x)
    model = inject_adapter_in_model(config, net, "a")
    noise(model)
    v = values(model, "a")
    assert v["down.weight"].shape == (3, 8) and v["up.weight"].shape == (6, 3)
    inner = functional.gelu(x @ v["down.weight"].T + v["down.bias"], approximate="tanh")
    wanted = base + 4 * (inner @ v["up.weight"].T + v["up.bias"])
    for _ in range(2):
        torch.testing.assert_close(layer(x), wanted)
    with pytest.raises(ValueError, match="ran before the module"):
        layer.two(torch.randn(2, 12))


def test_a_parallel_adapter_stands_beside_attention_and_feed_forward() -> None:
    config = ParallelAdapterConfig(
        target_modules=["self_attn", "down_proj"],
        input_modules=["self_attn", "gate_proj"],
        bottleneck_dim=3,
        scale=2.0,
        non_linearity="relu",
    )
    model = get_peft_model(llama(), config)
    noise(model)
    seen: dict[str, Any] = {}
    block = model.base_model.model.model.layers[1]
    for name in ("self_attn", "mlp"):
        block.get_submodule(name).register_forward_hook(
            lambda m, a, k, out, name=name: seen.update(
                {name: (a[0] if a else k["hidden_states"], out)}
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(input_ids=IDS)
        plain = llama().model.layers[1]
        for name, host in (("self_attn", block.self_attn), ("mlp", block.mlp.down_proj)):
            x, out = seen[name]
            v = values(host, "default")
            change = torch.relu(x @ v["down.weight"].T + v["down.bias"]) @ v["up.weight"].T
            change = 2 * (change + v["up.bias"])
            if name == "mlp":
                torch.testing.assert_close(out, plain.mlp(x) + change)
            else:
                angles = model.base_model.model.model.rotary_emb(x, torch.arange(6)[None])
                mask = torch.full((6, 6), -torch.inf).triu(1)[None, None]
                own = plain.self_attn(x, position_embeddings=angles, attention_mask=mask)[0]
                torch.testing.assert_close(out[0], own + change, rtol=1e-4, atol=1e-5)


def test_unloading_takes_the_ear_of_a_parallel_adapter_away_as_well() -> None:
    config = ParallelAdapterConfig(target_modules=["down_proj"], input_modules=["gate_proj"])
    model = get_peft_model(llama(), config)
    model.add_adapter("b", config)
    model.delete_adapter("default")
    ears = model.base_model.model.model.layers[0].mlp.gate_proj._forward_pre_hooks
    assert len(ears) == 1
    bare = model.unload()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in bare.modules())


def test_a_model_is_copied_between_the_two_modules_of_a_parallel_adapter() -> None:
    config = ParallelAdapterConfig(target_modules=["down_proj"], input_modules=["gate_proj"])
    model = get_peft_model(llama(), config)
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.gate_proj(torch.randn(2, 16, requires_grad=True) * 1)  # as a checkpoint that stops early
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_the_input_is_found_in_the_same_block_or_it_is_refused() -> None:
    pairs = [f"h.{i}.{name}" for i in (1, 10) for name in ("attn", "mlp.up", "mlp.gate")]
    assert source("h.1.mlp.down", ["h.1.mlp.up", "h.10.mlp.up"]) == "h.1.mlp.up"
    assert source("h.1.mlp.down", ["h.1.attn", "h.1.mlp.up"]) == "h.1.mlp.up"
    assert source("h.10.attn", pairs) == "h.10.attn"
    with pytest.raises(ValueError, match=r"several: h\.1\.mlp\.up, h\.1\.mlp\.gate"):
        source("h.1.mlp.down", pairs)
    with pytest.raises(ValueError, match=r"none in h\.2"):
        source("h.2.mlp.down", pairs)
    with pytest.raises(ValueError, match="in no numbered block"):
        source("head", pairs)


def test_biases_of_several_adapters_add_up_on_a_layer_with_and_without_one() -> None:
    model = get_peft_model(Net(), BitFitConfig(target_modules=["one", "two"]), "a")
    model.add_adapter("b", BitFitConfig(target_modules=["one", "two"]))
    model.set_requires_grad("b")
    noise(model)
    model.base_model.set_adapter(["a", "b"])
    x, plain = torch.randn(2, 8), Net().block
    block = model.base_model.model.block
    one, two = (sum(m.delta_bitfit.bmkit_bitfit_bias.values()) for m in (block.one, block.two))
    torch.testing.assert_close(model(x), plain.two(torch.relu(plain.one(x) + one)) + two)


class Packed(nn.Module):
    """A quantised linear layer as runtimes have them: sizes, and no weight to look at."""

    in_features, out_features = 8, 12

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.ones(12, 8, dtype=torch.int8))

    @property
    def weight(self) -> Tensor:
        raise RuntimeError("nobody asks for it")

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.codes.to(x.dtype).T


@pytest.mark.parametrize("kind", [AdapterConfig, ParallelAdapterConfig, BitFitConfig])
def test_the_weight_of_a_quantised_layer_is_left_alone(kind: Any, tmp_path: Path) -> None:
    def make() -> Any:
        net = Net()
        net.block.one = Packed()
        return net

    x = torch.randn(2, 8)
    base = make()(x)
    model = get_peft_model(make(), kind(target_modules=["one"]))
    assert torch.equal(model(x), base)
    noise(model)
    changed = model(x)
    assert not torch.equal(changed, base)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(again(x), changed)
    with pytest.raises(ValueError, match=r"no bias|isn't linear"):
        model.merge_and_unload()
    assert torch.equal(model.unload()(x), base)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (AdapterConfig(target_modules=["layers"]), "model.layers: it holds modules"),
        (AdapterConfig(target_modules=["mlp"], linear="phm", bottleneck_dim=6), "4 divides not"),
        (ParallelAdapterConfig(target_modules=["embed_tokens"]), "takes numbers of tokens"),
        (BitFitConfig(target_modules=["mlp"]), "no linear layer and no norm"),
        (AdapterConfig(target_modules=["act_fn"]), "can't be told"),
    ],
    ids=lambda c: c.peft_type if hasattr(c, "peft_type") else c,
)
def test_a_module_that_can_have_no_delta_is_refused_and_nothing_is_left(
    config: Any, said: str
) -> None:
    model = llama()
    with pytest.raises(ValueError, match=said):
        inject_adapter_in_model(config, model)
    assert list(model.state_dict()) == list(llama().state_dict())
    assert not any(m._forward_hooks for m in model.modules())


def test_widths_are_those_that_come_out() -> None:
    model, seen = llama(), {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, a, out, name=name: seen.update(
                {name: (a, out if isinstance(out, Tensor) else out[0])}
            )
        )
    model(input_ids=IDS)
    told = [n for n in seen if "layers." in n and "act_fn" not in n]
    assert len(told) == 2 * 12
    for name in told:
        (given, out), module = seen[name], model.get_submodule(name)
        assert output_width(module, model.config) == out.shape[-1], name
        if given:
            assert input_width(module, model.config) == given[0].shape[-1], name


def test_lora_inside_keeps_the_width_of_a_block() -> None:
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear"), llama())
    for name in ("model.layers.0", "model.layers.0.mlp", "model.layers.0.self_attn"):
        assert output_width(model.get_submodule(name), model.config) == 16
    model = inject_adapter_in_model(AdapterConfig(target_modules=["mlp", "q_proj"]), model)
    assert torch.isfinite(model(input_ids=IDS).logits).all()


def test_lora_goes_under_and_over_an_adapter() -> None:
    block = AdapterConfig(target_modules=["model.layers.1", "q_proj"], bottleneck_dim=4)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    x = torch.randn(3, 16)
    for order in ((block, lora), (lora, block)):
        model = llama()
        for config in order:
            inject_adapter_in_model(config, model, "b" if config is block else "l")
        for n, p in model.named_parameters():
            if "delta_adapter" in n:
                p.data = torch.randn_like(p) * 0.1
        layer = model.model.layers[0].self_attn.q_proj
        weight = llama().model.layers[0].self_attn.q_proj.weight
        update = 4 * (layer.lora_B["l"].weight @ layer.lora_A["l"].weight)  # alpha 8 / r 2
        beside = (layer.base_layer if config is lora else layer).delta_adapter
        change = beside.bottlenecks["b"]
        if config is lora:
            h = x @ weight.T
            wanted = h + change(h) + x @ update.T
        else:
            h = x @ (weight + update).T
            wanted = h + change(h)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
        assert hasattr(model.model.layers[1].mlp.down_proj, "lora_A")  # inside the block


def test_names_of_which_one_begins_another_are_told_apart() -> None:
    model = llama(layers=11)
    targets = ["model.layers.1", "model.layers.1.mlp", "model.layers.10.mlp.down_proj"]
    model = inject_adapter_in_model(AdapterConfig(target_modules=targets), model)
    assert [
        n.removesuffix(".delta_adapter")
        for n, _ in model.named_modules()
        if n.endswith(".delta_adapter")
    ] == ["model.layers.1.mlp", "model.layers.1", "model.layers.10.mlp.down_proj"]


def test_excluded_modules_stay_as_they_are() -> None:
    config = BitFitConfig(target_modules="all-linear", exclude_modules=["k_proj", "down_proj"])
    model = inject_adapter_in_model(config, llama())
    found = {n.split(".")[-2] for n, m in model.named_modules() if n.endswith(".delta_bitfit")}
    assert found == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert not any(isinstance(m, nn.Linear) for n, m in model.named_modules() if "bitfit" in n)


CHILD = """
import sys
import bmkit
heavy = {"torch", "peft", "transformers"} & set(sys.modules)
assert not heavy, heavy
import bmkit.deltas.own
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2])
print(model(input_ids=torch.arange(5)[None]).logits.double().sum().item().hex())
"""


def test_plain_peft_loads_a_delta_in_a_process_that_has_imported_own(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, AdapterConfig(target_modules=["mlp"], bottleneck_dim=4))
    noise(model)
    model.save_pretrained(tmp_path / "delta")
    wanted = model(input_ids=torch.arange(5)[None]).logits.double().sum().item().hex()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "base"), str(tmp_path / "delta")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # the same sums
        timeout=300,
    )
    assert done.stdout.strip() == wanted, done.stderr
