"""Hard-concrete gates: units that learn whether they stay, and what keeps their number in bounds.

Learning Sparse Neural Networks through L0 Regularization (arXiv 1712.01312); a Lagrangian on the
expected size as in Structured Pruning Learns Compact and Accurate Models (arXiv 2204.00408).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""How steep a gate is, and the ends that it is stretched to before it is cut to [0, 1]."""
STIFFNESS = 10.0
"""What λ₂ begins with: from zero, shares swing around their target for hundreds of steps."""
_SHIFT = BETA * math.log(-GAMMA / ZETA)


def draw(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Return gates in [0, 1] drawn with `noise`, uniform in (0, 1), of the shape of `log_alpha`.

    A gate is 0 or 1 with a probability above zero; in between its gradient reaches `log_alpha`.
    """
    logit = noise.log() - (-noise).log1p()
    return _stretched(((logit + log_alpha) / BETA).sigmoid())


def settled(log_alpha: Tensor) -> Tensor:
    """Return the gates without noise, in [0, 1]."""
    return _stretched(log_alpha.sigmoid())


def open_share(log_alpha: Tensor) -> Tensor:
    """Return the probability that each gate isn't 0."""
    return (log_alpha - _SHIFT).sigmoid()


def start(probability: float) -> float:
    """Return the `log_alpha` of a gate that is open with this probability."""
    return math.log(probability / (1 - probability)) + _SHIFT


def _stretched(inner: Tensor) -> Tensor:
    return (inner * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class Bounded(nn.Module):
    """Gates in groups, each group with a share of its gates that is to stay open.

    `log_alpha` holds a parameter [groups, gates] of each kind. Descent on a loss with `penalty`
    added moves the gates, and ascends the multipliers: their gradient is turned round.
    """

    step: Tensor

    def __init__(
        self, sizes: Mapping[str, tuple[int, int]], targets: Mapping[str, float], warmup: int
    ) -> None:
        super().__init__()
        self.log_alpha = nn.ParameterDict(
            {kind: nn.Parameter(torch.full(size, start(0.95))) for kind, size in sizes.items()}
        )
        self.multipliers = nn.ParameterDict()
        for kind, (groups, _) in sizes.items():
            both = torch.stack((torch.zeros(groups), torch.full((groups,), STIFFNESS)))
            self.multipliers[kind] = nn.Parameter(both)
            self.multipliers[kind].register_hook(torch.neg)
        self.targets, self.warmup = dict(targets), warmup
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def draw(self) -> dict[str, Tensor]:
        """Draw all gates: [groups, gates] of each kind."""
        found = {}
        for kind, log_alpha in self.log_alpha.items():
            noise = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
            found[kind] = draw(log_alpha, noise)
        return found

    def expected(self) -> dict[str, Tensor]:
        """Return the expected share of open gates of each group: [groups] of each kind."""
        return {kind: open_share(value).mean(1) for kind, value in self.log_alpha.items()}

    def penalty(self) -> Tensor:
        """Return λ₁·(s - t) + λ₂·(s - t)², summed over groups of all kinds.

        s is a group's expected share; t falls to its target over `warmup` steps.
        """
        done = min(float(self.step) / self.warmup, 1.0) if self.warmup else 1.0
        whole = self.step.new_zeros((), dtype=torch.float32)
        for kind, share in self.expected().items():
            over = share - (1 - done * (1 - self.targets[kind]))
            first, second = self.multipliers[kind]
            whole = whole + (first * over + second * over.square()).sum()
        return whole
