"""A model as one that speaks and judges: answers to prompts, and what it thinks of given texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmkit import model as models
from bmkit.plan import read_headers
from bmkit.report import Reporter
from bmkit.runtime import experts, family
from bmkit.runtime.generate import Answer, Generation, eos_ids, generate, plain_defaults


class Voice:
    """The checkpoint at `path`, in the fused decoder where that can run it."""

    def __init__(
        self, path: Path, *, device: torch.device, dtype: str, rows: int, reporter: Reporter
    ) -> None:
        self.tokenizer = models.load_tokenizer(path)
        self.eos = eos_ids(models.load_generation_config(path), self.tokenizer)
        self.rows = rows
        self.decoder: Any = None
        self.model: Any = None
        config = read_headers(path).config
        divided = experts.read(path)
        exact = dtype in {"auto", "float32"} and divided is None
        if device.type == "cpu" and exact and family.covers(config):
            from bmkit.runtime import cpu
            from bmkit.runtime.cpu import load

            threads = torch.get_num_threads()
            if not cpu.compiled():
                reporter.info("compiling kernels for this machine, once (some 15 seconds)")
            load.warm(threads)
            decoder = load.load_decoder(path, threads=threads)
            if load.largest_difference(decoder) <= load.TOLERANCE:
                self.decoder = decoder
        if self.decoder is None:
            self.model = models.load_model(path, device=device, dtype=dtype)
            plain_defaults(self.model)
            if divided is not None:
                experts.attach(self.model, divided)

    def answer(self, prompts: Iterable[Any], how: Generation) -> Iterator[tuple[Any, Answer]]:
        """Answer prompts (with `number`, `ids`, `adapter`), in the order that they get done."""
        if self.decoder is not None:
            from bmkit.runtime.cpu.serve import Server

            yield from Server(self.decoder, self.tokenizer, self.eos, how, rows=self.rows).answer(
                prompts
            )
            return
        left = iter(prompts)
        while taken := list(islice(left, self.rows)):
            ids, numbers = [p.ids for p in taken], [p.number for p in taken]
            answers = generate(self.model, self.tokenizer, ids, how, numbers=numbers)
            yield from zip(taken, answers, strict=True)

    @torch.inference_mode()
    def logits(self, ids: list[int], first: int) -> Iterator[Tensor]:
        """Yield the logits behind the tokens from `first` on, a few [tokens, vocabulary] a time."""
        if self.decoder is not None:
            cache = self.decoder.cache(1, -(-len(ids) // 64) * 64)
            for low, logits in self.decoder.all_logits(cache, 0, ids, 64):
                if low + len(logits) > first:
                    yield torch.from_numpy(logits[max(first - low, 0) :])
            return
        whole = torch.tensor([ids], device=self.model.device)
        yield self.model(input_ids=whole, use_cache=False).logits[0, first:]
