"""The mean of what several prompts say of the same rows."""

from __future__ import annotations

import math

import pytest
import torch

from bmkit.verbalizers import together


def logprobs(members: int = 3, rows: int = 4, labels: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(members, rows, labels, generator=draw).log_softmax(-1)


def test_probabilities_are_the_weighted_mean_of_the_members() -> None:
    said = logprobs()
    found = together.mean(said, [1.0, 3.0, 0.0], "probabilities").exp()
    for row in range(4):
        for label in range(3):
            one, two, _ = (math.exp(float(said[m, row, label])) for m in range(3))
            assert float(found[row, label]) == pytest.approx((one + 3 * two) / 4, abs=1e-6)


def test_logarithms_give_the_geometric_mean_normalised() -> None:
    said = logprobs()
    found = together.mean(said, [1.0, 1.0, 2.0], "logarithms").exp()
    for row in range(4):
        raised = [math.prod(math.exp(float(said[m, row, at])) ** (w / 4) for m, w in WEIGHED)
                  for at in range(3)]  # fmt: skip
        wanted = [value / sum(raised) for value in raised]
        assert found[row].tolist() == pytest.approx(wanted, abs=1e-6)


WEIGHED = ((0, 1), (1, 1), (2, 2))


@pytest.mark.parametrize("over", ["logarithms", "probabilities"])
def test_members_that_agree_are_as_one(over: together.Over) -> None:
    one = logprobs(1)
    found = together.mean(one.expand(3, -1, -1), [0.2, 0.5, 0.3], over)
    assert torch.allclose(found, one[0], atol=1e-6)


def test_weights_that_are_all_zero_count_alike() -> None:
    said = logprobs()
    both = [together.mean(said, w, "probabilities") for w in ([0.0] * 3, [1.0] * 3)]
    assert torch.equal(*both)


def test_labels_that_do_not_compete_have_the_mean_of_their_odds() -> None:
    shares = torch.tensor([[[0.9, 0.2]], [[0.5, 0.4]]])
    found = together.mean(shares.log(), [1.0, 1.0], "logarithms", several=True).exp()[0]
    for at, (one, two) in enumerate(((0.9, 0.5), (0.2, 0.4))):
        odds = math.sqrt(one / (1 - one) * two / (1 - two))
        assert float(found[at]) == pytest.approx(odds / (1 + odds), abs=1e-6)
    sure = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]).log()
    for over in ("logarithms", "probabilities"):
        assert not together.mean(sure, [1, 1], over, several=True).isnan().any()  # type: ignore[arg-type]


def test_the_likeliest_label_is_chosen_or_all_above_one_half() -> None:
    said = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.9]]).log()
    assert together.chosen(said) == [(0,), (2,)]
    assert together.chosen(said, several=True) == [(0,), (1, 2)]
