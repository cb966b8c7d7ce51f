"""The prototypical verbalizer: labels are points among states at the mask (arXiv 2203.09770)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 64


class Prototypes(nn.Module):
    """A projection of states at the mask, and a prototype of each label among them."""

    def __init__(self, hidden_size: int, labels: int, *, size: int = SIZE, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.projection = nn.Linear(hidden_size, size, bias=False)
        bound = hidden_size**-0.5
        with torch.no_grad():
            self.projection.weight.uniform_(-bound, bound, generator=draw)
        start = torch.empty(labels, size)
        self.prototypes = nn.Parameter(nn.init.xavier_uniform_(start, generator=draw))

    def forward(self, states: Tensor) -> Tensor:
        """Return cosines with the prototypes, [rows, labels], of states [rows, hidden_size]."""
        return _cosines(self.projection(states), self.prototypes)

    def loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Return the contrastive loss of rows with `labels` [rows], a number.

        It is InfoNCE between a row and each of its label (itself among them) against all rows of
        others, and between a row and its label's prototype against the others: each the mean over
        pairs, and their sum.
        """
        near = self.projection(states)
        to_rows = _cosines(near, near)  # [rows, rows]
        same = labels[:, None] == labels[None, :]
        against = to_rows.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
        pairs = torch.logaddexp(to_rows, against) - to_rows
        between = pairs[same].mean()
        return between + functional.cross_entropy(_cosines(near, self.prototypes), labels)


def fit(
    module: Prototypes,
    states: Tensor,
    labels: Tensor,
    *,
    epochs: int = 5,
    learning_rate: float = 1e-3,
) -> list[float]:
    """Train on all rows at once with Adam; return the loss before each epoch."""
    states = states.detach().clone()  # those of inference mode can't be trained on
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
    losses = []
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = module.loss(states, labels)
        losses.append(float(loss.detach()))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


def together(*scores: Tensor) -> Tensor:
    """Return the mean of several verbalizers' scores [rows, labels], each brought to one scale.

    Each row of each is moved to mean 0 and deviation 1; scores that are all alike count nothing.
    """
    scaled = []
    for one in scores:
        moved = one - one.mean(-1, keepdim=True)
        spread = moved.std(-1, keepdim=True, correction=1) if one.shape[-1] > 1 else moved.abs()
        scaled.append(torch.where(spread > 0, moved / spread.clamp_min(1e-12), 0.0))
    return torch.stack(scaled).mean(0)


def _cosines(left: Tensor, right: Tensor) -> Tensor:
    return functional.normalize(left, dim=-1) @ functional.normalize(right, dim=-1).T
