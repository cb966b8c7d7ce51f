"""Divide the neurons of a feed-forward into experts, and learn which of them a token needs.

MoEfication: Transformer Feed-forward Layers are Mixtures of Experts, arXiv 2110.01786; with a
measure of importance that looks at outputs, and neurons that are always computed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

FLOOR = 1e-4
"""Added to an expert's share of a token's energy before its logarithm is taken."""
DAMP = 1e-3
"""Added to the ridge's curvature, of its diagonal's mean."""
CHUNK = 1024


def importance(activations: Tensor, down: Tensor) -> Tensor:
    """Return how much each neuron adds to each token's output: |a_i|·‖column i of down‖.

    `activations` [tokens, neurons] are what goes into `down` [hidden, neurons].
    """
    columns: Tensor = torch.linalg.vector_norm(down.float(), dim=0)
    return activations.abs() * columns


def used(important: Tensor, share: float) -> Tensor:
    """Tell which neurons are among the most important of a token: bool [tokens, neurons]."""
    count = max(round(share * important.shape[1]), 1)
    top = important.float().topk(count).indices
    return torch.zeros_like(important, dtype=torch.bool).scatter_(1, top, True)


def divide(points: Tensor, often: Tensor, shared: int, size: int, *, seed: int) -> Tensor:
    """Return an order of the neurons in which each `size` of them make up an expert: int64.

    The first `shared` experts hold the neurons that are used most `often` [neurons]; the others
    are balanced clusters of `points` [neurons, any].
    """
    ranked = often.argsort(descending=True, stable=True)
    always = ranked[: shared * size].sort().values
    rest = ranked[shared * size :].sort().values
    if not len(rest):
        return always
    labels = balanced_clusters(points[rest], len(rest) // size, seed=seed)
    return torch.cat((always, rest[labels.argsort(stable=True)]))


def balanced_clusters(points: Tensor, count: int, *, seed: int, rounds: int = 10) -> Tensor:
    """Divide `points` [n, d] into `count` clusters of equal size by k-means: labels int64 [n].

    Each point goes to the nearest centre that has room, those first that would lose most
    otherwise; then pairs are exchanged while that brings both together nearer. On unit vectors of
    which tokens use a neuron, that is a partition of the co-activation graph into equal parts:
    squared distances inside of clusters are least where co-activations inside are most.
    Memory: n x `count` floats, and some thousand rows of n. Raises ValueError if `count` doesn't
    divide n.
    """
    if len(points) % count:
        raise ValueError(f"{len(points)} neurons can't be divided into {count} equal experts")
    points, size = points.float(), len(points) // count
    centres = _far_apart(points, count, torch.Generator().manual_seed(seed))
    labels = points.new_zeros(len(points), dtype=torch.long)
    for turn in range(rounds):
        cost = centres.square().sum(1) - 2 * points @ centres.T  # [n, count]
        new = _exchange(cost, _nearest_with_room(cost, size), turns=4)
        if turn and torch.equal(new, labels):
            break
        labels = new
        centres = torch.zeros_like(centres).index_add_(0, labels, points) / size
    return labels


def _far_apart(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of the points, each by its squared distance to those before (k-means++)."""
    picked = [int(torch.randint(len(points), (1,), generator=generator))]
    lengths = points.square().sum(1)
    far = torch.full_like(lengths, torch.inf)
    for _ in range(count - 1):
        last = points[picked[-1]]
        far = torch.minimum(far, (lengths + last.square().sum() - 2 * points @ last).clamp_min(0))
        far[picked[-1]] = 0
        upto = far.double().cumsum(0).cpu()
        place = torch.rand(1, generator=generator, dtype=torch.float64) * upto[-1]
        picked.append(min(int(torch.searchsorted(upto, place, right=True)), len(points) - 1))
    return points[torch.tensor(picked, device=points.device)]


