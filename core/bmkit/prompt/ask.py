"""Ask a model what its masks are: rows of like length together, the head at masks alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bmkit import model as models
from bmkit.errors import InputError
from bmkit.prompting.encode import Encoded, Kind


class Asker:
    """A model that tells how likely tokens are at masks."""

    def __init__(self, model: Any, kind: Kind, pad: int, size: int) -> None:
        """Take a model in eval mode. `pad` fills rows up; `size` rows are asked together.

        A few tokens are run through the model, to see whether its head can be asked at masks alone.
        """
        self.model, self.kind, self.pad, self.size = model, kind, pad, size
        self.fills = model.config.model_type not in models.READ_PADDING
        self.head = _head(model)
        if self.head is not None and not self._agrees():
            self.head = None

    @torch.inference_mode()
    def logprobs(
        self,
        prompts: Sequence[Encoded],
        token_ids: Tensor,
        done: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return log-probabilities of `token_ids` [columns] at masks: float32 [rows, columns].

        Where a prompt has several masks, it is that at the first. `done` hears of each batch how
        many rows it had. Peak memory: the activations of one batch, and its logits at masks.
        Raises InputError if the model's output is not a number.
        """
        found = torch.empty(len(prompts), len(token_ids))
        ids = token_ids.to(self.model.device)
        for places in self.batches(prompts):
            logits = self._logits([prompts[at] for at in places])
            if not logits.isfinite().all():
                raise InputError("the model's output is not a number; its weights are damaged")
            chosen = logits.float().log_softmax(-1).index_select(-1, ids)
            found[places] = chosen.cpu()
            if done is not None:
                done(len(places))
        return found

    def batches(self, prompts: Sequence[Encoded]) -> Iterator[list[int]]:
        """Yield places of prompts to ask together, the longest first.

        A model that reads padding as text gets prompts of the same length.
        """
        lengths = [(len(p.ids), len(p.decoder_ids)) for p in prompts]
        order = sorted(range(len(prompts)), key=lambda at: lengths[at], reverse=True)
        batch: list[int] = []
        for at in order:
            other = bool(batch) and not self.fills and lengths[at] != lengths[batch[0]]
            if len(batch) == self.size or other:
                yield batch
                batch = []
            batch.append(at)
        if batch:
            yield batch

    def _logits(self, prompts: Sequence[Encoded]) -> Tensor:
        """Return the logits at the first mask of each prompt, [rows, vocabulary]."""
        given = {
            "input_ids": self._padded([p.ids for p in prompts], self.pad),
            "attention_mask": self._padded([[1] * len(p.ids) for p in prompts], 0),
        }
        if self.kind == "seq2seq":
            given["decoder_input_ids"] = self._padded([p.decoder_ids for p in prompts], self.pad)
        reads = torch.tensor([p.reads[:1] for p in prompts], device=self.model.device)
        return self._run(given, reads)[:, 0]

    def _run(self, given: dict[str, Tensor], reads: Tensor) -> Tensor:
        """Return the logits at `reads` [rows, masks], [rows, masks, vocabulary]."""
        length = given["decoder_input_ids" if self.kind == "seq2seq" else "input_ids"].shape[1]
        options = {} if self.kind == "masked" else {"use_cache": False}
        if self.head is None:
            logits: Tensor = self.model(**given, **options).logits
            return _gathered(logits, reads, length)
        with _at(self.head, reads, length):
            found: Tensor = self.model(**given, **options).logits
        return found

    @torch.inference_mode()
    def _agrees(self) -> bool:
        """Tell whether asking at one place gives what the model says there."""
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.arange(4, device=self.model.device)[None] % vocabulary
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.kind == "seq2seq":
            given["decoder_input_ids"] = ids
        reads = torch.tensor([[2]], device=self.model.device)
        there, self.head = self._run(given, reads), (head := self.head) and None
        whole, self.head = self._run(given, reads), head
        near = 16 * torch.finfo(whole.dtype).eps
        return there.shape == whole.shape and torch.allclose(
            there, whole, rtol=near, atol=near * float(whole.abs().max())
        )

    def _padded(self, rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        longest = max(map(len, rows))
        filled = [[*row, *[fill] * (longest - len(row))] for row in rows]
        return torch.tensor(filled, device=self.model.device)


def _head(model: Any) -> nn.Module | None:
    """Return the module that reads hidden states [rows, time, width] and ends in logits.

    That is the outermost one around the output embeddings, as BERT's `cls`.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    last = getattr(core, "get_output_embeddings", lambda: None)()
    if not isinstance(last, nn.Module):
        return None
    inputs = core.get_input_embeddings()
    for child in core.children():
        inside = set(child.modules())
        if last in inside and inputs not in inside:
            return child if isinstance(child, nn.Module) else None
    return last


@contextmanager
def _at(head: nn.Module, reads: Tensor, length: int) -> Iterator[None]:
    """Let `head` read at `reads` [rows, masks] alone, of rows of `length` tokens."""

    def before(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = given
        return (_gathered(hidden, reads, length), *rest)

    handle = head.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def _gathered(hidden: Tensor, reads: Tensor, length: int) -> Tensor:
    """Return [rows, masks, width] of [rows, time, width]; deltas may have put tokens in front."""
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    return hidden[rows, reads.to(hidden.device) + hidden.shape[1] - length]
