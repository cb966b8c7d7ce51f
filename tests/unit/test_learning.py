"""What is learned of a teacher and of a rounding to come, against direct computation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from bmkit.compress.distill import agreement, collate, lessons
from bmkit.compress.hints import PROJECTIONS, Hints
from bmkit.compress.options.learning import Attention, Hidden
from bmkit.errors import InputError, RecipeError
from bmkit.nn.qat import round_tokens, rounded_weights, straight_through
from bmkit.nn.rounding import dequantize, quantize
from bmkit.report import Silent
from bmkit.runtime.voice import Voice
from bmkit.train import distil
from bmkit.train.corpus import Text
from bmkit.train.distil import Aim, divergence, likeliest, reverse_divergence, teaching_loss
from bmkit.train.states import attention_loss, by_depth, state_loss

CPU = torch.device("cpu")
Make = Callable[..., tuple[Any, Path]]


def four_bits(weight: Tensor) -> Tensor:
    return dequantize(*quantize(weight, 4, 8))


def test_the_forward_is_that_of_the_rounded_weight_and_the_gradient_goes_through() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 5), torch.randn(3, 16)
    rounded = four_bits(layer.weight.detach()).requires_grad_()
    wanted = functional.linear(x, rounded, layer.bias)
    (wanted**2).sum().backward()
    with rounded_weights([layer], four_bits):
        found = layer(x)
        (found**2).sum().backward()
    assert torch.equal(found, wanted)
    assert torch.equal(layer.weight.grad, rounded.grad)
    assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))


def test_a_weight_is_rounded_again_when_it_has_changed_and_only_then() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 5), torch.randn(3, 16)
    count = 0

    def counted(weight: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return four_bits(weight)

    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    with rounded_weights([layer], counted):
        for step in range(3):
            for _ in range(2):
                layer(x).sum().backward()
            assert count == step + 1
            optimizer.step()
        assert torch.equal(layer(x), functional.linear(x, four_bits(layer.weight), layer.bias))
        layer.load_state_dict({k: torch.zeros_like(v) for k, v in layer.state_dict().items()})
        assert not layer(x).any()


def test_a_sum_of_differences_is_not_what_is_exported() -> None:
    exact, rounded = torch.tensor([0.1]), torch.tensor([1e-9])
    assert torch.equal(straight_through(exact, rounded), rounded)
    assert not torch.equal(exact + (rounded - exact), rounded)


def test_activations_are_rounded_token_by_token() -> None:
    x = torch.tensor([[1.0, -2.54, 0.013], [0.0, 0.0, 0.0], [1e-3, 2e-3, 127e-3]])
    x.requires_grad_()
    found = round_tokens(x)
    wanted = torch.tensor([[1.0, -2.54, 0.02], [0.0, 0.0, 0.0], [1e-3, 2e-3, 127e-3]])
    torch.testing.assert_close(found, wanted)
    (found * torch.arange(9.0).reshape(3, 3)).sum().backward()
    assert torch.equal(x.grad, torch.arange(9.0).reshape(3, 3))


def test_with_the_whole_vocabulary_the_reverse_divergence_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(6, 11, generator=generator) for _ in range(2))
    taught = likeliest(teacher, 11)
    found = reverse_divergence(student, taught.tokens, taught.logprobs)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    wanted = functional.kl_div(p, q, reduction="sum", log_target=True)
    torch.testing.assert_close(found, wanted, rtol=3e-3, atol=3e-3)
    part = reverse_divergence(student, *_of(likeliest(teacher, 4)))
    kept = taught.tokens[:, :4].long()
    left = [(1 - v.exp().gather(1, kept).sum(1, keepdim=True)).log() for v in (q, p)]
    q5, p5 = (torch.cat((v.gather(1, kept), r), 1) for v, r in zip((q, p), left, strict=True))
    torch.testing.assert_close(part, (q5.exp() * (q5 - p5)).sum(), rtol=3e-3, atol=3e-3)
    assert 0 < part < wanted


def test_with_a_rest_the_loss_is_least_at_the_teachers_own_probabilities() -> None:
    teacher = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    taught = likeliest(teacher, 3)
    gradients = []
    for rest in (True, False):
        logits = teacher.clone().requires_grad_()
        divergence(logits, *_of(taught), rest=rest).backward()
        gradients.append(float(logits.grad.abs().max()))
    assert gradients[0] < 2e-3 < 0.02 < gradients[1]
    p, q = teacher.softmax(-1), torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    kept = taught.tokens.long()
    grouped = [
        torch.cat((v.gather(1, kept), 1 - v.gather(1, kept).sum(1, keepdim=True)), 1)
        for v in (p, q.softmax(-1))
    ]
    wanted = -(grouped[0] * grouped[1].log()).sum()
    torch.testing.assert_close(divergence(q, *_of(taught), rest=True), wanted, rtol=1e-3, atol=1e-3)


def _of(taught: Any) -> tuple[Tensor, Tensor]:
    return taught.tokens, taught.logprobs


@pytest.mark.parametrize("reverse", [False, True])
def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn(reverse: bool) -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
    taught = likeliest(logits.detach(), 9)
    of = reverse_divergence if reverse else divergence
    of(logits, *_of(taught)).backward()
    assert float(logits.grad.abs().max()) < 2e-3


def test_the_texts_own_tokens_have_their_share_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(4, 9, generator=generator) for _ in range(2))
    taught = likeliest(teacher, 3)
    labels = torch.tensor([3, -1, 0, 8])  # the head can't say the second
    found = Aim(label_weight=0.25).loss(logits, *_of(taught), labels)
    own = -sum(logits.log_softmax(-1)[i, t] for i, t in ((0, 3), (2, 0), (3, 8)))
    wanted = 0.75 * divergence(logits, *_of(taught)) + 0.25 * own
    torch.testing.assert_close(found, wanted)


def test_layers_are_paired_by_their_share_of_the_depth() -> None:
    assert by_depth(3, 30) == [(0, 9), (1, 19), (2, 29)]
    assert by_depth(4, 4) == [(i, i) for i in range(4)]
    for students in range(1, 20):
        for teachers in range(1, 20):
            pairs = by_depth(students, teachers)
            assert pairs[-1] == (students - 1, teachers - 1)
            assert [i for i, _ in pairs] == list(range(students))
            assert sorted(j for _, j in pairs) == [j for _, j in pairs]
            assert pairs[0][1] >= 0


def test_states_are_compared_by_their_direction_where_there_is_no_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    wanted = [
        2 - 2 * float(functional.cosine_similarity(student[i, t], teacher[i, t], dim=0))
        for i, t in ((0, 0), (0, 1), (0, 2), (1, 0))
    ]
    found = state_loss(student, teacher, mask)
    assert float(found) == pytest.approx(sum(wanted) / 4, rel=1e-5)
    student[1, 1:] = torch.inf
    assert torch.equal(state_loss(student, 3 * teacher, mask), state_loss(student, teacher, mask))


def test_attention_is_compared_row_by_row_where_there_is_no_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, h, 3, 3, generator=generator) for h in (2, 2, 4)]
    causal = torch.ones(3, 3).tril().bool()
    student, teacher, wide = (m.masked_fill(~causal, -torch.inf).softmax(-1) for m in maps)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    rows = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]

    def direct(ours: Tensor, its: Tensor) -> float:
        total = 0.0
        for b, t in rows:
            for h in range(ours.shape[1]):
                for k in range(t + 1):
                    p, q = float(its[b, h, t, k]), float(ours[b, h, t, k])
                    total += p * (torch.tensor(p).log() - torch.tensor(q).log()).item()
        return total / len(rows) / ours.shape[1]

    found = attention_loss(student, teacher, mask)
    assert float(found) == pytest.approx(direct(student, teacher), rel=1e-4)
    means = [m.mean(1, keepdim=True) for m in (student, wide)]
    assert float(attention_loss(student, wide, mask)) == pytest.approx(direct(*means), rel=1e-4)
    assert float(attention_loss(student, student, mask)) == pytest.approx(0, abs=1e-6)


SMALL: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 60}
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_hidden_layers=3, head_dim=16),
    "gpt-neox": GPTNeoXConfig(**SMALL, intermediate_size=48, num_hidden_layers=3),
    "opt": OPTConfig(**SMALL, ffn_dim=48, num_hidden_layers=3, word_embed_proj_dim=32, dropout=0.0),
    "gemma3": Gemma3TextConfig(
        **SMALL,
        intermediate_size=48,
        num_hidden_layers=3,
        head_dim=16,
        num_key_value_heads=1,
        sliding_window=8,
    ),
    "gpt2": GPT2Config(
        n_embd=32, n_head=2, n_layer=3, vocab_size=60, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}


def saved(config: Any, path: Path, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config.pad_token_id = 0
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(path)
    return model.eval()


def batch_of() -> dict[str, Tensor]:
    """Return two rows, the second of which is padded from its fourth token on."""
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
def test_hints_are_those_of_both_models_own_outputs(name: str, tmp_path: Path) -> None:
    teacher = saved(MODELS[name], tmp_path / "t", 1)
    student = saved(MODELS[name], tmp_path / "s", 2)
    batch = batch_of()
    pairs = [(0, 1), (1, 0)]
    hidden, attention = Hidden(weight=2.0, layers=pairs), Attention(weight=0.5, layers=pairs)
    with Hints(tmp_path / "t", hidden, attention, CPU).for_(student) as hint:
        student(**batch)
        found = hint(batch)
    assert not hasattr(student, PROJECTIONS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    ours, its = (
        m(**batch, output_hidden_states=True, output_attentions=True) for m in (student, teacher)
    )
    wanted = torch.zeros(())
    for i, j in pairs:  # hidden_states begin with the embedding
        wanted += state_loss(
            ours.hidden_states[i + 1], its.hidden_states[j + 1], batch["attention_mask"]
        )
        maps = ours.attentions[i], its.attentions[j]
        wanted += 0.25 * attention_loss(*maps, batch["attention_mask"])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_what_is_padding_has_no_say(name: str, tmp_path: Path) -> None:
    saved(MODELS[name], tmp_path / "t", 1)
    student = saved(MODELS[name], tmp_path / "s", 2)
    batch = batch_of()
    other = {**batch, "input_ids": batch["input_ids"] + 7 * (1 - batch["attention_mask"])}
    with Hints(tmp_path / "t", Hidden(), Attention(), CPU).for_(student) as hint:
        found = []
        for given in (batch, other):
            student(**given)
            found.append(hint(given))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def lesson_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    places = torch.tensor([[0, 1], [0, 4], [1, 1]])
    taught = likeliest(torch.randn(3, 60, generator=torch.Generator().manual_seed(3)), 5)
    said = torch.tensor([5, 6, 7])
    more = {"places": places, "tokens": taught.tokens, "logprobs": taught.logprobs, "said": said}
    return {**batch, **more}


def test_logits_made_a_few_places_at_a_time_give_the_same_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = saved(MODELS["llama"], tmp_path / "s", 2)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(200))
    taught = likeliest(torch.randn(600, 60, generator=torch.Generator().manual_seed(3)), 5)
    ids = torch.randint(3, 60, (3, 200), generator=torch.Generator().manual_seed(4))
    said = torch.randint(3, 60, (600,), generator=torch.Generator().manual_seed(5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "places": places}
    batch |= {"tokens": taught.tokens, "logprobs": taught.logprobs, "said": said}
    found = []
    for most in (2**24, 100):
        monkeypatch.setattr(distil, "LOGITS", most)
        student.zero_grad()
        loss, count = teaching_loss(student, batch, aim=Aim(label_weight=0.3))
        loss.backward()
        assert count == 600
        grads = {n: p.grad.clone() for n, p in student.named_parameters()}
        found.append({"loss": loss.detach(), **grads})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma3"])
def test_gradients_are_the_same_with_gradient_checkpointing(name: str, tmp_path: Path) -> None:
    saved(MODELS[name], tmp_path / "t", 1)
    student = saved(MODELS[name], tmp_path / "s", 2).train()
    batch = lesson_of(batch_of())
    layers = [m for n, m in student.named_modules() if isinstance(m, nn.Linear) and "head" not in n]
    grads, calls = [], []
    for checkpointing in (False, True):
        student.zero_grad()
        if checkpointing:
            student.activation_checkpointing_enable()
        count = 0

        def counted(*_: Any) -> None:
            nonlocal count
            count += 1

        handle = layers[0].register_forward_hook(counted)
        hints = Hints(tmp_path / "t", Hidden(), Attention(), CPU)
        with rounded_weights(layers, four_bits), hints.for_(student) as hint:
            count = 0
            loss, places = teaching_loss(student, batch)
            (loss + places * hint(batch)).backward()
        handle.remove()
        calls.append(count)
        grads.append(
            {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        )
    assert calls == [1, 2]  # it was computed again
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)


def test_a_projection_between_widths_learns_and_does_not_stay(tmp_path: Path) -> None:
    wide = LlamaConfig(
        **{**SMALL, "hidden_size": 48}, intermediate_size=48, num_hidden_layers=2, head_dim=16
    )
    saved(wide, tmp_path / "t", 1)
    student = saved(MODELS["llama"], tmp_path / "s", 2)
    batch = batch_of()
    hidden = Hidden(layers=[(2, 1)])
    with Hints(tmp_path / "t", hidden, None, CPU).for_(student) as hint:
        names = [n for n, _ in student.named_parameters() if n.startswith(PROJECTIONS)]
        assert names == [f"{PROJECTIONS}.0.weight"]
        matrix = student.get_parameter(names[0])
        assert matrix.shape == (48, 32)
        optimizer = torch.optim.SGD([matrix], lr=1.0)
        losses = []
        for _ in range(30):
            student(**batch)
            loss = hint(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert not any(PROJECTIONS in name for name in student.state_dict())


def test_layers_that_are_not_there_are_named(tmp_path: Path) -> None:
    saved(MODELS["llama"], tmp_path / "t", 1)
    student = saved(MODELS["llama"], tmp_path / "s", 2)
    hints = Hints(tmp_path / "t", Hidden(layers=[(0, 3)]), None, CPU)
    with pytest.raises(RecipeError, match="has 3 layers"), hints.for_(student):
        pass


@pytest.mark.parametrize("memory", [None, 95_000])
def test_a_rounded_or_streamed_teacher_tells_nearly_the_same(
    tmp_path: Path, memory: int | None
) -> None:
    saved(MODELS["llama"], tmp_path / "t", 1)
    student = saved(MODELS["llama"], tmp_path / "s", 2)
    batch = batch_of()
    found = []
    for quant, room in ((None, None), ("int8" if memory is None else None, memory)):
        hints = Hints(tmp_path / "t", Hidden(), None, CPU, quant, room)
        with hints.for_(student) as hint:
            student(**batch)
            found.append(float(hint(batch).detach()))
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert (found[1] == found[0]) == (memory is not None)


def test_a_model_that_tells_no_attention_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2)
    saved(config, tmp_path / "t", 1)
    student = saved(config, tmp_path / "s", 2)
    with (
        pytest.raises(InputError, match="attention"),
        Hints(tmp_path / "t", None, Attention(), CPU).for_(student),
    ):
        pass


TWO_STACKS: dict[str, Any] = {
    "t5": T5Config(
        vocab_size=90,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    ),
    "t5, a head of its own": T5Config(
        vocab_size=90,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=3,
        tie_word_embeddings=False,
    ),
    "bart": BartConfig(
        vocab_size=90,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    ),
}


@pytest.mark.parametrize("name", TWO_STACKS)
def test_an_encoder_decoder_learns_what_its_teacher_says_behind_what_it_has_read(
    name: str, tmp_path: Path, tokenizer: Any
) -> None:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(TWO_STACKS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    draw = torch.Generator().manual_seed(1)
    sizes = ((9, 4), (6, 2), (12, 7))
    texts = [
        Text(torch.randint(4, 89, (size,), generator=draw).tolist(), first) for size, first in sizes
    ]
    voice = Voice(tmp_path / "m", device=CPU, dtype="float32", rows=1, reporter=Silent())
    taught = lessons(voice, texts, 90, None, tmp_path / "w", reporter=Silent())
    start = model.config.decoder_start_token_id
    wanted = torch.zeros(())
    for text, lesson in zip(texts, taught, strict=True):
        said = torch.tensor([[start, *text.ids[text.first : -1]]])
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([text.ids[: text.first]]), decoder_input_ids=said
            ).logits[0]
        log = logits.log_softmax(-1)
        assert lesson.chosen.tolist() == logits.argmax(-1).tolist()
        told = torch.zeros_like(log).scatter_(1, lesson.tokens.long(), lesson.logprobs.float())
        assert torch.allclose(told, log, atol=1e-2)
        wanted = wanted - (log.exp() * log).sum()
    batch = collate([{"input_ids": x.ids[:-1], "lesson": x} for x in taught], model.config)
    assert int((batch["labels"] != -100).sum()) == len(batch["places"]) == 5 + 4 + 5
    plain = distil.has_plain_head(model)
    assert plain == (name == "bart")
    for head in {plain, False}:
        found, count = teaching_loss(model, batch, plain=head)
        assert count == 14
        assert torch.allclose(found, wanted, rtol=1e-3)
    model.zero_grad()
    (found / count).backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    assert largest < 1e-2  # it says what it says
    assert agreement(model, taught, None) == 1.0
