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
from bmkit.runtime.growing import growing


def place(
    path: Path,
    *,
    device: torch.device,
    dtype: str = "auto",
    quant: str | None = None,
    memory: int | None = None,
) -> Any:
    """Open the checkpoint at `path` in transformers' own code, on weights as they are stored.

    With `quant` they are rounded; with `memory` they take so many bytes, and the rest is streamed.
    Returns a `Placed`: close it when it isn't used any more. Raises InputError for what can't be
    loaded, ResourceError with the smallest memory that works.
    """
    from bmkit.runtime.placed import load
    from bmkit.runtime.placed.model import Room, place_model

    model = load.empty(path)
    chosen = models.compute_dtype(dtype, models.stored_dtype(model.config), device)
    if device.type == "cpu":
        load.warm()
    room = Room(memory)
    return place_model(path, model, device=device, dtype=chosen, quant=quant, room=room)


class Voice:
    """The checkpoint at `path`, in the fused decoder where that can run it.

    With `quant` (`int8`, `int4`) its weights are rounded while they are loaded; with `memory` they
    take so many bytes, and the rest is streamed.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: torch.device,
        dtype: str,
        rows: int,
        reporter: Reporter,
        quant: str | None = None,
        memory: int | None = None,
    ) -> None:
        self.tokenizer = models.load_tokenizer(path)
        self.eos = eos_ids(models.load_generation_config(path), self.tokenizer)
        self.rows = rows
        self.decoder: Any = None
        self.model: Any = None
        config = read_headers(path).config
        fused = device.type == "cpu" and dtype in {"auto", "float32"} and memory is None
        if fused and family.covers(config):
            from bmkit.runtime import cpu
            from bmkit.runtime.cpu import load

            threads = torch.get_num_threads()
            divided = (path / experts.FILE).is_file()
            if not cpu.compiled(divided=divided):
                reporter.info("compiling kernels for this machine, once (some 15 seconds)")
            load.warm(threads, divided=divided)
            decoder = load.load_decoder(path, threads=threads, quant=quant)
            if load.largest_difference(decoder) <= load.TOLERANCE:
                self.decoder = decoder
        if self.decoder is not None:
            return
        rounded = family.rounds_inputs(config.get("quantization_config"))
        if quant or memory is not None or rounded:
            self.model = place(path, device=device, dtype=dtype, quant=quant, memory=memory).model
            self.model.generation_config = models.load_generation_config(path)
        else:
            self.model = models.load_model(path, device=device, dtype=dtype)
        plain_defaults(self.model)
        experts.attach_stored(self.model, path)

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
            cache = growing(self.model) if self.model.device.type == "cpu" else None
            more = {} if cache is None else {"past_key_values": cache}
            answers = generate(self.model, self.tokenizer, ids, how, numbers=numbers, more=more)
            yield from zip(taken, answers, strict=True)

    @torch.inference_mode()
    def logits(self, ids: list[int], first: int) -> Iterator[Tensor]:
        """Yield the logits behind the tokens from `first` on, a few [tokens, vocabulary] a time.

        An encoder-decoder's encoder reads the tokens up to `first`, the decoder those behind.
        """
        if self.decoder is not None:
            cache = self.decoder.cache(1, -(-len(ids) // 64) * 64)
            for low, logits in self.decoder.all_logits(cache, 0, ids, 64):
                if low + len(logits) > first:
                    yield torch.from_numpy(logits[max(first - low, 0) :])
            return
        whole = torch.tensor([ids], device=self.model.device)
        if self.model.config.is_encoder_decoder:
            said = models.behind_start(self.model.config, whole[:, first + 1 :])
            given = {"input_ids": whole[:, : first + 1], "decoder_input_ids": said}
            yield self.model(**given, use_cache=False).logits[0]
            return
        yield self.model(input_ids=whole, use_cache=False).logits[0, first:]
