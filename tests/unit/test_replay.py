"""Notes in the place of cheap activations: the same gradients, bit for bit, in fewer bytes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bmkit.train import checkpointing
from bmkit.train.activations import counted
from bmkit.train.dropout import replace_dropout
from bmkit.train.fused_lora import fuse
from bmkit.train.replay import Note, Replay, noted

Build = Callable[..., Any]
TEXT = ["llama", "qwen3", "gemma3", "phi3", "gpt2", "gpt_neox", "bloom", "opt", "falcon", "mpt"]
TEXT += ["qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "bert", "roberta", "electra", "albert"]
TEXT += ["distilbert", "deberta_v2", "modernbert", "t5", "t5_gated", "bart"]


def batch(rows: int = 2) -> dict[str, Tensor]:
    ids = torch.arange(3, 3 + 14 * rows).remainder(39).view(rows, 14) + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loss(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, int]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    more: dict[str, Any] = {}
    if base.config.is_encoder_decoder:
        more = {"decoder_input_ids": given["input_ids"], "use_cache": False}
    return model(**given, **more).logits.float().square().sum(), 1


def with_lora(model: Any, dropout: float = 0.0) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout
    )
    return get_peft_model(model, config).train()


def step(model: Any, loss: Any = loss) -> dict[str, Tensor]:
    """Return the gradients of a step that draws the same random numbers each time."""
    model.zero_grad()
    torch.manual_seed(7)
    loss(model, batch())[0].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def kept_bytes(model: Any, loss: Any = loss) -> int:
    with counted(model) as kept:
        loss(model, batch())
    return kept.total


@pytest.mark.parametrize("trained", ["lora", "fused", "all"])
@pytest.mark.parametrize("name", TEXT)
def test_gradients_are_the_same_bits_in_fewer_bytes(
    architecture: Build, name: str, trained: str
) -> None:
    model = architecture(name, real=True)
    model = model.train() if trained == "all" else with_lora(model)
    if trained == "fused":
        fuse(model)
    plain, before = step(model), kept_bytes(model)
    with noted(model, loss, lambda: batch(1)) as lean:
        assert same(step(model, lean), plain)
        assert same(step(model, lean), plain)
        assert kept_bytes(model, lean) <= before
    assert same(step(model), plain) and kept_bytes(model) == before


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_llama_under_lora_keeps_less_than_two_thirds(
    architecture: Build, dropout: float, fused: bool
) -> None:
    wide = {"intermediate_size": 48, "num_hidden_layers": 6}
    model = with_lora(architecture("llama", real=True, **wide), dropout)
    replace_dropout(model)
    if fused:
        assert fuse(model) == 6 * 7
    plain, before = step(model), kept_bytes(model)
    with noted(model, loss, lambda: batch(1)) as lean:
        assert same(step(model, lean), plain)
        assert kept_bytes(model, lean) < 0.65 * before


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5_gated"])
def test_blocks_that_run_again_keep_no_notes(architecture: Build, name: str, fused: bool) -> None:
    model = with_lora(architecture(name, real=True), 0.3 if fused else 0.0)
    if fused:
        replace_dropout(model)
        fuse(model)
    model.config.use_cache = False  # as where blocks run again: a cache lays keys out otherwise
    plain, blocks = step(model), checkpointing.blocks_of(model)
    with noted(model, loss, lambda: batch(1)) as lean, checkpointing.recomputed(model, blocks):
        assert same(step(model, lean), plain)
        assert kept_bytes(model, lean) == kept_bytes(model)


class Doubled(nn.Module):
    """A norm whose input is changed behind it, and what autograd has kept of it is a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = CopyingNorm()
        self.last = nn.Linear(8, 8)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.first(values)
        normed = self.norm(hidden)
        hidden += 1
        return self.last(normed) + hidden


class CopyingNorm(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return functional.layer_norm(values.clone(), (8,))


def test_a_norm_whose_input_changes_is_left_alone() -> None:
    torch.manual_seed(0)
    model, values = Doubled(), torch.randn(4, 8)
    other = copy.deepcopy(model)
    other(values).square().sum().backward()
    notes = Replay(model)
    notes.learn(lambda: model(values))
    assert notes.odd == {model.norm}
    with notes.kept():
        found = model(values).square().sum()
    found.backward()
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
        if a.grad is not None and b.grad is not None
    )


def test_an_activation_that_draws_random_numbers_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.RReLU(), nn.Linear(8, 8)).train()
    notes = Replay(model)
    notes.learn(lambda: model(torch.randn(64, 8)))
    assert notes.odd == {model[1]}


def test_what_was_not_reached_while_trying_is_kept_as_it_is() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.last = nn.SiLU(), nn.GELU(), nn.Linear(8, 8)

        def forward(self, values: Tensor, one: bool) -> Tensor:
            return self.last(self.one(values) if one else self.other(values))

    model, values = Either(), torch.randn(4, 8, requires_grad=True)
    notes = Replay(model)
    notes.learn(lambda: model(values, True))
    with notes.kept():
        model(values, True)
        noted_one = len(notes.notes)
        notes.notes.clear()
        model(values, False)
        assert (noted_one, len(notes.notes)) == (1, 0)


def test_trying_it_out_counts_no_step() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, values: Tensor) -> Tensor:
            self.steps += 1
            return functional.silu(self.inner(values))

    def loss(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, int]:
        return model(given["values"]).sum(), 1

    model, given = Counting(), {"values": torch.ones(2, 4)}
    with noted(model, loss, lambda: given) as lean:
        assert int(model.steps) == 0
        lean(model, given)
    assert int(model.steps) == 1


def test_notes_are_gone_with_the_graph(
    architecture: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Note]] = []
    init = Note.__init__

    def watched(self: Note, *args: Any) -> None:
        init(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Note, "__init__", watched)
    model = with_lora(architecture("llama", real=True))
    with noted(model, loss, lambda: batch(1)) as lean:
        made.clear()
        found, _ = lean(model, batch())
        alive = [ref for ref in made if ref() is not None]
        assert made and alive
        found.backward()
        del found
        gc.collect()
        assert [ref for ref in made if ref() is not None] == []
