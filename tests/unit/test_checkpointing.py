"""Activations that are computed again: the same gradients, in the bytes that were foretold."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bmkit.data.batch import Padding
from bmkit.errors import InputError
from bmkit.nn import products
from bmkit.report import Silent
from bmkit.train import checkpointing
from bmkit.train.activations import counted
from bmkit.train.checkpointing import Measured
from bmkit.train.loss import next_token_loss
from bmkit.train.recipe import Train
from bmkit.train.trainer import train

BLOCKS = 4


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=47,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).train()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=47, n_embd=16, n_layer=BLOCKS, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config).train()


def with_lora() -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        target_modules=["q_proj", "up_proj"], lora_dropout=0.4, init_lora_weights=False
    )
    return get_peft_model(llama(), config).train()


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": BLOCKS, "num_heads": 2}
    config = T5Config(vocab_size=47, **sizes, decoder_start_token_id=0)  # type: ignore[arg-type]
    return T5ForConditionalGeneration(config).train()


MODELS = [llama, gpt2, with_lora]


def batch(rows: int = 3) -> dict[str, Tensor]:
    ids = torch.arange(rows * 8).view(rows, 8) % 47
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def gradients(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(7)
    model.zero_grad(set_to_none=True)
    next_token_loss(model, batch())[0].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("made", MODELS)
@pytest.mark.parametrize("count", [1, BLOCKS])
@pytest.mark.parametrize("way", [nullcontext, products.quick])
def test_gradients_are_the_same_to_the_bit(made: Any, count: int, way: Any) -> None:
    model = made()
    with way():
        wanted = gradients(model)
    ran: list[int] = []
    blocks = checkpointing.blocks_of(model)
    for i, block in enumerate(blocks):
        inner = next(block.children())
        inner.register_forward_hook(lambda *_, i=i: ran.append(i))
    with way(), checkpointing.recomputed(model, blocks[:count]):
        found = gradients(model)
    assert sorted(ran) == sorted([*range(BLOCKS), *range(count)])
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert torch.equal(found[name], grad), name


def test_blocks_run_once_when_nothing_is_learned() -> None:
    model = llama()
    blocks = checkpointing.blocks_of(model)
    ran: list[int] = []
    blocks[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    with checkpointing.recomputed(model, blocks), torch.no_grad():
        model(**batch())
        model.eval()
    with checkpointing.recomputed(model, blocks):
        model(**batch()).loss.backward()
    assert len(ran) == 2


def test_blocks_that_run_again_find_no_keys_of_theirs_in_a_cache() -> None:
    model = t5()
    model.config.use_cache = model.decoder.config.use_cache = True
    blocks = checkpointing.blocks_of(model)
    ids = torch.arange(12).view(2, 6)
    with checkpointing.recomputed(model, blocks):
        said = model(input_ids=ids, labels=ids)
        said.loss.backward()
        assert said.past_key_values is None
    assert model.config.use_cache and model.decoder.config.use_cache


def test_blocks_get_their_own_forward_back() -> None:
    model = llama()
    blocks = checkpointing.blocks_of(model)
    mine = blocks[1].forward
    blocks[1].forward = mine
    with checkpointing.recomputed(model, blocks):
        assert all("forward" in vars(b) for b in blocks)
    assert ["forward" in vars(b) for b in blocks] == [False, True, False, False]
    assert blocks[1].forward is mine


def test_bytes_that_are_kept_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    values = torch.randn(5, 6, requires_grad=True)
    with counted(model, tuple(model)) as kept:
        hidden = model(values)
        (hidden * hidden).sum()
    # the first layer keeps what it reads, the second one too; the square its input, once
    assert kept.blocks == [4 * 30, 4 * 30]
    assert kept.rest == 4 * 30


def test_views_of_one_storage_are_counted_once_and_weights_not_at_all() -> None:
    model = nn.Linear(4, 4)
    values = torch.randn(3, 4, requires_grad=True)
    with counted(model) as kept:
        whole = values.exp()  # keeps what it says
        model(whole.view(1, 3, 4)) * model.weight.sum()
    assert kept.total == 4 * 12 + 4 + 4 * 12  # with the sum, and the product it is a factor of


@pytest.mark.parametrize("made", MODELS)
def test_what_is_foretold_is_what_is_kept(made: Any) -> None:
    model = made()
    one = {name: value[:1] for name, value in batch().items()}
    foretold = checkpointing.measured(model, one, next_token_loss).times(3)
    blocks = checkpointing.blocks_of(model)
    for count in range(BLOCKS):
        with checkpointing.recomputed(model, blocks[:count]), counted(model) as kept:
            next_token_loss(model, batch())
        assert 0.95 * kept.total <= foretold.peak(count) <= 1.1 * kept.total


def test_measuring_keeps_nothing_and_changes_nothing() -> None:
    model = llama()
    before = gradients(model)
    model.zero_grad(set_to_none=True)
    checkpointing.measured(model, batch(), next_token_loss)
    assert all(p.grad is None for p in model.parameters())
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in model.modules())
    after = gradients(model)
    assert all(torch.equal(after[name], grad) for name, grad in before.items())


def test_frozen_blocks_in_front_keep_nothing() -> None:
    model = llama()
    model.requires_grad_(False)
    blocks = checkpointing.blocks_of(model)
    blocks[2].requires_grad_(True)
    found = checkpointing.measured(model, batch(), next_token_loss)
    assert [size > 0 for size in found.blocks] == [False, False, True, True]
    small = checkpointing.again(model, "auto", batch, next_token_loss, rows=1, room=0)
    assert small == blocks[2:]


def test_as_few_blocks_as_it_takes_run_again() -> None:
    found = Measured([100, 100, 100, 100], [10, 10, 10, 10], rest=50)
    assert [found.peak(n) for n in range(5)] == [450, 360, 270, 180, 190]
    assert [found.fewest(room) for room in (1000, 450, 449, 270, 269, 180, 0)] == [
        *(0, 0, 1, 2, 3, 3, 4),
    ]


@pytest.mark.parametrize(
    ("setting", "room", "count"),
    [(False, 0, 0), (True, 10**9, BLOCKS), ("auto", 10**9, 0), ("auto", 0, BLOCKS)],
)
def test_the_setting_decides(setting: Any, room: int, count: int) -> None:
    model = llama()
    found = checkpointing.again(model, setting, batch, next_token_loss, rows=4, room=room)
    assert found == checkpointing.blocks_of(model)[:count]


def test_more_rows_take_more_blocks() -> None:
    model = llama()

    def one() -> dict[str, Tensor]:
        return batch(1)

    room = checkpointing.measured(model, one(), next_token_loss).times(4).peak(0)
    counts = [
        len(checkpointing.again(model, "auto", one, next_token_loss, rows=n, room=room))
        for n in (2, 4, 6, 8)
    ]
    assert counts[:2] == [0, 0]
    assert 0 < counts[2] < counts[3] <= BLOCKS


def test_free_memory_is_less_what_the_optimizer_takes() -> None:
    model = llama()
    most = checkpointing.free_bytes(model.requires_grad_(False))
    least = checkpointing.free_bytes(nn_of(10**9))
    assert 0 <= least < most


def nn_of(parameters: int) -> Any:
    """Return a model of so many trained parameters that take no memory."""
    model = llama()
    model.wide = nn.Parameter(torch.empty(1).expand(parameters))
    return model


def test_a_model_whose_blocks_are_not_clear_is_refused() -> None:
    with pytest.raises(InputError, match="no list of blocks"):
        checkpointing.again(nn.Linear(2, 2), True, batch, next_token_loss, rows=1)


@pytest.mark.parametrize("setting", [True, "auto"])
def test_training_learns_the_same(setting: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(9)]
    losses = []
    for one in (False, setting):
        spec = Train(max_steps=3, per_device_train_batch_size=2)
        trained = train(
            with_lora(),
            rows,
            Padding(0),
            spec.model_copy(update={"gradient_checkpointing": one}),
            seed=0,
            work=tmp_path / str(one),
            device=torch.device("cpu"),
            reporter=Silent(),
        )
        losses.append(trained.losses)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3
