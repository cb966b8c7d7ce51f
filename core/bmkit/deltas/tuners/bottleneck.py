"""A bottleneck: down, a non-linearity, up; its matrices dense, of low rank or sums of products."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from bmkit.deltas.tuners.beside import BesideConfig

KINDS = ("dense", "low_rank", "phm")
DEFAULT_DIM = 24


@dataclass
class BottleneckConfig(BesideConfig):
    """What adapters have in common. Raises ValueError for values that make no bottleneck."""

    bottleneck_dim: int | None = field(
        default=None,
        metadata={"help": f"Width of the bottleneck; {DEFAULT_DIM} without reduction_factor."},
    )
    reduction_factor: float | None = field(
        default=None, metadata={"help": "Its width as the module's, divided by this; or else."}
    )
    non_linearity: str = field(
        default="gelu_new", metadata={"help": "One of transformers' activations."}
    )
    scale: float = field(default=1.0, metadata={"help": "What the bottleneck's output is times."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout before the way up."})
    init_std: float = field(
        default=0.01,
        metadata={"help": "Standard deviation of the down-projection; up is zero."},
    )
    linear: str = field(
        default="dense", metadata={"help": "What its matrices are: dense, low_rank or phm."}
    )
    low_rank_rank: int = field(default=1, metadata={"help": "Rank of low_rank matrices."})
    hypercomplex_division: int = field(
        default=4, metadata={"help": "Number of products that a phm matrix is the sum of."}
    )
    phm_rank: int | None = field(
        default=1, metadata={"help": "Rank of the right factors of phm; null: full."}
    )
    shared_phm_rule: bool = field(
        default=True, metadata={"help": "Whether all phm matrices have the same left factors."}
    )
    learn_phm: bool = field(default=True, metadata={"help": "Whether left factors are trained."})

    def __post_init__(self) -> None:
        """Look for values that make no bottleneck."""
        super().__post_init__()
        activation(self.non_linearity)
        if self.linear not in KINDS:
            raise ValueError(f"linear: `{self.linear}` is not one of {', '.join(KINDS)}")
        if self.bottleneck_dim is not None and self.reduction_factor is not None:
            raise ValueError("give bottleneck_dim or reduction_factor, not both")
        sizes: dict[str, float | None] = {
            "bottleneck_dim": self.bottleneck_dim,
            "reduction_factor": self.reduction_factor,
            "low_rank_rank": self.low_rank_rank,
            "hypercomplex_division": self.hypercomplex_division,
            "phm_rank": self.phm_rank,
        }
        for name, value in sizes.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name}: {value} is not above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} is not from 0 to below 1")

    def dim(self, width: int) -> int:
        """Return how wide the bottleneck beside something of `width` is."""
        if self.reduction_factor is None:
            return self.bottleneck_dim or DEFAULT_DIM
        return max(1, int(width / self.reduction_factor))


def activation(name: str) -> nn.Module:
    """Return a non-linearity of transformers. Raises ValueError, with the nearest, for no such."""
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        close = difflib.get_close_matches(name, list(ACT2FN), n=1)
        raise ValueError(
            f"non_linearity: transformers has no activation `{name}`"
            + (f"; did you mean `{close[0]}`?" if close else "")
        )
    found: nn.Module = ACT2FN[name]
    return found


class Projection(nn.Module):
    """A linear map with a bias; no `nn.Linear`, so that nothing takes it for a layer to change.

    With `std` None it is zero, and nothing but the factor that comes last is: so it learns.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))

    def matrix(self) -> Tensor:
        """Return W [outputs, inputs]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return x · Wᵀ + bias."""
        return functional.linear(x, self.matrix(), self.bias)


class Dense(Projection):
    """A matrix as it is."""

    def __init__(self, inputs: int, outputs: int, std: float | None) -> None:
        super().__init__(outputs)
        self.weight = nn.Parameter(_drawn((outputs, inputs), std))

    def matrix(self) -> Tensor:
        """Return W."""
        return self.weight


