"""The output head alone: logits of states that were kept are those of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bmkit.errors import InputError
from bmkit.prompt.ask import Asker
from bmkit.prompt.heads import Head
from bmkit.prompting.encode import Encoded, Kind
from bmkit.verbalizers import positions

MODELS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "llama": ("causal", {}),
    "gemma2": ("causal", {"final_logit_softcapping": 0.1}),  # a cap behind the head
    "bert": ("masked", {}),
    "electra": ("masked", {}),
    "modernbert": ("masked", {}),
    "t5": ("seq2seq", {"tie_word_embeddings": True, "decoder_start_token_id": 0}),
    "bart": ("seq2seq", {}),  # a bias behind the head
}


def prompt(kind: Kind, *ids: int) -> Encoded:
    at = len(ids) - 1
    decoder = [0, *ids[:at]] if kind == "seq2seq" else []
    roles: Any = ["text"] * len(ids)
    return Encoded(list(ids), roles, [0] * len(ids), [at], [at], [-1] * len(ids), [], decoder)


@pytest.mark.parametrize("name", MODELS)
def test_kept_states_give_the_logits_of_the_whole_model(
    architecture: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, more = MODELS[name]
    model = architecture(name, real=True, **more)
    if name == "bart":
        model.final_logits_bias = torch.linspace(-3, 3, 40)[None]
    prompts = [prompt(kind, *range(3, 3 + size)) for size in (2, 5, 4, 7)]
    asker = Asker(model, kind, 5, 64)
    head = Head(asker, prompts[2])
    states = asker.states(prompts)
    monkeypatch.setattr(positions, "MOST_LOGITS", 80)  # two rows at a time
    held = list(head.logits(states))
    assert list(map(len, held)) == [2, 2]
    wanted = asker.vocabulary(prompts)
    torch.testing.assert_close(torch.cat(held).log_softmax(-1), wanted)
    tokens = torch.tensor([7, 3])
    torch.testing.assert_close(head.columns(states, tokens), torch.cat(held)[:, tokens])
    sums = head.sums(states, torch.tensor([1, 0, 1, 1]), 3)
    by_hand = torch.stack([wanted[1], wanted[[0, 2, 3]].sum(0), torch.zeros(40)])
    torch.testing.assert_close(sums, by_hand.double(), rtol=1e-5, atol=1e-5)


def test_a_model_without_a_head_is_refused(architecture: Callable[..., Any]) -> None:
    model = architecture("bert", real=True, kind="BertModel")
    inputs = {"input_ids": torch.tensor([[3]])}
    with pytest.raises(InputError, match="no head"):
        positions.logits_of_states(model, inputs, torch.zeros(1, 16))
