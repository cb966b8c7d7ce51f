"""From states at masks to labels: the soft and the prototypical verbalizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from bmkit.deltas.held import base_of
from bmkit.errors import InputError, first_line
from bmkit.model import save_tensors
from bmkit.prompt import masks
from bmkit.prompt.ask import Asker
from bmkit.prompt.labels import FILE
from bmkit.prompting.encode import Encoded
from bmkit.prompting.labelwords import LabelWords
from bmkit.verbalizers.prototypes import Prototypes
from bmkit.verbalizers.softwords import SoftWords

NAME = "bmkit_verbalizer"
"""What a model calls its verbalizer while both are trained."""


@dataclass(frozen=True)
class States:
    """A module that tells labels from what a head would read at a mask; as `labels.Verbalizer`."""

    module: SoftWords | Prototypes
    labels: tuple[str, ...]
    several: bool = False

    def ask(
        self, asker: Asker, prompts: Sequence[Encoded], done: Callable[[int], None] | None = None
    ) -> Tensor:
        """Return states at masks, float32 [rows, hidden_size]."""
        return asker.states(prompts, done)

    def said(self, asker: Asker, prompts: Sequence[Encoded]) -> Tensor:
        """Return the same with gradients, in one batch, where the model is."""
        return masks.states(asker.model, prompts, asker.kind).float()

    def loss(self, said: Tensor, right: Tensor) -> Tensor:
        """Return the summed loss of states, a number: cross-entropy, or that of prototypes."""
        device = next(self.module.parameters()).device
        said, right = said.to(device), right.to(device)
        if isinstance(self.module, Prototypes):
            return self.module.loss(said, right) * len(right)
        return functional.cross_entropy(self.module(said), right, reduction="sum")

    def targets(self, right: Sequence[tuple[int, ...]]) -> Tensor:
        """Return rows' labels as numbers [rows]."""
        return torch.tensor([own[0] for own in right])

    @torch.no_grad()
    def label_logprobs(self, said: Tensor) -> Tensor:
        """Return log-probabilities of labels, [rows, labels], of states."""
        own = next(self.module.parameters())
        found: Tensor = self.module(said.to(own.device)).float().log_softmax(-1).cpu()
        return found

    def chosen(self, logprobs: Tensor) -> list[tuple[int, ...]]:
        """Return the label of each row, by log-probabilities of labels [rows, labels]."""
        return [(int(at),) for at in logprobs.argmax(-1)]

    def kept_prior(self) -> None:
        """Return None: no words are calibrated."""

    def save(self, folder: Path) -> None:
        """Write the module's weights, some kilobytes."""
        held = {n: t.detach().clone().contiguous() for n, t in self.module.state_dict().items()}
        save_tensors(folder / FILE, held)


def begun(
    kind: str, asker: Asker, words: LabelWords, *, size: int, seed: int, labels: tuple[str, ...]
) -> States:
    """Return a verbalizer that nothing has trained: by words, or with prototypes drawn.

    Its weights are in float32, on the model's device.
    """
    model = asker.model
    head: Any = base_of(model).get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise InputError("the model has no head that says words, whose states could be read")
    if kind == "prototypical":
        module: Any = Prototypes(head.weight.shape[1], len(labels), size=size, seed=seed)
        return States(module.to(model.device), labels)
    bias = getattr(head, "bias", None)
    made = SoftWords.of(words, head.weight.detach(), None if bias is None else bias.detach())
    return States(made.float(), labels)


def load(folder: Path, labels: tuple[str, ...]) -> States:
    """Read what `States.save` has written. Raises InputError if it is missing or damaged."""
    try:
        held = load_file(folder / FILE)
        if "prototypes" in held:
            size, width = held["projection.weight"].shape
            module: Any = Prototypes(width, len(labels), size=size)
        else:
            width = held["head.weight"].shape[1]
            module = SoftWords(width, len(labels), bias="head.bias" in held)
        module.load_state_dict(held)
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as exc:
        raise InputError(f"{folder / FILE} is damaged: {first_line(exc)}") from None
    return States(module.eval().requires_grad_(False), labels)
