"""The loss: equal to transformers' own, with logits made only where there is a label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bmkit.train import loss as losses

IGNORED = -100
VOCABULARY = 61


@pytest.fixture
def model() -> Any:
    """A random Llama of 16 dimensions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


class KeepsAll(nn.Module):
    """A model whose forward makes the logits of every position."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        """Run the model inside."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def batch(seed: int = 0, rows: int = 3, time: int = 11) -> dict[str, Tensor]:
    """Return rows with prompts of several lengths masked, answers in two parts, and padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, time), generator=generator)
    labels = ids.clone()
    mask = torch.ones_like(ids)
    for row in range(rows):
        labels[row, : 2 + 2 * row] = IGNORED
        labels[row, 8] = IGNORED
        padding = row  # on the right
        if padding:
            mask[row, -padding:] = 0
            labels[row, -padding:] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_transformers(model: Any, given: dict[str, Tensor]) -> tuple[float, int]:
    """Return transformers' mean loss, and the number of labels that are predicted."""
    count = int((given["labels"][:, 1:] != IGNORED).sum())
    return float(model(**given).loss.detach()), count


@pytest.mark.parametrize("wrap", [lambda m: m, KeepsAll], ids=["keeps some", "keeps all"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_equals_transformers_own(model: Any, wrap: Any, seed: int) -> None:
    given = batch(seed)
    wrapped = wrap(model)
    assert losses.keeps_some(wrapped) == (wrapped is model)
    total, count = losses.next_token_loss(wrapped, given)
    mean, labelled = by_transformers(model, given)
    assert count == labelled
    assert float(total) / count == pytest.approx(mean, rel=1e-5)


def test_the_loss_equals_the_formula(model: Any) -> None:
    given = batch()
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    total = 0.0
    for row, labels in enumerate(given["labels"].tolist()):
        for time, label in enumerate(labels[1:]):
            if label != IGNORED:
                here = logits[row, time].double()
                total -= float(here[label] - here.exp().sum().log())
    assert float(losses.next_token_loss(model, given)[0].detach()) == pytest.approx(total, rel=1e-5)


def test_the_gradient_equals_that_of_transformers_own_loss(model: Any) -> None:
    given = batch()
    total, count = losses.next_token_loss(model, given)
    (total / count).backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(**given).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_logits_are_made_at_the_labelled_positions_only(model: Any) -> None:
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    given = batch(rows=1, time=11)  # labels at 2..7, 9, 10: predicted at 1..6, 8, 9
    losses.next_token_loss(model, given)
    assert seen == [8]


def test_a_peft_model_keeps_some_logits_too(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    given = batch()
    before = losses.next_token_loss(model, given)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert losses.keeps_some(wrapped)
    total, count = losses.next_token_loss(wrapped.eval(), given)
    assert (count, float(total)) == (before[1], pytest.approx(float(before[0]), rel=1e-6))


def test_a_batch_without_labels_has_no_loss(model: Any) -> None:
    given = batch()
    given["labels"] = torch.full_like(given["labels"], IGNORED)
    for wrapped in (model, KeepsAll(model)):
        total, count = losses.next_token_loss(wrapped, given)
        assert (float(total), count) == (0.0, 0)


def test_a_label_at_the_first_position_bears_no_loss(model: Any) -> None:
    given = batch()
    before = losses.next_token_loss(model, given)
    given["labels"][:, 0] = given["input_ids"][:, 0]
    after = losses.next_token_loss(model, given)
    assert (float(after[0]), after[1]) == (float(before[0]), before[1])


def test_the_mean_is_over_tokens_not_over_batches(model: Any) -> None:
    batches = [batch(0), batch(1, rows=1, time=9), batch(2, rows=2)]
    means = [by_transformers(model, b) for b in batches]
    wanted = sum(mean * count for mean, count in means) / sum(count for _, count in means)
    found = losses.mean_loss(model, batches, torch.device("cpu"))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert found != pytest.approx(sum(mean for mean, _ in means) / 3, rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_is_done_without_dropout_and_leaves_the_mode(model: Any, training: bool) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], lora_dropout=0.9, init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    wrapped.train(training)
    found = {losses.mean_loss(wrapped, [batch()], torch.device("cpu")) for _ in range(2)}
    assert len(found) == 1
    assert wrapped.training is training
