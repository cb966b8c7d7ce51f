"""Labels by words at several masks (PTR, arXiv 2105.11259), or by texts of each row's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from bmkit.prompt import masks
from bmkit.prompt.ask import Asker
from bmkit.prompt.labels import Verbalizer
from bmkit.prompting.encode import Encoded
from bmkit.prompting.generation import Choosing
from bmkit.verbalizers import calibration, filled, manual
from bmkit.verbalizers.rules import SubLabels


@dataclass(frozen=True)
class Rules(Verbalizer):
    """A word of each label at each mask; a label is as likely as all of them together.

    A masked model tells all masks in one pass, and the words at them count by themselves. Others
    say the masks in turn, by `likelihood`. `prior` is that of labels, [labels].
    """

    own_labels: tuple[str, ...] = ()
    """The labels, where each row has texts of its own for them, and there are no words."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the labels in their order."""
        return self.own_labels or self.words.labels

    @cached_property
    def sub_labels(self) -> SubLabels:
        """Return which labels share a word at a mask."""
        return SubLabels.of(self.words)

    def ask(
        self, asker: Asker, prompts: Sequence[Encoded], done: Callable[[int], None] | None = None
    ) -> Tensor:
        """Return what a model says, [rows, masks * columns], or by likelihood [rows, labels]."""
        return asker.each(prompts, lambda part: self._said(asker, part), done)

    def said(self, asker: Asker, prompts: Sequence[Encoded]) -> Tensor:
        """Return the same with gradients, in one batch."""
        return self._said(asker, prompts).float().cpu()

    def _said(self, asker: Asker, prompts: Sequence[Encoded]) -> Tensor:
        if self.handler == "likelihood":
            alike = [[word.ids for word in own] for own in self.words.words]
            return filled.score(
                asker.model,
                prompts,
                asker.kind,
                [p.texts if isinstance(p, Choosing) else alike for p in prompts],
                by=self.combine,
                mask_token=asker.mask_token,
                batch_tokens=asker.batch_tokens,
            )
        found = masks.all_logits(asker.model, prompts, asker.kind).float().log_softmax(-1)
        return found[..., self.columns.token_ids.to(found.device)].flatten(1)

    def loss(self, said: Tensor, right: Tensor) -> Tensor:
        """Return the summed loss of labels and, where masks are told apart, of sub-labels."""
        found = functional.nll_loss(self.label_logprobs(said), right, reduction="sum")
        if self.handler == "likelihood":
            return found
        return found + self.sub_labels.loss(self._at_masks(said), right)

    def _at_masks(self, said: Tensor) -> Tensor:
        """Return the scores of labels' words at masks, [rows, masks, labels]."""
        scores = said.view(len(said), -1, len(self.columns.token_ids))
        handler = "first" if self.handler == "likelihood" else self.handler
        return manual.rule_scores(scores, self.columns, handler)

    def label_logprobs(self, said: Tensor) -> Tensor:
        """Return log-probabilities of labels, [rows, labels]."""
        scores = said if self.handler == "likelihood" else self._at_masks(said).sum(1)
        found = scores.log_softmax(-1)
        return found if self.prior is None else calibration.apply(found, self.prior)

    def calibrated(self, said: Tensor) -> Verbalizer:
        """Return the verbalizer with the labels' prior by what was `said`."""
        return replace(
            self, prior=calibration.prior(replace(self, prior=None).label_logprobs(said))
        )

    def kept_prior(self) -> list[list[float]] | None:
        """Return the prior as an artifact keeps it: one number a label."""
        return None if self.prior is None else [[float(one)] for one in self.prior]

    def with_prior(self, kept: Sequence[Sequence[float]]) -> Verbalizer:
        """Return the verbalizer with the prior that was kept."""
        return replace(self, prior=torch.tensor([one for (one,) in kept]))
