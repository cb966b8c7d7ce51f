"""Dividing neurons into experts: against brute force, closed forms, and planted structure."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmkit.nn import experts

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inner_cost(points: Tensor, labels: Tensor) -> float:
    """Return the squared distances of all points to the centres of their clusters."""
    total = 0.0
    for label in labels.unique():
        part = points[labels == label]
        total += float((part - part.mean(0)).square().sum())
    return total


def test_importance_is_how_long_the_vector_is_that_a_neuron_adds() -> None:
    activations, down = drawn(0, 5, 8), drawn(1, 3, 8)
    wanted = [[float((a * down[:, i]).norm()) for i, a in enumerate(row)] for row in activations]
    assert torch.allclose(experts.importance(activations, down), torch.tensor(wanted), rtol=1e-5)


@given(SEEDS, st.sampled_from([(6, 2), (12, 3), (24, 4), (40, 8), (7, 7), (9, 1)]))
@settings(max_examples=40, deadline=None)
def test_clusters_have_equal_sizes_and_no_exchange_makes_them_better(
    seed: int, shape: tuple[int, int]
) -> None:
    n, count = shape
    points = drawn(seed, n, 5)
    labels = experts.balanced_clusters(points, count, seed=1)
    assert labels.bincount(minlength=count).tolist() == [n // count] * count
    assert torch.equal(labels, experts.balanced_clusters(points, count, seed=1))
    centres = torch.stack([points[labels == c].mean(0) for c in range(count)])
    cost = (points[:, None] - centres).square().sum(-1)
    for i, j in combinations(range(n), 2):
        now = cost[i, labels[i]] + cost[j, labels[j]]
        assert now <= cost[i, labels[j]] + cost[j, labels[i]] + 1e-3 * float(cost.max())


def test_two_clusters_of_few_points_are_nearly_the_best_of_all() -> None:
    over = []
    for seed in range(40):
        points = drawn(seed, 8, 3)
        costs = []
        for some in combinations(range(8), 4):
            labels = torch.zeros(8, dtype=torch.long)
            labels[list(some)] = 1
            costs.append(inner_cost(points, labels))
        found = inner_cost(points, experts.balanced_clusters(points, 2, seed=0))
        over.append(found / min(costs))
        assert found < max(costs)
    assert np.mean(over) < 1.1
    assert np.median(over) < 1.02


def test_neurons_that_are_used_together_come_together() -> None:
    """Four groups of neurons, each used by tokens of its own, and one used by all."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, 4, (400,), generator=generator)
    kind = torch.arange(40) % 5  # 4: always
    important = 0.1 * torch.rand(400, 40, generator=generator)
    important += (kind == 4) | (kind == group[:, None])
    use = experts.used(important, 16 / 40)
    points = torch.nn.functional.normalize(use.T.float(), dim=1)
    order = experts.divide(points, use.sum(0), shared=1, size=8, seed=0)
    assert sorted(order.tolist()) == list(range(40))
    assert set(kind[order[:8]].tolist()) == {4}
    for low in range(8, 40, 8):
        assert len(set(kind[order[low : low + 8]].tolist())) == 1


@given(SEEDS, st.sampled_from([0, 1, 3]))
@settings(max_examples=20, deadline=None)
def test_energies_are_sums_of_squares_over_slices(seed: int, shared: int) -> None:
    important = drawn(seed, 7, 12).abs()
    energy, whole = experts.energies(important, shared, 3)
    for t in range(7):
        sums = [float(important[t, i : i + 3].square().sum()) for i in range(0, 12, 3)]
        assert energy[t].tolist() == pytest.approx(sums[shared:], rel=1e-5)
        assert float(whole[t]) == pytest.approx(sum(sums), rel=1e-5)


