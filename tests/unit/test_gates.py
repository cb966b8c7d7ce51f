"""Gates: they are the paper's, the loss reaches them, and what they close is what is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from bmkit.compress import anatomy as anatomies
from bmkit.compress import gating
from bmkit.compress import shrink as cutting
from bmkit.compress.distill import Lesson, collate
from bmkit.compress.norms import norms_of_zeros
from bmkit.compress.options.structure import Gates, GateTrain
from bmkit.compress.steps.shrink import wanted
from bmkit.nn.gates import Bounded, draw, open_share, settled, start
from bmkit.report import Silent
from bmkit.train.distil import likeliest

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=120,
    hidden_size=24,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=8,
    tie_word_embeddings=True,
    eos_token_id=2,
)


def model_at(path: Path) -> Any:
    """Write a random model in which half of the neurons and a group of heads say nothing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.4)
        for i, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight[:, i::2] = 0
            layer.self_attn.o_proj.weight[:, 16 * i : 16 * i + 16] = 0
    model.save_pretrained(path)
    return model


@torch.no_grad()
def lessons(model: Any, count: int = 24) -> list[Lesson]:
    """Let the model itself say what it finds likeliest."""
    found = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        ids = torch.randint(3, 119, (1, 20), generator=generator)
        taught = likeliest(model(input_ids=ids).logits[0, :-1], 16)
        said = ids[0, 1:].int()
        best = taught.tokens[:, 0]
        found.append(Lesson(ids[0].tolist(), 1, taught.tokens, taught.logprobs, best, said))
    return found


def batch_of(taught: list[Lesson]) -> dict[str, Tensor]:
    return collate([{"input_ids": lesson.ids[:-1], "lesson": lesson} for lesson in taught])


@pytest.mark.parametrize("log_alpha", [-3.0, -0.7, 0.0, 1.5, 4.0])
def test_gates_are_hard_concrete(log_alpha: float) -> None:
    """The share that isn't 0 is that of the paper's equation 12, and so is the one below 1."""
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    gates = draw(torch.full_like(noise, log_alpha), noise)
    assert gates.min() >= 0 and gates.max() <= 1
    shift = 2 / 3 * torch.tensor(0.1 / 1.1).log()
    wanted = torch.sigmoid(log_alpha - shift)
    assert float((gates > 0).float().mean()) == pytest.approx(float(wanted), abs=5e-3)
    assert float(open_share(torch.tensor(log_alpha))) == pytest.approx(float(wanted), abs=1e-6)
    shift = 2 / 3 * torch.tensor((1 + 0.1) / (1.1 - 1)).log()
    below = 1 - torch.sigmoid(log_alpha - shift)
    assert float((gates < 1).float().mean()) == pytest.approx(float(below), abs=5e-3)


def test_a_start_is_as_open_as_it_says() -> None:
    for probability in (0.05, 0.5, 0.95):
        found = open_share(torch.tensor(start(probability)))
        assert float(found) == pytest.approx(probability, abs=1e-6)
    assert settled(torch.tensor([-9.0, 9.0])).tolist() == [0.0, 1.0]


def test_multipliers_are_raised_while_too_much_is_open() -> None:
    gates = Bounded({"ffn": (2, 8)}, {"ffn": 0.5}, warmup=0)
    gates.penalty().backward()
    raised = gates.multipliers["ffn"].grad
    over = 0.95 - 0.5
    assert torch.allclose(raised, torch.tensor([[-over] * 2, [-over * over] * 2]), atol=1e-5)
    torch.optim.SGD(gates.multipliers.parameters(), lr=1.0).step()
    gates.zero_grad()
    gates.penalty().backward()
    assert (gates.log_alpha["ffn"].grad > 0).all()  # descent closes them


