"""Kept states of frozen blocks: the same losses and gradients, without running those blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bmkit.data.batch import Padding
from bmkit.data.chat import Example
from bmkit.errors import InputError, ResourceError
from bmkit.train.frozen import FrozenPrefix, cacheable, frozen_blocks, numbered, with_rows
from bmkit.train.loss import next_token_loss
from bmkit.train.stored_states import StoredStates

VOCABULARY = 47
BLOCKS = 4


def llama(**values: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=BLOCKS, **sizes, **values)
    return LlamaForCausalLM(config)


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return Gemma3ForCausalLM(config)


def gpt2(dropout: float = 0.0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": BLOCKS, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **rates))


def opt(**values: Any) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
        **{"dropout": 0.0, **values},
    )
    return OPTForCausalLM(config)


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


MODELS = [llama, gemma3, gpt2, opt, bert]


def blocks_of(model: Any) -> Any:
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == BLOCKS)
    return next(lists)


def top(made: Callable[[], Any], first: int = 2) -> Any:
    """Return a model whose blocks from `first` on are trained, and nothing else."""
    torch.manual_seed(0)
    model = made()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.requires_grad_(False)
    blocks_of(model)[first:].requires_grad_(True)
    return model.train()


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for tokens in (5, 9, 12, 3, 9, 7):
        ids = torch.randint(0, VOCABULARY, (tokens,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return numbered(made)


def masked_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Return an encoder's loss of saying its own tokens."""
    labels = batch["labels"]
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss, int((labels != -100).sum())


