"""The loss: equal to transformers' own, with logits made only where there is a label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from bmkit.train import head as heads
from bmkit.train import loss as losses
from bmkit.train.linear_cross_entropy import linear_cross_entropy

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


class Widest(TorchDispatchMode):
    """Note the most values of a tensor that is as wide as the vocabulary, the head's left out."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, Tensor) and value.shape[-1:] == (VOCABULARY,):
                rows = value.numel() // VOCABULARY
                self.rows = max(self.rows, 0 if rows == 16 else rows)  # 16: the head's, turned
        return out


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


# the head, apart from the model


def grads_of(model: Any) -> dict[str, Tensor]:
    """Return the gradients, and take them away."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def both(model: Any, given: dict[str, Tensor]) -> heads.Head | None:
    """Assert that loss and gradients with the head apart are those of the model's own logits."""
    head = heads.find(model)
    found = []
    for one in (head, None):
        torch.manual_seed(0)
        total, count = losses.next_token_loss(model, given, head=one)
        (total / count).backward()
        found.append((float(total.detach()), count, grads_of(model)))
    (ours, our_count, our_grads), (wanted, count, grads) = found
    assert our_count == count
    assert ours == pytest.approx(wanted, rel=1e-5)
    assert our_grads.keys() == grads.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-4, atol=1e-5)
    return head


def tiny_gpt2(**values: Any) -> Any:
    """A random GPT-2 of 16 dimensions, whose head is its embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **values, initializer_range=0.5))


def tiny_gemma2() -> Any:
    """A random Gemma 2, whose logits are capped at 3."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=3.0,
        initializer_range=0.5,
    )
    return Gemma2ForCausalLM(config)


def tiny_granite() -> Any:
    """A random Granite, whose logits are divided by 8."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        logits_scaling=8.0,
        initializer_range=0.5,
    )
    return GraniteForCausalLM(config)


def tiny_phi() -> Any:
    """A random Phi, whose head has a bias."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    made = PhiForCausalLM(config)
    torch.nn.init.normal_(made.lm_head.bias)
    return made


@pytest.mark.parametrize("made", [tiny_gpt2, tiny_gemma2, tiny_granite, tiny_phi])
def test_all_gradients_are_those_of_the_models_own_logits(made: Any) -> None:
    model = made().eval()
    head = both(model, batch())
    assert head is not None and head.linear
    assert (head.scale, head.softcap) == {
        tiny_gemma2: (1.0, 3.0),
        tiny_granite: (1 / 8, None),
    }.get(made, (1.0, None))


def test_a_trained_tied_embedding_gets_both_of_its_gradients() -> None:
    model = tiny_gpt2().eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    both(model, batch())


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.3},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    ],
    ids=["lora", "lora on the head", "a head that is saved", "trained tokens"],
)
def test_a_peft_model_has_the_same_loss_and_gradients(model: Any, values: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**values, init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config).train()
    head = both(wrapped, batch())
    assert head is not None
    plain = "lm_head" not in str(values)
    assert head.linear == plain


@pytest.mark.parametrize(
    "kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"]
)
def test_virtual_tokens_in_front_bear_no_loss(model: Any, kind: str) -> None:
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(model, config).eval()
    given = batch()
    head = both(wrapped, given)
    assert head is not None
    assert head.offset == (0 if kind == "PrefixTuningConfig" else 3)
    mean = float(wrapped(**given).loss.detach())
    total, count = losses.next_token_loss(wrapped, given, head=head)
    assert float(total.detach()) / count == pytest.approx(mean, rel=1e-5)


def test_a_model_that_runs_another_has_no_head_of_its_own(model: Any) -> None:
    assert heads.find(KeepsAll(model)) is None


def test_logits_that_are_no_numbers_tell_of_no_head(model: Any) -> None:
    model.lm_head.weight.data.fill_(torch.nan)
    assert heads.find(model) is None


def test_a_head_with_listeners_is_left_to_the_model(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)
    assert heads.find(model) is None


def test_logits_that_the_config_does_not_explain_are_left_to_the_model(model: Any) -> None:
    class Shifted(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + torch.arange(VOCABULARY)
            return out

    model.__class__ = Shifted
    assert heads.find(model) is None


def test_finding_the_head_leaves_the_model_as_it_was(model: Any) -> None:
    model.train()
    head = heads.find(model)
    assert head is not None
    assert model.training
    losses.next_token_loss(model, batch(), head=head)
    assert not model.lm_head._forward_hooks
    assert model(**batch()).logits.shape[-1] == VOCABULARY


def test_only_logits_of_labelled_tokens_are_made(model: Any) -> None:
    given = batch()
    count = int((given["labels"][:, 1:] != IGNORED).sum())
    head = heads.find(model)
    with Widest() as seen:
        losses.next_token_loss(model, given, head=head)
    assert seen.rows == count
    assert count != 16


def test_a_batch_without_labels_has_no_loss_behind_a_head(model: Any) -> None:
    given = batch()
    given["labels"] = torch.full_like(given["labels"], IGNORED)
    total, count = losses.next_token_loss(model, given, head=heads.find(model))
    assert (float(total.detach()), count) == (0.0, 0)
    total.backward()
    assert all(not g.any() for g in grads_of(model).values())


# linear cross-entropy


@pytest.mark.parametrize("rows", [1, 3, 7, 256])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (0.5, 3.0)])
def test_gradients_are_autograds(
    rows: int, bias: bool, scale: float, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator)
    weight = torch.randn(11, 5, generator=generator)
    offset = torch.randn(11, generator=generator) if bias else None
    targets = torch.randint(0, 11, (7,), generator=generator)
    given = [t.requires_grad_() for t in (hidden, weight, offset) if t is not None]
    ours = linear_cross_entropy(
        hidden, weight, targets, bias=offset, scale=scale, softcap=softcap, rows=rows
    )
    found = torch.autograd.grad(ours * 0.3, given)
    logits = scale * nn.functional.linear(hidden, weight, offset)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain = nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(ours, plain)
    for grad, wanted in zip(found, torch.autograd.grad(plain * 0.3, given), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16_has_a_float32_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(31, 16, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(0, 31, (40,), generator=generator)
    ours = linear_cross_entropy(hidden, weight, targets, rows=8)
    assert ours.dtype == torch.float32
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    wanted = nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    assert float(ours.detach()) == pytest.approx(float(wanted.detach()), rel=2e-3)
    ours.backward()
    wanted.backward()
    for mine, real in zip((hidden, weight), exact, strict=True):
        assert mine.grad is not None and real.grad is not None
        assert mine.grad.dtype == torch.bfloat16
        error = (mine.grad.double() - real.grad).norm() / real.grad.norm()
        assert error < 1e-2


def test_no_logits_are_kept_for_the_gradient() -> None:
    hidden = torch.randn(30, 4, requires_grad=True)
    weight = torch.randn(100, 4)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear_cross_entropy(hidden, weight, torch.zeros(30, dtype=torch.long), rows=10)
    assert sum(kept) == hidden.numel()