@given(SEEDS, st.sampled_from([1, 2, 4]))
@settings(max_examples=20, deadline=None)
def test_captured_is_what_the_best_by_score_hold(seed: int, shared: int) -> None:
    important, scores = drawn(seed, 9, 18).abs(), drawn(seed + 1, 9, 6 - shared)
    energy, whole = experts.energies(important, shared, 3)
    curve = experts.captured(energy, whole, scores)
    for count in range(7 - shared):
        held = 0.0
        for t in range(9):
            best = sorted(range(6 - shared), key=lambda e, t=t: -float(scores[t, e]))[:count]  # type: ignore[misc]
            held += float(whole[t] - energy[t].sum()) + sum(float(energy[t, e]) for e in best)
        assert float(curve[count]) == pytest.approx(held / float(whole.sum()), rel=1e-4)
    assert float(curve[-1]) == pytest.approx(1.0, rel=1e-5)
    assert (experts.captured(energy, whole, energy) >= curve - 1e-6).all()


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_the_ridge_is_that_of_numpy_whatever_the_parts(seed: int) -> None:
    x, y = drawn(seed, 60, 5), drawn(seed + 1, 60, 3)
    ridge = experts.Ridge()
    for low, high in ((0, 13), (13, 14), (14, 60)):
        ridge.add(x[low:high], y[low:high])
    weight, bias = ridge.solve()
    a, b = x.double().numpy(), y.double().numpy()
    centred = a - a.mean(0)
    curvature = centred.T @ centred / 60
    curvature += experts.DAMP * np.diag(curvature).mean() * np.eye(5)
    wanted = np.linalg.solve(curvature, centred.T @ (b - b.mean(0)) / 60).T
    assert np.allclose(weight.numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert np.allclose(bias.numpy(), b.mean(0) - wanted @ a.mean(0), rtol=1e-4, atol=1e-5)


def test_points_are_as_far_apart_as_what_is_foretold() -> None:
    x, y = drawn(0, 80, 5) @ drawn(2, 5, 5) + 1.0, drawn(1, 80, 4)
    ridge = experts.Ridge()
    ridge.add(x, y)
    weight, bias = ridge.solve()
    told = x @ weight.T + bias  # [tokens, targets]
    wanted = (told[:, :, None] - told[:, None]).square().mean(0)
    points = ridge.foreseen()
    found = (points[:, None] - points).square().sum(-1)
    assert torch.allclose(found, wanted, rtol=1e-2, atol=1e-4)


def test_two_layers_begin_as_the_linear_router_and_learn_what_it_can_not() -> None:
    x = drawn(0, 2048, 6)
    y = torch.stack((x[:, 0], (2 * x[:, 1]).tanh(), x[:, 2].abs()), 1)
    ridge = experts.Ridge()
    ridge.add(x, y)
    weight, bias = ridge.solve()

    def error(layers: experts.Layers) -> float:
        last, last_bias, first, first_bias = layers
        said = torch.tanh(x @ first.T + first_bias) @ last.T + last_bias
        return float((said - y).square().mean())

    linear = float((x @ weight.T + bias - y).square().mean())
    before = error(experts.two_layers(weight, bias, x, y, seed=0, epochs=0))
    after = error(experts.two_layers(weight, bias, x, y, seed=0, epochs=30, learning_rate=1e-2))
    assert before == pytest.approx(linear, rel=0.05)
    assert after < 0.7 * linear


def test_similarity_scores_are_distances_to_centres_of_unit_rows() -> None:
    rows = drawn(0, 12, 5)
    x = torch.nn.functional.normalize(drawn(1, 30, 5), dim=1) * 3.0  # all as long
    weight, bias = experts.similarity(rows, x, shared=1, size=3)
    unit = torch.nn.functional.normalize(rows, dim=1)
    for t in range(30):
        distances = [
            float((x[t] / 3.0 - unit[i : i + 3].mean(0)).square().sum()) for i in range(3, 12, 3)
        ]
        order = sorted(range(3), key=lambda e, d=distances: d[e])  # type: ignore[misc]
        assert (x[t] @ weight.T + bias).argsort(descending=True).tolist() == order


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_experts_are_spent_as_well_as_they_can_be(seed: int) -> None:
    """On curves that flatten, the greedy choice is the best of all."""
    steps = drawn(seed, 3, 4).abs().sort(descending=True).values
    curves = [torch.cat((torch.zeros(1), row.cumsum(0))) for row in steps]
    for budget in (3, 6, 9, 12):
        counts = experts.spend(curves, budget)
        assert sum(counts) == budget
        worth = sum(float(c[n]) for c, n in zip(curves, counts, strict=True))
        choices = {p for p in permutations([1, 2, 3, 4] * 3, 3) if sum(p) == budget}
        best = max(sum(float(c[n]) for c, n in zip(curves, p, strict=True)) for p in choices)
        assert worth == pytest.approx(best, rel=1e-5)


def test_more_than_there_are_can_not_be_spent() -> None:
    assert experts.spend([torch.tensor([0.0, 1.0]), torch.tensor([0.5])], 9) == [1, 0]


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="equal experts"):
        experts.balanced_clusters(drawn(0, 10, 2), 3, seed=0)
