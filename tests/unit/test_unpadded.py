"""Lines in one row of tokens, compared with plain transformers, one pass a row and choice."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from bmkit.verbalizers import likelihood, unpadded

Build = Callable[..., Any]
CHOICES = [[5, 6, 7], [5, 6, 8], [5], [11, 6]]
WINDOW = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
    "use_sliding_window": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "phi3": {"sliding_window": 4},
    "qwen2": WINDOW,
    "qwen3": WINDOW,
}


def sharp(model: Any) -> Any:
    """Give a model weights that are large enough that each token it sees tells."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4, generator=draw)
    model.tie_weights()
    return model


def prompts(head: Sequence[int] = ()) -> list[list[int]]:
    draw = random.Random(3)
    return [[*head, *(draw.randrange(2, 40) for _ in range(n))] for n in (3, 9, 1, 6, 14)]


@torch.no_grad()
def alone(model: Any, prompt: Sequence[int], said: Sequence[int]) -> float:
    logits = model(input_ids=torch.tensor([[*prompt, *said]])).logits[0].double()
    rows = logits.log_softmax(-1)[-len(said) - 1 : -1]
    return float(rows[torch.arange(len(said)), torch.tensor(list(said))].sum())


def read(model: Any) -> list[int]:
    """Return a list that gets the number of tokens of each pass."""
    seen: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, given: seen.append(given[0].numel())
    )
    return seen


def test_each_known_family_is_compared_below() -> None:
    assert sorted(MODELS) == sorted(unpadded.KNOWN)


@pytest.mark.parametrize("head", [(), range(2, 14)])
@pytest.mark.parametrize("name", MODELS)
def test_choices_score_as_a_pass_each(architecture: Build, name: str, head: Sequence[int]) -> None:
    model = sharp(architecture(name, real=True, **MODELS[name]))
    rows = prompts(head)
    assert unpadded.takes(model)
    with torch.inference_mode():
        found = likelihood.causal(model, rows, CHOICES, [[21, 22]] * len(rows)).sums
    wanted = [[alone(model, row, [*said, 21, 22]) for said in CHOICES] for row in rows]
    assert torch.allclose(found.double(), torch.tensor(wanted).double(), rtol=1e-5, atol=1e-5)
    likeliest = torch.tensor(wanted).argmax(-1)
    assert found.argmax(-1).tolist() == likeliest.tolist()


@pytest.mark.parametrize("size", [16, 40, 1000])
def test_no_padding_is_computed_and_batches_are_bounded(architecture: Build, size: int) -> None:
    model = sharp(architecture("llama", real=True))
    rows = prompts()
    seen = read(model)
    likelihood.causal(model, rows, [[5], [6]], batch_tokens=size)
    assert sum(seen) == sum(map(len, rows))
    assert max(seen) <= size


def test_what_lora_adds_is_in_the_scores(architecture: Build) -> None:
    from peft import LoraConfig, get_peft_model

    plain = sharp(architecture("qwen2", real=True))
    rows = prompts()
    without = likelihood.causal(plain, rows, CHOICES).sums
    model = get_peft_model(plain, LoraConfig(r=3, target_modules="all-linear")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    assert unpadded.takes(model)
    with torch.inference_mode():
        found = likelihood.causal(model, rows, CHOICES).sums
    wanted = torch.tensor([[alone(model, row, said) for said in CHOICES] for row in rows])
    assert torch.allclose(found.double(), wanted.double(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, without, atol=0.1)


def test_the_model_attends_as_before_afterwards(architecture: Build) -> None:
    model = sharp(architecture("llama", real=True))
    ids = torch.arange(2, 12).view(2, 5)
    before = model(input_ids=ids).logits
    likelihood.causal(model, prompts(), CHOICES)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(input_ids=ids).logits, before)


def test_models_that_are_trained_or_attend_in_another_way_are_left(architecture: Build) -> None:
    model = architecture("llama", real=True)
    assert not unpadded.takes(model.train())
    assert not unpadded.takes(architecture("gemma2", real=True))
    model.eval().set_attn_implementation("eager")
    assert not unpadded.takes(model)
