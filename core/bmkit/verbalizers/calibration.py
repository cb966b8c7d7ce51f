"""Calibration: what a template makes likely by itself is divided away.

The prior comes from inputs that say nothing (Calibrate Before Use, arXiv 2102.09690), from rows
without labels (contextual, arXiv 2108.02035), or from a domain alone (PMI, arXiv 2104.08315): the
same mathematics on other rows.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

CONTENT_FREE = ("", "N/A", "[MASK]")
"""Texts that say nothing, for each placeholder of a template."""


def prior(
    logprobs: Tensor, over: Literal["probabilities", "logarithms"] = "probabilities"
) -> Tensor:
    """Return the mean of the rows of `logprobs` [rows, ...] as log-probabilities [...].

    The mean is that of probabilities, or of their logarithms; it sums to one. -inf marks places
    where there is no word.
    """
    if over == "probabilities":
        mean = logprobs.logsumexp(0) - math.log(len(logprobs))
    else:
        mean = logprobs.mean(0)
    return mean - mean.flatten().logsumexp(0)


def apply(logprobs: Tensor, prior: Tensor) -> Tensor:
    """Divide probabilities [rows, ...] by their prior [...], and let them sum to one again.

    Both are log-probabilities, of labels or of words. -inf marks places where there is no word.
    """
    raised = relative(logprobs, prior)
    return raised.flatten(1).log_softmax(-1).view_as(raised)


def relative(logprobs: Tensor, prior: Tensor) -> Tensor:
    """Return by how much each is likelier than its prior, as a logarithm (PMI); -inf stays.

    What the prior excludes is excluded.
    """
    return torch.where(prior.isfinite(), logprobs - prior, -torch.inf)
