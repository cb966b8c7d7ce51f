"""Texts behind a prompt: their loss, and what a model says by itself, against brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bmkit.prompt.ask import Asker
from bmkit.prompt.texts import Aimed, Writer, answers
from bmkit.runtime.generate import Generation

Build = Callable[..., Any]
FAMILIES = [("llama", "causal"), ("gpt2", "causal"), ("t5", "seq2seq"), ("bart", "seq2seq")]
ROWS = [([3, 4], [5, 6, 7]), ([11, 12, 13, 14], [15]), ([3, 16, 17], [18, 19])]


class Tokens:
    """What generation asks of a tokenizer: texts are the numbers of tokens."""

    eos_token_id, pad_token_id = None, 0

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def prompts(kind: str) -> list[Aimed]:
    start = [1, 39] if kind == "seq2seq" else []
    nothing: dict[str, Any] = {"roles": [], "piece": [], "soft": [], "masks": [], "reads": []}
    return [Aimed(list(i), **nothing, decoder_ids=start, target=list(t)) for i, t in ROWS]


def logits(model: Any, prompt: Aimed, said: list[int]) -> Any:
    ids = [*prompt.ids, *said] if not prompt.decoder_ids else prompt.ids
    more = {}
    if prompt.decoder_ids:
        more = {"decoder_input_ids": torch.tensor([[*prompt.decoder_ids, *said]])}
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **more).logits[0, -1]


@pytest.mark.parametrize(("family", "kind"), FAMILIES)
def test_the_loss_is_the_mean_cross_entropy_of_a_targets_tokens(
    architecture: Build, family: str, kind: Any
) -> None:
    model = architecture(family, real=True, initializer_range=0.5)
    asked = prompts(kind)
    asker = Asker(model, kind, None, 64)
    wanted = []
    for prompt in asked:
        each = [
            -float(logits(model, prompt, prompt.target[:at]).log_softmax(-1)[token])
            for at, token in enumerate(prompt.target)
        ]
        wanted.append(sum(each) / len(each))
    assert Writer().ask(asker, asked)[:, 0].tolist() == pytest.approx(wanted, abs=1e-4)
    said = Writer().said(asker, asked)
    assert float(Writer().loss(said, torch.zeros(3)).detach()) == pytest.approx(
        sum(wanted), abs=3e-4
    )
    Writer().loss(said, torch.zeros(3)).backward()  # type: ignore[no-untyped-call]
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("family", "kind"), FAMILIES)
def test_answers_are_those_of_taking_the_likeliest_token_again_and_again(
    architecture: Build, family: str, kind: Any, size: int
) -> None:
    model = architecture(family, real=True, initializer_range=0.5)
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    asker = Asker(model, kind, None, 64)
    heard: list[int] = []
    found = answers(asker, Tokens(), prompts(kind), Generation(5), size, done=heard.append)
    for prompt, answer in zip(prompts(kind), found, strict=True):
        said: list[int] = []
        for _ in range(5):
            said.append(int(logits(model, prompt, said).argmax()))
        assert answer.token_ids == said
        assert answer.text == " ".join(map(str, said))
    assert sum(heard) == 3