class LowRank(Projection):
    """W = left · right."""

    def __init__(self, inputs: int, outputs: int, std: float | None, rank: int) -> None:
        super().__init__(outputs)
        each = _factor(std, rank)
        self.left = nn.Parameter(_drawn((outputs, rank), each or _factor(1.0, rank)))
        self.right = nn.Parameter(_drawn((rank, inputs), each))

    def matrix(self) -> Tensor:
        """Return W."""
        return self.left @ self.right

    def forward(self, x: Tensor) -> Tensor:
        """Return x · Wᵀ + bias, without making W."""
        return functional.linear(functional.linear(x, self.right), self.left, self.bias)


class Rule(nn.Module):
    """The left factors A [n, n, n] of a sum of n Kronecker products."""

    def __init__(self, n: int, *, learn: bool) -> None:
        super().__init__()
        drawn = _drawn((n, n, n), n**-0.5)  # then W's entries vary as those of the right factors
        if learn:
            self.weight = nn.Parameter(drawn)
        else:
            self.register_buffer("weight", drawn)


class Phm(Projection):
    """W = sum of A_i ⊗ B_i, i = 1 … n, of parameterised hypercomplex multiplication.

    It is Compacter's (arXiv 2106.04647): B_i = left_i · right_i if it has a rank. A rule that is
    shared is a child of the bottleneck that came first, and of no other module.
    """

    def __init__(
        self, inputs: int, outputs: int, std: float | None, rank: int | None, rule: Rule
    ) -> None:
        super().__init__(outputs)
        self.shared = (rule,)
        n = len(rule.weight)
        if inputs % n or outputs % n:
            raise ValueError(
                f"hypercomplex_division: {n} divides not both of {inputs} and {outputs}, the "
                "widths that phm is to be between"
            )
        if rank is None:
            self.right = nn.Parameter(_drawn((n, outputs // n, inputs // n), std))
            self.left = None
        else:
            each = _factor(std, rank)
            left = _drawn((n, outputs // n, rank), each or _factor(1.0, rank))
            self.left = nn.Parameter(left)
            self.right = nn.Parameter(_drawn((n, rank, inputs // n), each))

    def matrix(self) -> Tensor:
        """Return W."""
        right = self.right if self.left is None else self.left @ self.right  # [n, out/n, in/n]
        a = self.shared[0].weight.to(right)
        _, out, inputs = right.shape
        n = len(a)
        return torch.einsum("iab,icd->acbd", a, right).reshape(n * out, n * inputs)


class Bottleneck(nn.Module):
    """up(dropout(act(down(x)))), zero at the start: [..., inputs] to [..., outputs].

    It computes in its own dtype, and gives the dtype of what it reads.
    """

    def __init__(
        self, inputs: int, outputs: int, config: BottleneckConfig, rule: Rule | None = None
    ) -> None:
        super().__init__()
        dim = config.dim(outputs)
        shared = config.linear == "phm" and config.shared_phm_rule
        if shared and rule is None:
            self.rule = rule = Rule(config.hypercomplex_division, learn=config.learn_phm)
        self.common = (rule,)
        self.down = _projection(inputs, dim, config, config.init_std, rule)
        self.act = activation(config.non_linearity)
        self.dropout = nn.Dropout(config.dropout)
        self.up = _projection(dim, outputs, config, None, rule)
        self.scale = config.scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the change, scaled."""
        inner = self.down(x.to(self.down.bias.dtype))
        change: Tensor = self.up(self.dropout(self.act(inner)))
        return (change * self.scale).to(x.dtype)


def _projection(
    inputs: int, outputs: int, config: BottleneckConfig, std: float | None, rule: Rule | None
) -> Projection:
    if config.linear == "dense":
        return Dense(inputs, outputs, std)
    if config.linear == "low_rank":
        return LowRank(inputs, outputs, std, config.low_rank_rank)
    own = rule or Rule(config.hypercomplex_division, learn=config.learn_phm)
    made = Phm(inputs, outputs, std, config.phm_rank, own)
    if rule is None:
        made.rule = own
    return made


def _drawn(shape: tuple[int, ...], std: float | None) -> Tensor:
    return torch.zeros(shape) if std is None else torch.randn(shape) * std


def _factor(std: float | None, rank: int) -> float | None:
    """Return the deviation of two factors, so that their product over `rank` has `std`."""
    return None if std is None else math.sqrt(std / math.sqrt(rank))