def _nearest_with_room(cost: Tensor, size: int) -> Tensor:
    count = cost.shape[1]
    labels = torch.full((len(cost),), -1, device=cost.device)
    room = torch.full((count,), size, device=cost.device)
    while len(free := (labels < 0).nonzero()[:, 0]):
        left = cost[free].masked_fill(room == 0, torch.inf)
        two = left.topk(min(2, int((room > 0).sum())), largest=False)
        regret = two.values[:, -1] - two.values[:, 0]
        order = regret.argsort(descending=True, stable=True)
        wanted = two.indices[order, 0]
        by_cluster = wanted.argsort(stable=True)
        cluster = wanted[by_cluster]
        start = torch.searchsorted(cluster, torch.arange(count, device=cost.device))
        place = torch.arange(len(cluster), device=cost.device) - start[cluster]
        fits = place < room[cluster]
        labels[free[order[by_cluster[fits]]]] = cluster[fits]
        room -= torch.bincount(cluster[fits], minlength=count)
    return labels


def _exchange(cost: Tensor, labels: Tensor, *, turns: int) -> Tensor:
    """Exchange pairs of points between clusters where that lowers the sum of both costs."""
    labels = labels.clone()
    for _ in range(turns):
        own = cost.gather(1, labels[:, None])[:, 0]
        parts = []
        for low in range(0, len(cost), CHUNK):
            part = slice(low, low + CHUNK)
            there = cost[part][:, labels] + cost[:, labels[part]].T  # [part, n]
            parts.append((own[part, None] + own - there).max(1))
        gains = torch.cat([p.values for p in parts])
        partners = torch.cat([p.indices for p in parts]).tolist()
        order = gains.argsort(descending=True, stable=True).tolist()
        held, moved = labels.tolist(), set()
        for i in order:
            j = partners[i]
            if float(gains[i]) <= 1e-6:
                break
            if i not in moved and j not in moved:
                held[i], held[j] = held[j], held[i]
                moved |= {i, j}
        if not moved:
            break
        labels = torch.tensor(held, device=cost.device)
    return labels


