"""AdaLoRAs beside other deltas: each keeps its own ranks, and plain PEFT reads it alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bmkit.data.batch import Padding
from bmkit.deltas import compose
from bmkit.deltas.merge import merge
from bmkit.report import Silent
from bmkit.train.ranks import Ranks
from bmkit.train.recipe import Train
from bmkit.train.trainer import train

IDS = torch.arange(12)[None]
SHARED = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
STEPS = 12


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, **heads)).eval()  # type: ignore[arg-type]


def ada(target_r: int = 2, where: list[str] = SHARED) -> PeftConfig:
    made = {"init_r": 6, "target_r": target_r, "total_step": 1, "target_modules": where}
    return AdaLoraConfig(**made, task_type="CAUSAL_LM")


def low() -> PeftConfig:
    return LoraConfig(r=2, target_modules=SHARED, init_lora_weights=False, task_type="CAUSAL_LM")


CASES: dict[str, dict[str, PeftConfig]] = {
    "alone": {"one": ada()},
    "on other layers": {"one": ada(2, SHARED[:1]), "two": ada(3, SHARED[1:])},
    "on the same layers": {"one": ada(1), "two": ada(4)},
    "names in each other": {"ada": ada(1), "adalora": ada(4)},
    "before lora": {"one": ada(), "low": low()},
    "behind lora": {"low": low(), "one": ada()},
}


def learn(model: Any, work: Path, steps: int, stop: int | None = None) -> None:
    """Train on a row that doesn't change; `stop` ends the run behind a checkpoint."""
    rows = [{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 4
    ranks = [Ranks(tuner, steps) for tuner in compose.tuners(model)]
    spec = Train(max_steps=steps, learning_rate=0.02, save_steps=4, per_device_train_batch_size=4)

    def loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        found = model(**batch).loss + sum(each.penalty() for each in ranks)
        if stop is not None and ranks[0].config.rank_pattern and next(count) >= stop:
            raise KeyboardInterrupt
        return found, 1

    count = itertools.count()
    device = torch.device("cpu")
    train(
        model,
        rows,
        Padding(0),
        spec,
        seed=0,
        work=work,
        device=device,
        reporter=Silent(),
        loss=loss,
        callbacks=ranks,
    )
    model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("case", CASES)
def test_each_is_saved_under_its_name_and_loads_alone_and_with_the_others(
    tmp_path: Path, case: str
) -> None:
    model = compose.attach(llama(), CASES[case])
    learn(model, tmp_path / "work", STEPS)
    names = list(CASES[case])
    assert compose.names(model) == names
    for name in names:
        compose.save(model, name, tmp_path / name)
        plain = PeftModel.from_pretrained(llama(), tmp_path / name).eval()
        with compose.active(model, [name]):
            alone = logits(model)
        assert not torch.equal(alone, logits(llama()))
        assert torch.allclose(logits(plain), alone, atol=1e-6)
        assert torch.allclose(logits(compose.load(llama(), {name: tmp_path / name})), alone)
    again = compose.load(llama(), {name: tmp_path / name for name in names})
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    for name, config in CASES[case].items():
        if isinstance(config, AdaLoraConfig):
            said = json.loads((tmp_path / name / "adapter_config.json").read_text())
            kept = said["rank_pattern"].values()
            assert sum(sum(ranks) for ranks in kept) == config.target_r * len(kept)
    compose.save(again, names[0], tmp_path / "copy")
    for file in (tmp_path / names[0]).iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    whole = logits(model)
    assert torch.allclose(logits(merge(again)), whole, atol=1e-5)


def test_two_go_on_from_a_checkpoint_as_if_never_stopped(tmp_path: Path) -> None:
    case = CASES["on the same layers"]
    whole, stopped, resumed = (compose.attach(seeded(), case) for _ in range(3))
    learn(whole, tmp_path / "whole", STEPS)
    with pytest.raises(KeyboardInterrupt):
        learn(stopped, tmp_path / "work", STEPS, stop=6)
    assert list((tmp_path / "work").glob("checkpoint-*"))
    learn(resumed, tmp_path / "work", STEPS)
    for name in case:
        compose.save(whole, name, tmp_path / "a" / name)
        compose.save(resumed, name, tmp_path / "b" / name)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            a, b = (tmp_path / side / name / file for side in "ab")
            assert a.read_bytes() == b.read_bytes()


def seeded() -> Any:
    model = llama()
    torch.manual_seed(1)
    return model


def test_one_that_is_taken_out_leaves_the_other_and_the_base(tmp_path: Path) -> None:
    model = compose.attach(llama(), CASES["on the same layers"])
    learn(model, tmp_path / "work", STEPS)
    with compose.active(model, ["two"]):
        alone = logits(model)
    assert len(compose.tuners(model)) == 2
    model = compose.unplug(model, "one")
    assert torch.equal(logits(model), alone) and len(compose.tuners(model)) == 1
    model = compose.unplug(model, "two")
    assert torch.equal(logits(model), logits(llama())) and not compose.tuners(model)
