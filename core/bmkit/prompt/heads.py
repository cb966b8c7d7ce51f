"""The output head alone, on states at masks that were kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bmkit.nn import products
from bmkit.prompt import masks
from bmkit.prompt.ask import Asker
from bmkit.prompting.encode import Encoded
from bmkit.verbalizers.positions import most_reads


@dataclass(frozen=True)
class Head:
    """What a model makes of states at masks, with all that it does behind its head."""

    asker: Asker
    prompt: Encoded
    """Any prompt: the model is run on it for what comes behind the head."""

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Iterator[Tensor]:
        """Yield logits [n, vocabulary] of states [rows, hidden_size], so many rows at a time."""
        asker, step = self.asker, most_reads(self.asker.model)
        for at in range(0, len(states), step):
            part = states[at : at + step]
            with products.quick():
                said = masks.logits_of(asker.model, part, self.prompt, asker.kind)
            yield said

    def columns(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """Return the logits of some tokens, float32 [rows, tokens], on the CPU."""
        held = [part[:, token_ids.to(part.device)].float().cpu() for part in self.logits(states)]
        return torch.cat(held)

    def sums(self, states: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Return log-probabilities summed over rows by label, float64 [classes, vocabulary]."""
        total: Tensor | None = None
        at = 0
        for part in self.logits(states):
            own = torch.nn.functional.one_hot(labels[at : at + len(part)], classes).T.double()
            found = own @ part.cpu().double().log_softmax(-1)
            total = found if total is None else total + found
            at += len(part)
        if total is None:
            raise ValueError("there are no rows")
        return total
