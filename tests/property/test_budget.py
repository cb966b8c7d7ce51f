"""A budget that is enough gives the tokens of plain transformers; a smaller one is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
    T5Config,
)

from bmkit.errors import ResourceError
from bmkit.plan import Headers, read_headers
from bmkit.runtime import budget, expect, family
from bmkit.runtime.budget import Placement
from bmkit.runtime.choose import Chosen
from bmkit.runtime.cpu.load import load_decoder
from bmkit.runtime.placed import load
from bmkit.runtime.placed.model import Room, place_model

TOKENS = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    **TOKENS,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 48}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GROUPED),
    "gpt2": GPT2Config(**TOKENS, n_embd=192, n_layer=5, n_head=4, n_positions=8192),
    "opt": OPTConfig(
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
        ffn_dim=384,
        word_embed_proj_dim=192,
    ),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=8),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "t5": T5Config(
        **TOKENS,
        d_model=192,
        d_kv=48,
        d_ff=384,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
    ),
}
IDS = list(range(3, 14))
ANSWER = 8
TRIES = settings(
    max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@dataclass
class Case:
    """A checkpoint, and what plain transformers answers with it."""

    path: Path
    headers: Headers
    tokens: list[int]
    placed: bool

    def place(self, limit: int | None) -> Placement:
        """Plan for `limit` bytes, or none."""
        if self.placed:
            return budget.place_any(self.headers, rows=1, tokens=64, prompt=len(IDS), budget=limit)
        return budget.place(self.headers, rows=1, tokens=64, budget=limit)

    def answer(self, limit: int) -> list[int]:
        """Answer within `limit` bytes."""
        return self.through_model(limit) if self.placed else self.through_decoder(limit)

    def through_decoder(self, limit: int) -> list[int]:
        """Answer with the fused decoder."""
        decoder = load_decoder(self.path, threads=1, placement=self.place(limit))
        cache = decoder.cache(1, 64)
        made = [int(decoder.chain(cache, 0, IDS)[0].argmax())]
        while len(made) < ANSWER:
            made.append(int(decoder.step(cache, made[-1:])[0].argmax()))
            cache.done[0] += 1
        decoder.store.close()
        return made

    def through_model(self, limit: int) -> list[int]:
        """Answer in transformers' own code, as `infer` does."""
        plan = self.place(limit)
        room = Room(limit - plan.fixed_bytes + plan.rest_bytes)
        cpu = torch.device("cpu")
        placed = place_model(
            self.path, load.empty(self.path), device=cpu, dtype=torch.float32, room=room
        )
        assert (placed.streamed_bytes == 0) == (plan.streamed_bytes == 0)
        found = greedy(placed.model)
        placed.close()
        return found


@torch.inference_mode()
def greedy(model: Any) -> list[int]:
    ids = torch.tensor([IDS])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, **options
    )
    made: list[int] = found[0].tolist()
    return made[1:] if model.config.is_encoder_decoder else made[len(IDS) :]


@pytest.fixture(scope="module", params=CONFIGS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    """Save a random model, and ask transformers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = CONFIGS[request.param]
    path = tmp_path_factory.mktemp("budget") / request.param
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    model.to(torch.bfloat16).save_pretrained(path)
    plain = kind.from_pretrained(path, dtype=torch.float32).eval()
    headers = read_headers(path)
    yield Case(path, headers, greedy(plain), not family.covers(headers.config))
    torch.set_num_threads(threads)


def smallest(case: Case) -> int:
    """Return the bytes that the refusal of none at all names."""
    with pytest.raises(ResourceError) as refused:
        case.place(1)
    found = re.search(r"memory (\d+)MiB", str(refused.value.hint))
    assert found is not None
    return int(found[1]) * 2**20


@TRIES
@given(share=st.floats(0, 1))
def test_any_budget_that_is_enough_gives_the_same_tokens(case: Case, share: float) -> None:
    low, high = smallest(case), case.place(None).peak_bytes + 2**24
    limit = low + int(share * max(high - low, 0))
    assert case.place(limit).peak_bytes <= limit
    assert case.answer(limit) == case.tokens


def test_the_smallest_budget_works_and_the_next_smaller_does_not(case: Case) -> None:
    low = smallest(case)
    assert case.answer(low) == case.tokens
    with pytest.raises(ResourceError, match=re.escape(f"this needs {low // 2**20} MiB")):
        case.place(low - 2**20)


@TRIES
@given(share=st.floats(0, 1), link=st.floats(1e6, 1e10))
def test_what_stays_is_never_expected_to_be_slower(case: Case, share: float, link: float) -> None:
    machine = expect.Rates(memory=2e10, link=min(link, 1e10), flops=1e11)
    low, whole = smallest(case), case.place(None)
    some = case.place(low + int(share * max(whole.peak_bytes - low, 0)))
    way = "placed" if case.placed else "packed"
    slow = expect.expect(Chosen(way, some), case.headers, machine)  # type: ignore[arg-type]
    fast = expect.expect(Chosen(way, whole), case.headers, machine)  # type: ignore[arg-type]
    name = "decode_tokens_per_second"
    assert slow[name] <= fast[name] * 1.01
    least = case.place(low)
    if least.streamed_bytes:  # all but the fixed time of its blocks is the link's
        bound = machine.link / least.streamed_bytes
        assert expect.expect(Chosen(way, least), case.headers, machine)[name] <= bound + 0.01  # type: ignore[arg-type]