def test_the_target_is_reached_after_the_warm_up() -> None:
    gates = Bounded({"ffn": (1, 8)}, {"ffn": 0.5}, warmup=10)
    with torch.no_grad():
        gates.multipliers["ffn"][:] = torch.tensor([[1.0], [0.0]])
    found = []
    for step in (0, 5, 10, 20):
        gates.step.fill_(step)
        found.append(float(gates.penalty()))
    assert found == pytest.approx([-0.05, 0.2, 0.45, 0.45], abs=1e-5)


def test_the_teachers_loss_reaches_the_gates_that_matter(tmp_path: Path) -> None:
    """All neurons have as many parameters; only those that say something get a gradient."""
    model = model_at(tmp_path)
    taught = lessons(model)
    model.requires_grad_(False)
    anatomy = anatomies.read(tmp_path)
    target = replace(anatomy.now, ffn=8, heads=2, layers=1)
    gated = gating.Gated(model, anatomy, gating.make(anatomy, target, 0))
    torch.manual_seed(0)
    with torch.no_grad():
        for pair in gated.gates.multipliers.values():
            pair.zero_()  # so that there is no other gradient
    for _ in range(10):
        total, count = gated.loss(batch_of(taught), temperature=1.0, plain=True)
        (total / count).backward()
    neurons, heads, layers = (
        gated.gates.log_alpha[kind].grad.abs() for kind in ("ffn", "heads", "layers")
    )
    assert float(layers.min()) > 1e-4
    for i in range(2):
        said = torch.arange(16) % 2 != i
        assert float(neurons[i][~said].max()) < 1e-7 < 1e-6 < float(neurons[i][said].max())
        assert float(heads[i][i]) < 1e-7 < 1e-5 < float(heads[i].max())


def test_neurons_and_heads_that_matter_stay_and_their_number_is_right(tmp_path: Path) -> None:
    model = model_at(tmp_path / "m")
    anatomy = anatomies.read(tmp_path / "m")
    step = Gates(
        method="gates",
        intermediate_size=8,
        num_key_value_heads=2,
        train=GateTrain(max_steps=150, per_device_train_batch_size=24),
    )
    target = wanted(anatomy, step)
    gates = gating.learn(
        *(tmp_path / "m", anatomy, target, lessons(model), step),
        seed=0,
        work=tmp_path / "w",
        device=CPU,
        reporter=Silent(),
    )
    for kind, wished in (("heads", 2 / 3), ("ffn", 0.5)):
        assert gates.expected()[kind].tolist() == pytest.approx([wished] * 2, abs=0.08)
    found = gating.expected(anatomy, gates)
    assert found == pytest.approx(anatomy.size(target) / anatomy.size(anatomy.now), abs=0.05)
    _, kept, _ = gating.decide(gates, target, 2)
    for i in range(2):
        assert kept[i]["heads"].tolist() == [g for g in range(3) if g != i]
        said = [n for n in kept[i]["ffn"].tolist() if n % 2 != i]
        assert len(said) >= 7


def test_channels_that_matter_stay(tmp_path: Path) -> None:
    model = model_at(tmp_path / "m")
    silent = torch.arange(24) % 3 == 1
    with torch.no_grad():
        model.model.embed_tokens.weight[:, silent] = 0
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[silent] = 0
            layer.self_attn.o_proj.weight[silent] = 0
    model.save_pretrained(tmp_path / "m")
    anatomy = anatomies.read(tmp_path / "m")
    step = Gates(
        method="gates",
        hidden_size=16,
        train=GateTrain(max_steps=150, per_device_train_batch_size=24),
    )
    target = wanted(anatomy, step)
    gates = gating.learn(
        *(tmp_path / "m", anatomy, target, lessons(model), step),
        seed=0,
        work=tmp_path / "w",
        device=CPU,
        reporter=Silent(),
    )
    channels = gating.channels(gates, target)
    assert channels is not None
    assert channels.tolist() == [c for c in range(24) if not silent[c]]
    found = gating.expected(anatomy, gates)
    assert found == pytest.approx(anatomy.size(target) / anatomy.size(anatomy.now), abs=0.05)