def of(loss: Any, model: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return a loss and its gradients."""
    model.zero_grad(set_to_none=True)
    total, _ = loss(model, dict(batch))
    total.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()), grads


@pytest.mark.parametrize("made", MODELS)
def test_later_epochs_have_the_losses_and_gradients_of_a_model_that_runs_whole(
    made: Any, tmp_path: Path
) -> None:
    model = top(made)
    plain = masked_loss if made is bert else next_token_loss
    rows, collate = examples(), with_rows(Padding(0))
    prefix = FrozenPrefix(model, tmp_path / "states")
    loss = prefix.around(plain)
    for first in (rows[:3], rows[3:]):
        loss(model, collate(first))
    ran = []
    for block in blocks_of(model)[:2]:
        for part in block.children():
            part.register_forward_hook(lambda *_: ran.append(1))
    for order in ([0, 3], [5, 1, 4], [2]):  # other batches than those of the first epoch
        batch = collate([rows[i] for i in order])
        ran.clear()
        found, grads = of(loss, model, batch)
        assert not ran
        wanted, real = of(plain, model, {k: v for k, v in batch.items() if "row" not in k})
        assert ran
        assert found == pytest.approx(wanted, rel=1e-5)
        assert grads.keys() == real.keys() and grads
        for name, grad in real.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5)
    assert prefix.skipped == 3


def test_states_are_those_of_the_model_to_the_bit(tmp_path: Path) -> None:
    model = top(llama)
    rows, collate = examples(), with_rows(Padding(0))
    prefix = FrozenPrefix(model, tmp_path / "states")
    prefix.around(next_token_loss)(model, collate(rows[:3]))
    given = Padding(0)(rows[:3])
    hidden = model(**given, output_hidden_states=True).hidden_states[2]
    for row in range(3):
        tokens = len(rows[row]["input_ids"])
        assert torch.equal(prefix.states.read(row), hidden[row, :tokens])


def test_a_lora_in_the_last_blocks_is_fit_for_it(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        target_modules=["q_proj", "down_proj"], layers_to_transform=[3], init_lora_weights=False
    )
    model = get_peft_model(llama(), config).train()
    assert (cacheable(model), frozen_blocks(model)) == (None, 3)
    rows, collate = examples(), with_rows(Padding(0))
    loss = FrozenPrefix(model, tmp_path / "states").around(next_token_loss)
    first, second = (of(loss, model, collate(rows)) for _ in range(2))
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    for name, grad in first[1].items():
        torch.testing.assert_close(second[1][name], grad)


def test_only_a_norm_behind_the_blocks_is_fit_for_it(tmp_path: Path) -> None:
    model = top(llama, first=BLOCKS)
    model.model.norm.requires_grad_(True)
    assert (cacheable(model), frozen_blocks(model)) == (None, BLOCKS)
    rows, collate = examples(), with_rows(Padding(0))
    prefix = FrozenPrefix(model, tmp_path / "states")
    loss = prefix.around(next_token_loss)
    first, second = (of(loss, model, collate(rows)) for _ in range(2))
    assert prefix.skipped == 1
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    torch.testing.assert_close(first[1]["model.norm.weight"], second[1]["model.norm.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_states_are_read_in_the_first_epoch_too(dtype: torch.dtype, tmp_path: Path) -> None:
    model = top(llama)
    rows, collate = examples(), with_rows(Padding(0))
    prefix = FrozenPrefix(model, tmp_path / "states", dtype=dtype)
    loss = prefix.around(next_token_loss)
    first, second = (of(loss, model, collate(rows))[0] for _ in range(2))
    assert first == second
    exact = of(next_token_loss, model, Padding(0)(rows))[0]
    assert first != exact
    assert first == pytest.approx(exact, rel=1e-2)
    assert prefix.states.bytes == 2 * 16 * sum(len(e["input_ids"]) for e in rows)


def test_states_that_float16_cannot_hold_are_kept_as_they_are(tmp_path: Path) -> None:
    model = top(llama)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e6)
    rows, collate = examples(), with_rows(Padding(0))
    prefix = FrozenPrefix(model, tmp_path / "states", dtype=torch.float16)
    prefix.around(next_token_loss)(model, collate(rows))
    assert prefix.states.read(0).dtype == torch.float32
    assert prefix.states.read(0).isfinite().all()


def test_rows_beyond_the_limit_run_through_all_blocks(tmp_path: Path) -> None:
    model = top(llama)
    rows, collate = examples(), with_rows(Padding(0))
    limit = 4 * 16 * (5 + 9 + 3)  # rows 0, 1 and 3 fit, in the order of the batches
    prefix = FrozenPrefix(model, tmp_path / "states", limit=limit)
    loss = prefix.around(next_token_loss)
    for _ in range(2):
        for batch in (rows[:2], rows[2:3], rows[3:]):
            given = collate(batch)
            found = of(loss, model, given)[0]
            plain = {k: v for k, v in given.items() if "row" not in k}
            assert found == pytest.approx(of(next_token_loss, model, plain)[0], rel=1e-5)
    assert prefix.skipped == 1
    assert prefix.states.bytes <= limit


def test_what_a_killed_run_has_kept_is_found_again(tmp_path: Path) -> None:
    model = top(llama)
    rows, collate = examples(), with_rows(Padding(0))
    first = FrozenPrefix(model, tmp_path / "states")
    first.around(next_token_loss)(model, collate(rows[:3]))
    index = tmp_path / "states" / "index.jsonl"
    index.write_bytes(index.read_bytes() + b'{"row": 3, "sha')  # killed while it wrote
    again = FrozenPrefix(model, tmp_path / "states")
    loss = again.around(next_token_loss)
    loss(model, collate(rows[:3]))
    assert again.skipped == 1
    loss(model, collate(rows[3:]))
    third = FrozenPrefix(model, tmp_path / "states")
    third.around(next_token_loss)(model, collate(rows))
    assert third.skipped == 1
    third.close()
    assert not (tmp_path / "states").exists()


def test_a_row_of_another_length_is_not_taken_for_the_one_that_is_kept(tmp_path: Path) -> None:
    model = top(llama)
    rows, collate = examples(), with_rows(Padding(0))
    prefix = FrozenPrefix(model, tmp_path / "states")
    loss = prefix.around(next_token_loss)
    loss(model, collate(rows[:1]))
    changed = {**rows[1], "row": [0]}
    found = of(loss, model, collate([changed]))[0]
    assert prefix.skipped == 0
    assert found == pytest.approx(of(next_token_loss, model, Padding(0)([changed]))[0], rel=1e-6)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = top(llama)
    names = list(model.state_dict())
    prefix = FrozenPrefix(model, tmp_path / "states")
    loss = prefix.around(next_token_loss)
    rows, collate = examples(), with_rows(Padding(0))
    for _ in range(2):
        loss(model, collate(rows))
    assert list(model.state_dict()) == names
    assert not any("forward" in vars(block) or block._forward_hooks for block in blocks_of(model))
    assert model.training and all(m.training for m in model.modules())


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5ForConditionalGeneration(config)


def trained_embedding() -> Any:
    model = top(llama)
    model.get_input_embeddings().requires_grad_(True)
    return model


def prompt_tuning() -> Any:
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: top(llama, first=0), "the first block is trained"),
        (lambda: top(llama, first=BLOCKS), "nothing is trained"),
        (trained_embedding, "something in front of block 2 is trained"),
        (prompt_tuning, "state"),
        (lambda: top(lambda: gpt2(0.1)), "dropout"),
        (lambda: top(lambda: llama(attention_dropout=0.5)), "dropout"),
        (lambda: top(lambda: opt(layerdrop=0.1)), "layerdrop"),
        (t5, "2 lists of blocks"),
    ],
    ids=["first", "nothing", "embedding", "prompt", "dropout", "attention", "layerdrop", "t5"],
)
def test_what_cannot_be_kept_is_refused_with_its_reason(
    made: Any, reason: str, tmp_path: Path
) -> None:
    model = made()
    found = cacheable(model)
    assert found is not None and reason in found
    with pytest.raises(InputError, match="can't be kept"):
        FrozenPrefix(model, tmp_path / "states")


def test_blocks_that_hand_on_more_than_their_states_are_refused() -> None:
    model = top(llama)
    inner = model.model

    class Leaning(type(inner.layers[3])):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            return super().forward(hidden_states, **kwargs) + inner.layers[0].noted

    inner.layers[0].noted = torch.zeros(())

    class Noting(type(inner.layers[0])):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            self.noted = hidden_states.detach().mean() + 1
            return super().forward(hidden_states, **kwargs)

    assert cacheable(model) is None
    inner.layers[0].__class__, inner.layers[3].__class__ = Noting, Leaning
    assert "later blocks need more" in str(cacheable(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_stored_is_read_back_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    states = StoredStates(tmp_path / "s")
    values = {row: torch.randn(row + 1, 5).to(dtype) for row in (4, 0, 7)}
    for row, value in values.items():
        states.write(row, value)
    for row, value in values.items():
        assert torch.equal(states.read(row), value)
        assert states.tokens(row) == row + 1
    assert states.tokens(1) is None


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    states = StoredStates(tmp_path / "s")
    (tmp_path / "s" / "states-00000.bin").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match="can't be written"):
        states.write(0, torch.randn(100, 50))
    assert states.tokens(0) is None