def energies(important: Tensor, shared: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the energy of the routed experts [tokens, experts], and of all neurons [tokens].

    `important` [tokens, neurons] is in the order of `divide`. An expert's energy is the sum of its
    neurons' squared importance: about the squared length of what it adds to the output.
    """
    squared = torch.unflatten(important.float().square(), 1, (-1, size)).sum(-1)
    return squared[:, shared:], squared.sum(1)


def target(energy: Tensor, whole: Tensor, floor: float = FLOOR) -> Tensor:
    """Return what routers learn: the logarithm of each expert's share of a token's energy.

    Which experts are best is told better by it than by the share, which a few large values rule.
    """
    return (energy / whole.clamp_min(1e-30)[:, None] + floor).log()


@dataclass
class Ridge:
    """Least squares of targets on inputs, from sums, so that tokens may come a part at a time."""

    count: int = 0
    _sums: list[Tensor] = field(default_factory=list)
    _shift: Tensor | None = None
    """Taken from inputs, so that little is lost where they differ little from their mean."""

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in tokens: `x` [tokens, hidden], and their targets `y` [tokens, targets]."""
        x, y = x.float(), y.float()
        if self._shift is None:
            self._shift = x.mean(0)
        x = x - self._shift
        found = [t.double() for t in (x.sum(0), y.sum(0), x.T @ x, y.T @ x)]
        before = self._sums or [torch.zeros_like(t) for t in found]
        self._sums = [a + b for a, b in zip(before, found, strict=True)]
        self.count += len(x)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return weight [targets, hidden] and bias [targets], float32."""
        weight, _, level, mean = self._solve()
        return weight.float(), (level - weight @ mean).float()

    def foreseen(self) -> Tensor:
        """Return points [targets, hidden + 1] as far apart as what is foretold of two targets.

        Their squared distances are the mean of (difference of the two fits)² over all tokens.
        """
        weight, curvature, level, _ = self._solve()
        return torch.cat((weight @ torch.linalg.cholesky(curvature), level[:, None]), 1).float()

    def _solve(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the weight, the damped curvature, and the means of targets and of inputs."""
        mean_x, mean_y, xx, yx = (t / self.count for t in self._sums)
        xx = xx - mean_x[:, None] * mean_x
        yx = yx - mean_y[:, None] * mean_x
        xx.diagonal().add_(DAMP * xx.diagonal().mean() + 1e-12)
        assert self._shift is not None  # tokens have come
        return torch.linalg.solve(xx, yx.T).T, xx, mean_y, mean_x + self._shift.double()


def similarity(rows: Tensor, x: Tensor, shared: int, size: int) -> tuple[Tensor, Tensor]:
    """Return a router without training: how near a token is to the centre of an expert's rows.

    `rows` [neurons, hidden] of gate (or up), in the order of `divide`, are taken at unit length,
    as MoEfication does; tokens `x` [tokens, hidden] at their mean length.
    """
    unit = functional.normalize(rows.float(), dim=1)
    centres = torch.unflatten(unit, 0, (-1, size)).mean(1)[shared:]
    length = x.float().norm(dim=1).mean().clamp_min(1e-12)
    return 2 * centres / length, -centres.square().sum(1)


Layers = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weight and bias of the last layer, then of the first."""


def two_layers(
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
    epochs: int = 8,
    learning_rate: float = 1e-3,
) -> Layers:
    """Train out(tanh(in(x))), beginning as the linear router `weight`, `bias` on tokens `x`, `y`.

    Half of the inner units carry the linear scores where tanh is nearly straight, the others start
    at random and unheard. Least squares on `y` [tokens, experts], by AdamW in batches of 256.
    """
    experts = len(weight)
    generator = torch.Generator().manual_seed(seed)
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    scale = ((x - mean) @ weight.T).std(0).clamp_min(1e-6) / 0.3  # tanh(0.3) is 0.291
    drawn = torch.randn(experts, x.shape[1], generator=generator).to(x.device)
    inner = torch.cat((weight / scale[:, None], 1.5 * drawn / spread / x.shape[1] ** 0.5))
    outer = torch.cat((scale.diag(), torch.zeros_like(scale.diag())), 1)
    parts = [outer, weight @ mean + bias, inner, -inner @ mean]
    layers = [p.clone().requires_grad_() for p in parts]
    optimizer = torch.optim.AdamW(layers, lr=learning_rate)
    batch = min(256, len(x))
    total = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / max(total, 1))
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=generator).to(x.device)
            for low in range(0, len(x) - batch + 1, batch):
                some = order[low : low + batch]
                last, last_bias, first, first_bias = layers
                said = torch.tanh(x[some] @ first.T + first_bias) @ last.T + last_bias
                optimizer.zero_grad()
                (said - y[some]).square().mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    last, last_bias, first, first_bias = (p.detach() for p in layers)
    return last, last_bias, first, first_bias


def captured(energy: Tensor, whole: Tensor, scores: Tensor) -> Tensor:
    """Return the share of all tokens' energy that is computed with 0, 1, … experts: [experts + 1].

    `energy` [tokens, experts] is that of the routed experts, `whole` [tokens] of all neurons; the
    experts with the highest `scores` are computed, and the shared ones always.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    gained = energy.gather(1, order).double().sum(0).cumsum(0)
    total = whole.double().sum().clamp_min(1e-30)
    always = total - energy.double().sum()
    return torch.cat((gained.new_zeros(1), gained)).add(always).div(total).float()


def spend(curves: Sequence[Tensor], budget: int) -> list[int]:
    """Return how many experts each block computes, `budget` in all.

    `curves` say for each block what 0, 1, … experts are worth. One expert after the other goes to
    where it is worth most, after each block has one.
    """
    values = [curve.tolist() for curve in curves]
    counts = [min(1, len(v) - 1) for v in values]
    queue = [
        (v[n] - v[n + 1], b)
        for b, (v, n) in enumerate(zip(values, counts, strict=True))
        if n + 1 < len(v)
    ]
    heapq.heapify(queue)
    left = budget - sum(counts)
    while queue and left > 0:
        _, block = heapq.heappop(queue)
        counts[block] += 1
        left -= 1
        now, worth = counts[block], values[block]
        if now + 1 < len(worth):
            heapq.heappush(queue, (worth[now] - worth[now + 1], block))
    return counts