@torch.no_grad()
@pytest.mark.parametrize("hidden", [24, 16])
def test_what_is_written_is_the_model_with_closed_gates(hidden: int, tmp_path: Path) -> None:
    model = model_at(tmp_path / "m")
    for layer in model.model.layers:  # nothing is silent here
        layer.mlp.down_proj.weight.normal_(0.0, 0.4)
        layer.self_attn.o_proj.weight.normal_(0.0, 0.4)
    model.save_pretrained(tmp_path / "m")
    anatomy = anatomies.read(tmp_path / "m")
    target = replace(anatomy.now, ffn=8, heads=2, layers=1, hidden=hidden)
    gates = gating.make(anatomy, target, 0)
    generator = torch.Generator().manual_seed(3)
    for value in gates.log_alpha.values():
        value.normal_(0.0, 1.0, generator=generator)
    layers, kept, values = gating.decide(gates, target, 2)
    gated = gating.Gated(model, anatomy, gates)
    gated.values = {"layers": torch.zeros(1, 2)}
    gated.values["layers"][0, layers] = 1
    for kind, width in (("heads", 3), ("ffn", 16)):
        gated.values[kind] = torch.zeros(2, width)
        for i in range(2):
            gated.values[kind][i, kept[i][kind]] = values[i][kind]  # type: ignore[index]
    channels = gating.channels(gates, target)
    norms = {}
    if channels is not None:
        gated.values["hidden"] = torch.zeros(1, 24).index_fill_(1, channels, 1.0)
        norms = norms_of_zeros(tmp_path / "m", anatomy, channels)
    ids = torch.randint(3, 119, (2, 15), generator=generator)
    wished = model(input_ids=ids).logits
    known = cutting.require_stored(tmp_path / "m", anatomy, target)
    how = cutting.Fitting(target, refit=False, damp=0.01, chosen=kept, scales=values)
    files, error = cutting.fit(
        *(tmp_path / "m", anatomy, how, layers, ids, tmp_path / "w"), device=CPU, reporter=Silent()
    )
    out = tmp_path / "out"
    out.mkdir()
    cut = cutting.Cut(layers, channels, norms, files, error)
    cutting.write(tmp_path / "m", out, anatomy, target, known, cut)
    from bmkit.compress.work import write_config

    write_config(out, anatomy.config_at(target, layers))
    less = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.allclose(less(input_ids=ids).logits, wished, rtol=1e-4, atol=1e-4)
    gated.remove()
    assert not torch.allclose(model(input_ids=ids).logits, wished, rtol=1e-2, atol=1e-2)


def test_activations_that_are_made_again_teach_the_same(tmp_path: Path) -> None:
    model = model_at(tmp_path / "m")
    anatomy = anatomies.read(tmp_path / "m")
    taught = lessons(model)
    found = []
    for again in (False, True):
        train = GateTrain(max_steps=3, gradient_checkpointing=again)
        step = Gates(method="gates", intermediate_size=8, num_hidden_layers=1, train=train)
        gates = gating.learn(
            *(tmp_path / "m", anatomy, wanted(anatomy, step), taught, step),
            seed=0,
            work=tmp_path / str(again),
            device=CPU,
            reporter=Silent(),
        )
        found.append(gates.state_dict())
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-4), name


def test_a_stopped_training_goes_on_with_its_gates(tmp_path: Path) -> None:
    model = model_at(tmp_path / "m")
    anatomy = anatomies.read(tmp_path / "m")
    taught = lessons(model)

    def learn(work: str, steps: int) -> Bounded:
        train = GateTrain(max_steps=steps, per_device_train_batch_size=6, save_steps=4)
        step = Gates(method="gates", intermediate_size=8, warmup=0.0, train=train)
        return gating.learn(
            *(tmp_path / "m", anatomy, wanted(anatomy, step), taught, step),
            seed=0,
            work=tmp_path / work,
            device=CPU,
            reporter=Silent(),
        )

    whole = learn("a", 8)
    learn("b", 4)
    again = learn("b", 8)
    assert int(again.step) == int(whole.step) == 8
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
