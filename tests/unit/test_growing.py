"""A cache with room behind keys and values: the same ones as transformers' own, not copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from bmkit.runtime.growing import AHEAD, Growing, growing


def both(tokens: int, own: DynamicLayer, found: Growing) -> None:
    new = torch.randn(2, 3, tokens, 4), torch.randn(2, 3, tokens, 4)
    for one, other in zip(own.update(*new), found.update(*new), strict=True):
        assert torch.equal(one, other)
    assert own.get_seq_length() == found.get_seq_length()


def test_it_holds_what_transformers_own_does_whatever_is_done_to_it() -> None:
    own, found = DynamicLayer(), Growing()
    for tokens in (5, 1, 1, 300, 1, 70):
        both(tokens, own, found)
    for layer in (own, found):
        layer.crop(-100)
    both(1, own, found)
    both(3, own, found)
    for layer in (own, found):
        layer.batch_select_indices(torch.tensor([1, 0]))
    both(2, own, found)
    for layer in (own, found):
        layer.reset()
    both(4, own, found)


def test_a_token_is_written_in_place_until_the_room_is_used_up() -> None:
    found = Growing()
    found.update(torch.randn(1, 1, 10, 4), torch.randn(1, 1, 10, 4))
    at = found.keys.data_ptr()
    for _ in range(AHEAD):
        found.update(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4))
        assert found.keys.data_ptr() == at
    found.update(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4))
    assert found.keys.data_ptr() != at


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_a_model_says_the_same_with_it(architecture: Callable[..., Any], name: str) -> None:
    model = architecture(name, real=True).eval()
    ids = torch.arange(1, 13).view(2, 6)
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    cache = growing(model)
    assert cache is not None
    said = model.generate(input_ids=ids, past_key_values=cache, **how)
    assert torch.equal(said, model.generate(input_ids=ids, **how))


@pytest.mark.parametrize("name", ["t5", "gemma3"])
def test_what_keeps_something_else_is_left_to_transformers(
    architecture: Callable[..., Any], name: str
) -> None:
    assert growing(architecture(name, real=True)) is None
