"""Guess and verify: the answers of any target are those it gives alone, whatever is guessed."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    T5Config,
)

from bmkit.errors import ResourceError
from bmkit.runtime.cpu.load import load_decoder
from bmkit.runtime.generate import Generation, generate, plain_defaults
from bmkit.runtime.prompts import Prompt
from bmkit.runtime.speculation.draft import Draft
from bmkit.runtime.speculation.engine import ALONE, Settings, Speculator
from bmkit.runtime.speculation.phrases import Phrases
from bmkit.runtime.speculation.retokenised import Retokenised
from bmkit.runtime.speculation.static import StaticTarget, suits
from bmkit.runtime.speculation.targets import DecoderTarget, ModelTarget
from bmkit.runtime.speculation.tree import Tree

TOKENS = {"vocab_size": 360, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
PLAIN = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
BART_SIZES = {f"{p}_layers": 2 for p in ("encoder", "decoder")} | {
    f"{p}_{n}": v
    for p in ("encoder", "decoder")
    for n, v in (("attention_heads", 4), ("ffn_dim", 96))
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=8),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen2-windows": Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**GROUPED),
    "gpt2": GPT2Config(
        **TOKENS, n_embd=64, n_layer=3, n_head=4, n_positions=256, initializer_range=0.3
    ),
    "opt": OPTConfig(**PLAIN, ffn_dim=96, word_embed_proj_dim=64, init_std=0.3),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "falcon": FalconConfig(**SIZES),
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2),
    "gemma": GemmaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, sliding_window=8, attn_implementation="eager"),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=8),
    "cohere": CohereConfig(**GROUPED),
    "olmo2": Olmo2Config(**GROUPED),
    "qwen2-moe": Qwen2MoeConfig(
        **GROUPED,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
    ),
}
SEQ2SEQ: dict[str, Any] = {
    "t5": T5Config(
        **TOKENS, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "bart": BartConfig(**TOKENS, **BART_SIZES, d_model=64, max_position_embeddings=256),
}
LONG = 40


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests run side by side, and these models are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(config: Any, seed: int = 0) -> Any:
    """Return a random model whose answers vary."""
    torch.manual_seed(seed)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
    plain_defaults(model)
    return model


def noisy(model: Any, share: float = 0.05) -> Any:
    """Return a copy that agrees with `model` often, not always."""
    found = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * share)
    return found


def prompts_of(count: int, length: int = 9) -> list[Prompt]:
    """Return prompts in which something stands twice, so that there is something to look up."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        ids = torch.randint(3, 350, (length + i,), generator=draw).tolist()
        rows.append(Prompt(i, i, "", [*ids, *ids[: length // 2]]))
    return rows


def alone(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], how: Generation
) -> list[list[int]]:
    """Return what transformers' generate answers, one prompt at a time."""
    return [
        generate(model, tokenizer, [p.ids], how, numbers=[p.number])[0].token_ids for p in prompts
    ]


def answers(speculator: Speculator, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the answers in the prompts' order."""
    found = {}
    for prompt, answer, origins in speculator.answer(prompts):
        assert answer is not None
        assert len(origins) == len(answer.token_ids)
        found[prompt.number] = answer.token_ids
    return [found[p.number] for p in prompts]


def speculator(
    model: Any,
    tokenizer: Any,
    how: Generation,
    *,
    draft: Any = None,
    rows: int = 1,
    settings: Settings | None = None,
    eos: Sequence[int] = (2,),
) -> Speculator:
    """Return one over a model of transformers."""
    return Speculator(
        ModelTarget(model),
        tokenizer,
        eos,
        how,
        rows=rows,
        context=256,
        draft=Draft(ModelTarget(draft)) if draft is not None else None,
        settings=settings,
    )


ALWAYS = Settings(adaptive=False, draft_length=4, topk=2, phrase_length=5)
"""Everything that there is to guess, whether it pays or not."""


@pytest.mark.parametrize("name", CONFIGS)
def test_room_of_a_fixed_size_gives_the_same_answers(name: str, tokenizer: Any) -> None:
    model = model_of(CONFIGS[name])
    target = StaticTarget(model, 2)
    assert target.check()
    how = Generation(LONG)
    prompts = [*prompts_of(3), replace(prompts_of(1, length=40)[0], number=3)]
    wanted = alone(model, tokenizer, prompts, how)
    found = speculator(model, tokenizer, how, rows=2, settings=ALWAYS)
    found.target = target
    found.draft = Draft(StaticTarget(noisy(model), 2), window=3, levels=3)
    assert answers(found, prompts) == wanted
    assert found.stats.accepted["draft"] > 0


class Recording:
    """Stands for a GPU's graphs: what is replayed works in memory where others left their logits,
    and sees tensors at fixed addresses alone."""

    def __init__(self) -> None:
        self.target: Any = None
        self.count = self.renewed = 0

    def renew(self) -> None:
        self.renewed += 1

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        compute()
        self.count += 1

        def again() -> None:
            target = self.target
            for run in target.passes.values():
                if run.logits is not None:
                    run.logits.fill_(torch.nan)
            held, adapters, target.held, target.adapters = target.held, target.adapters, None, None
            try:
                compute()
            finally:
                target.held, target.adapters = held, adapters

        return again


@pytest.mark.parametrize("second", [None, "b"])  # rows of two adapters go in two forwards
def test_a_forward_is_recorded_once_a_size_and_anew_when_room_grows(second: str | None) -> None:
    model = model_of(CONFIGS["llama"])
    record = Recording()
    target, plain = StaticTarget(model, 2, record=record), ModelTarget(model)
    record.target = target
    renewed = record.renewed
    for one in (target, plain):
        one.begin(1, [5, 6, 7], slots=20, adapter=second)
    assert record.renewed == renewed + 1
    for count in (2, 5, 5, 2, 7, 6, 20):
        tree = Tree.of(9)
        tree.add(range(10, 9 + count - count // 3), "", [1.0] * (count - count // 3 - 1))
        tree.add(range(30, 30 + count // 3), "", [1.0] * (count // 3))
        new = count in {2, 5, 7, 20} and record.count < 4
        read = [one.forward({1: tree})[1] for one in (target, plain)]
        assert read[0].shape == read[1].shape
        assert torch.allclose(*read, atol=1e-4)
        assert not target.recorded or new
        nodes = [0, *tree.path(tree.leaves()[-1])]
        for one in (target, plain):
            one.keep(1, nodes)
            assert one.length(1) > 3
    assert record.count == 4  # of 2, 6, 8 and 24 tokens
    target.begin(0, [5] * 300, slots=2, adapter=None)
    plain.begin(0, [5] * 300, slots=2, adapter=None)
    assert record.renewed == renewed + 2
    both = {0: Tree.of(7), 1: Tree.of(8)}
    for _ in range(2):
        read = [torch.cat([*one.forward(both).values()]) for one in (target, plain)]
        assert torch.allclose(*read, atol=1e-4)
        plain.keep(0, [])
        plain.keep(1, [])
    assert record.count == 4 + (1 if second is None else 2)


@pytest.mark.parametrize(
    "more",
    [
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
        {"attn_temperature_tuning": True},
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_depends_on_more_than_a_tokens_place_has_no_room_of_a_fixed_size(
    more: dict[str, Any],
) -> None:
    class Model:
        _is_stateful = False
        config = LlamaConfig(**GROUPED)

    assert suits(Model())
    for key, value in more.items():
        setattr(Model.config, key, value)
    assert not suits(Model())


def test_a_draft_that_was_left_alone_reads_on_as_it_reads_a_prompt(tokenizer: Any) -> None:
    model = model_of(CONFIGS["llama"])
    draft, other = Draft(ModelTarget(model)), Draft(ModelTarget(model))
    ids = prompts_of(1)[0].ids
    later = [*ids, *range(5, 105)]
    begun: list[int] = []
    begin = draft.model.begin

    def counted(*args: Any, **more: Any) -> Tensor:
        begun.append(more["known"])
        return begin(*args, **more)

    draft.model.begin = counted  # type: ignore[method-assign]
    for one in (draft, other):
        one.begin(0, ids, slots=200)
    assert begun == []  # it waits until it is asked

    def three(count: int, chance: float) -> bool:
        return count < 3

    for said in ([*ids, 4], later):
        found = draft.guess({0: said}, {0: None}, three, {0: ()})
    assert begun == [0, len(ids)]
    wanted = other.guess({0: later}, {0: None}, three, {0: ()})
    assert found[0].tokens == wanted[0].tokens
    draft.begin(0, [*ids[:5], 7, 7], slots=50)  # another prompt, never asked about
    draft.begin(0, [*ids, 9], slots=50)
    again = draft.guess({0: [*ids, 9, 8]}, {0: None}, three, {0: ()})
    plain = Draft(ModelTarget(model))
    plain.begin(0, [*ids, 9], slots=50)
    wanted = plain.guess({0: [*ids, 9, 8]}, {0: None}, three, {0: ()})
    assert again[0].tokens == wanted[0].tokens


@pytest.mark.parametrize("length", [1, 40, 63])
def test_a_draft_guesses_as_many_tokens_as_it_is_told_to(length: int, tokenizer: Any) -> None:
    model = model_of(CONFIGS["llama"])
    settings = Settings(adaptive=False, draft_length=length, topk=0, harvest=False)
    how = Generation(length + 2)
    found = speculator(model, tokenizer, how, draft=model, settings=settings, eos=())
    (prompt,) = prompts_of(1)
    assert answers(found, [prompt]) == alone(model, tokenizer, [prompt], how)
    assert found.stats.rounds == [length + 1]  # all right, and one of its own


def test_a_state_space_model_has_no_room_of_a_fixed_size() -> None:
    config = MambaConfig(vocab_size=360, hidden_size=32, num_hidden_layers=2, state_size=4)
    assert not suits(AutoModelForCausalLM.from_config(config))
    assert not suits(model_of(SEQ2SEQ["t5"]))
    assert not StaticTarget(model_of(BloomConfig(**TOKENS, n_layer=2, n_head=4)), 1).check()


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_answers_are_those_of_the_target_alone(name: str, tokenizer: Any) -> None:
    model = model_of(CONFIGS[name])
    how = Generation(LONG)
    prompts = prompts_of(3)
    wanted = alone(model, tokenizer, prompts, how)
    guessing = speculator(model, tokenizer, how, draft=noisy(model), rows=2, settings=ALWAYS)
    assert answers(guessing, prompts) == wanted
    assert guessing.stats.accepted["draft"] > 0
    assert guessing.stats.target_forwards < sum(map(len, wanted))


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_answers_of_encoder_decoders_are_those_of_the_target_alone(
    name: str, tokenizer: Any
) -> None:
    model = model_of(SEQ2SEQ[name])
    how = Generation(LONG, repetition_penalty=1.3)
    prompts = prompts_of(3)
    last = model.generation_config.forced_eos_token_id
    forced = {} if last is None else {"forced_eos_token_id": last}
    guessing = speculator(model, tokenizer, replace(how, more=forced), rows=2, settings=ALWAYS)
    assert answers(guessing, prompts) == alone(model, tokenizer, prompts, how)
    assert sum(guessing.stats.verified.values()) > 0


def test_forced_tokens_of_a_checkpoint_are_said(tokenizer: Any) -> None:
    model = model_of(SEQ2SEQ["bart"])
    forced = {"forced_bos_token_id": 77, "forced_eos_token_id": 2}
    for name, token in forced.items():
        setattr(model.generation_config, name, token)
    prompts = prompts_of(2)
    wanted = alone(model, tokenizer, prompts, Generation(12))
    assert [w[0] for w in wanted] == [77, 77]
    assert all(w[-1] == 2 for w in wanted)
    found = speculator(model, tokenizer, Generation(12, more=forced), settings=ALWAYS)
    assert answers(found, prompts) == wanted


@pytest.mark.parametrize("name", ["llama", "qwen2-windows"])
@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        ALONE,
        Settings(adaptive=False, draft_length=1, topk=0),
        Settings(adaptive=False, draft_length=30, topk=16, phrase_length=63),
        Settings(adaptive=False, draft_length=0, topk=1, phrase_length=1),
        Settings(adaptive=False, draft_length=0, window=4, levels=3, sources=("answers",)),
        Settings(draft_length=3, window=2, levels=2),
    ],
    ids=["chosen", "alone", "draft 1", "absurd", "short", "lookahead", "all"],
)
def test_no_setting_changes_an_answer(name: str, settings: Settings, tokenizer: Any) -> None:
    model = model_of(CONFIGS[name])
    how = Generation(LONG)
    prompts = prompts_of(3)
    for draft in (None, noisy(model)):
        found = speculator(model, tokenizer, how, draft=draft, rows=3, settings=settings)
        assert answers(found, prompts) == alone(model, tokenizer, prompts, how)


def test_an_end_token_or_the_limit_may_fall_anywhere(tokenizer: Any) -> None:
    model = model_of(CONFIGS["llama"])
    draft = noisy(model)
    (prompt,) = prompts_of(1)
    (whole,) = alone(model, tokenizer, [prompt], Generation(24))
    for at in range(24):
        eos = [whole[at]]
        model.generation_config.eos_token_id = eos
        tokenizer.eos_token_id = eos[0]
        (wanted,) = alone(model, tokenizer, [prompt], Generation(24))
        found = speculator(model, tokenizer, Generation(24), draft=draft, settings=ALWAYS, eos=eos)
        assert answers(found, [prompt]) == [wanted]
        assert wanted == whole[: whole.index(eos[0]) + 1]
    for limit in range(1, 24):
        found = speculator(
            model, tokenizer, Generation(limit), draft=draft, settings=ALWAYS, eos=[359]
        )
        assert answers(found, [prompt]) == [whole[:limit]]


def test_a_stop_string_may_fall_anywhere(tokenizer: Any) -> None:
    model = model_of(CONFIGS["llama"])
    (prompt,) = prompts_of(1)
    (whole,) = alone(model, tokenizer, [prompt], Generation(20))
    for at in range(1, 20):
        stop = tokenizer.decode(whole[at : at + 2], skip_special_tokens=True)
        if not stop.strip():
            continue
        how = Generation(20, stop_strings=(stop,))
        found = speculator(model, tokenizer, how, draft=noisy(model), settings=ALWAYS)
        assert answers(found, [prompt]) == alone(model, tokenizer, [prompt], how)


@pytest.mark.parametrize(
    "how",
    [
        Generation(LONG, repetition_penalty=1.4),
        Generation(LONG, more={"no_repeat_ngram_size": 2, "min_new_tokens": 12}),
        Generation(LONG, more={"suppress_tokens": [7, 8], "begin_suppress_tokens": [9]}),
        Generation(LONG, more={"sequence_bias": [([5], 4.0), ([6, 7], -3.0)]}),
        Generation(LONG, more={"bad_words_ids": [[11], [12, 13]]}),
        Generation(LONG, more={"exponential_decay_length_penalty": (5, 1.2)}),
        Generation(LONG, sampled=True, temperature=0.8, top_k=40, seed=1),
        Generation(LONG, sampled=True, top_p=0.9, repetition_penalty=1.2, seed=2),
        Generation(LONG, sampled=True, min_p=0.02, more={"typical_p": 0.95}, seed=3),
        Generation(LONG, sampled=True, more={"epsilon_cutoff": 0.001, "eta_cutoff": 0.002}),
    ],
    ids=lambda how: " ".join([*how.more, "sampled" * how.sampled, f"{how.repetition_penalty}"]),
)
def test_penalties_limits_and_draws_are_those_of_the_target_alone(
    how: Generation, tokenizer: Any
) -> None:
    model = model_of(CONFIGS["llama"])
    prompts = prompts_of(3)
    wanted = alone(model, tokenizer, prompts, how)
    found = speculator(model, tokenizer, how, draft=noisy(model), rows=2, settings=ALWAYS)
    assert answers(found, prompts) == wanted
    assert found.stats.accepted["draft"] > 0


def test_log_probabilities_are_those_of_the_target_alone(tokenizer: Any) -> None:
    model = model_of(CONFIGS["llama"])
    (prompt,) = prompts_of(1)
    how = Generation(LONG, logprobs=2)
    (wanted,) = generate(model, tokenizer, [prompt.ids], how, numbers=[0])
    found = speculator(model, tokenizer, how, draft=noisy(model), settings=ALWAYS)
    ((_, answer, _),) = found.answer([prompt])
    assert answer is not None and answer.logprobs is not None and wanted.logprobs is not None
    for one, other in zip(answer.logprobs, wanted.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [t for t, _ in one.top] == [t for t, _ in other.top]


def test_the_fused_decoder_answers_as_the_model(tmp_path: Any, tokenizer: Any) -> None:
    for name in ("llama", "mistral", "qwen2-windows", "qwen3"):
        model = model_of(CONFIGS[name])
        model.save_pretrained(tmp_path / name)
        how = Generation(LONG)
        prompts = prompts_of(5)
        target = DecoderTarget(load_decoder(tmp_path / name, threads=1), 3)
        small = DecoderTarget(load_decoder(tmp_path / name, threads=1, quant="int4"), 3)
        found = Speculator(
            target,
            tokenizer,
            [2],
            how,
            rows=3,
            context=256,
            draft=Draft(small),
            settings=ALWAYS,
        )
        assert answers(found, prompts) == alone(model, tokenizer, prompts, how)
        assert found.stats.accepted["draft"] > 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_chat_reads_only_what_is_new(fused: bool, tmp_path: Any, tokenizer: Any) -> None:
    model = model_of(CONFIGS["llama"])
    how = Generation(12)
    found = speculator(model, tokenizer, how, draft=noisy(model), settings=ALWAYS, eos=())
    if fused:
        model.save_pretrained(tmp_path)
        found.target = DecoderTarget(load_decoder(tmp_path, threads=1), 1)
    assert found.draft is not None
    known: dict[str, list[int]] = {"target": [], "draft": []}
    for name, read in (("target", found.target), ("draft", found.draft.model)):
        begin = read.begin

        def noted(*words: Any, name: str = name, begin: Any = begin, **more: Any) -> Any:
            known[name].append(more["known"])
            return begin(*words, **more)

        read.begin = noted  # type: ignore[method-assign]
    found.reuse = True
    first = prompts_of(1)[0]
    said = answers(found, [first])[0]
    second = Prompt(1, 1, "", [*first.ids, *said, 5, 6, 7])
    other = Prompt(2, 2, "", [*first.ids[:4], 9, 8, 7])
    again = replace(other, number=3, adapter=None)
    wanted = [alone(model, tokenizer, [p], how)[0] for p in (first, second, other, again)]
    assert [said, *(answers(found, [p])[0] for p in (second, other, again))] == wanted
    whole = len(first.ids) + len(said)
    assert known["target"] == [0, whole - 1, 4, 0]
    assert known["draft"][0] == 0
    assert len(first.ids) <= known["draft"][1] <= whole
    assert known["draft"][2:] == [4, len(other.ids) - 1]


def test_a_window_has_room_up_to_the_last_token(tmp_path: Any, tokenizer: Any) -> None:
    model = model_of(CONFIGS["llama"])
    model.save_pretrained(tmp_path)
    how = Generation(LONG)
    wide = Settings(adaptive=False, window=16, levels=8, topk=3)
    target = DecoderTarget(load_decoder(tmp_path, threads=1), 1)
    found = Speculator(target, tokenizer, [], how, rows=1, context=256, settings=wide)
    for prompt in prompts_of(3, length=11):
        assert answers(found, [prompt]) == alone(model, tokenizer, [prompt], how)


@pytest.mark.parametrize("fused", [False, True])
def test_a_window_of_a_draft_finds_phrases_that_it_says(
    fused: bool, tmp_path: Any, tokenizer: Any
) -> None:
    model = model_of(CONFIGS["llama"])
    how = Generation(LONG)
    found = speculator(model, tokenizer, how, settings=ALWAYS, eos=())
    small = noisy(model)
    small.save_pretrained(tmp_path)
    own: Any = ModelTarget(small)
    if fused:
        own = DecoderTarget(load_decoder(tmp_path, threads=1), 1)
    found.draft = Draft(own, window=4, levels=3)
    prompts = prompts_of(3)
    assert answers(found, prompts) == alone(model, tokenizer, prompts, how)
    pieces = list(found.draft.found.pieces())
    assert pieces and all(len(piece) == 3 for piece in pieces)
    after = {token for piece in pieces for token in piece[1:]}
    assert len(after) > 5  # the draft's own words, not what the window began with alone


@pytest.mark.parametrize("name", ["t5", "bloom"])
def test_targets_that_verify_chains_have_no_window(name: str, tokenizer: Any) -> None:
    config = SEQ2SEQ["t5"] if name == "t5" else BloomConfig(**TOKENS, n_layer=2, n_head=4)
    model = model_of(config)
    how = Generation(20)
    found = speculator(model, tokenizer, how, settings=Settings(window=5))
    if name == "bloom":
        assert isinstance(found.target, ModelTarget) and not found.target.check()
    prompts = prompts_of(2)
    assert answers(found, prompts) == alone(model, tokenizer, prompts, how)


def test_a_place_grows_when_more_is_read_than_was_planned_for(tmp_path: Any) -> None:
    model_of(CONFIGS["llama"]).save_pretrained(tmp_path)
    target, wide = (DecoderTarget(load_decoder(tmp_path, threads=1), 1) for _ in range(2))
    target.begin(0, [5] * 10, slots=2, adapter=None)
    wide.begin(0, [5] * 10, slots=500, adapter=None)
    for _ in range(4):
        tree = Tree.of(7)
        tree.add([9] * 47, "", [1.0] * 47)
        assert torch.equal(target.forward({0: tree})[0], wide.forward({0: tree})[0])
        target.keep(0, list(range(48)))
        wide.keep(0, list(range(48)))


def test_a_draft_with_a_shorter_context_stops_guessing(tokenizer: Any) -> None:
    model = model_of(CONFIGS["llama"])
    config = GPT2Config(**TOKENS, n_embd=64, n_layer=2, n_head=4, n_positions=30)
    how = Generation(LONG)
    found = speculator(model, tokenizer, how, settings=ALWAYS, eos=())
    found.draft = Draft(ModelTarget(model_of(config)), context=30)
    never = replace(prompts_of(1, length=30)[0], number=1)
    prompts = [*prompts_of(1), never]  # the first one fits for a while
    assert answers(found, prompts) == alone(model, tokenizer, prompts, how)
    assert 0 < found.draft.forwards < LONG


def test_a_draft_that_was_stopped_reads_again(tokenizer: Any) -> None:
    model = model_of(CONFIGS["llama"])
    draft = noisy(model)
    how = Generation(12)
    found = speculator(model, tokenizer, how, draft=draft, settings=ALWAYS, eos=())
    found.reuse = True
    first = prompts_of(1)[0]
    calls = 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # the first layers have taken the tokens in, the others not
            raise KeyboardInterrupt

    hook = draft.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        answers(found, [first])
    hook.remove()
    later = Prompt(1, 1, "", [*first.ids, 5, 6, 7])
    assert answers(found, [later]) == alone(model, tokenizer, [later], how)


def test_a_draft_with_another_tokenizer_guesses_by_text(tokenizer: Any) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<e>", *alphabet])}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    own = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<e>")
    model = model_of(CONFIGS["llama"])
    draft = model_of(LlamaConfig(**{**GROUPED, "vocab_size": 257}), seed=1)
    how = Generation(LONG)
    ids = tokenizer("What is the capital of France? It is Paris.")["input_ids"]
    prompts = [Prompt(0, 0, "", ids)]
    found = Speculator(
        ModelTarget(model),
        tokenizer,
        [2],
        how,
        rows=1,
        context=256,
        draft=Retokenised(ModelTarget(draft), own, tokenizer),
        settings=ALWAYS,
    )
    assert answers(found, prompts) == alone(model, tokenizer, prompts, how)
    assert found.stats.verified["draft"] > 0


def test_a_model_whose_state_cannot_be_taken_back_is_refused() -> None:
    config = MambaConfig(**TOKENS, hidden_size=64, num_hidden_layers=2, state_size=8)
    with pytest.raises(ResourceError, match="taken back"):
        ModelTarget(model_of(config))


def test_a_model_whose_mask_cannot_be_set_verifies_chains(tokenizer: Any) -> None:
    model = model_of(BloomConfig(**TOKENS, hidden_size=64, n_layer=2, n_head=4))
    how = Generation(LONG)
    prompts = prompts_of(2)
    found = speculator(model, tokenizer, how, draft=noisy(model), settings=ALWAYS)
    assert isinstance(found.target, ModelTarget) and found.draft is not None
    assert not found.target.check()
    found.draft.model.trees = False
    assert answers(found, prompts) == alone(model, tokenizer, prompts, how)
    assert found.stats.accepted["draft"] > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_models_whose_mask_can_be_set_verify_trees(name: str) -> None:
    assert ModelTarget(model_of(CONFIGS[name])).check()


def test_a_model_that_reads_chains_otherwise_is_refused() -> None:
    class Forgetful(torch.nn.Module):
        """Sees nothing of what its cache holds."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.config, self.dtype = model, model.config, torch.float32
            self.device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
            return self.model(input_ids=input_ids, use_cache=False)

    with pytest.raises(ResourceError, match="one by one"):
        ModelTarget(Forgetful(model_of(CONFIGS["llama"]))).check()


# Sampling: the law of the answers, not only their equality for a seed.


def test_sampled_answers_follow_the_targets_own_law(tokenizer: Any) -> None:
    end, length = 3, 3
    config = LlamaConfig(
        **{**GROUPED, "vocab_size": 4, "num_hidden_layers": 1, "eos_token_id": end}
    )
    model = model_of(config)
    ids = [0, 1, 0, 1, 0]
    law: dict[tuple[int, ...], float] = {(): 1.0}
    with torch.no_grad():
        for _ in range(length):
            longer = {}
            for said, chance in law.items():
                if said and said[-1] == end:
                    longer[said] = chance
                    continue
                then = model(torch.tensor([[*ids, *said]])).logits[0, -1].softmax(-1)
                longer |= {(*said, token): chance * float(then[token]) for token in range(4)}
            law = longer
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-5)
    how = Generation(length, sampled=True, seed=11)
    draft = noisy(model, 0.5)
    found = speculator(model, tokenizer, how, draft=draft, rows=4, settings=ALWAYS, eos=[end])
    times = 3000
    prompts = [Prompt(i, i, "", ids) for i in range(times)]
    counts = Counter(tuple(made) for made in answers(found, prompts))
    assert set(counts) <= set(law)
    likely = {k: p for k, p in law.items() if p * times >= 5}
    rest = times - sum(counts[k] for k in likely)
    chi = sum((counts[k] - times * p) ** 2 / (times * p) for k, p in likely.items())
    if (left := 1 - sum(likely.values())) * times >= 1:
        chi += (rest - times * left) ** 2 / (times * left)
    free = len(likely)
    assert free >= 8
    # Wilson and Hilferty: what chi-square exceeds once in a million times.
    assert chi < free * (1 - 2 / (9 * free) + 4.75 * math.sqrt(2 / (9 * free))) ** 3
    assert found.stats.accepted["draft"] > times / 10


# The tree


def test_a_tree_shares_beginnings() -> None:
    tree = Tree.of(9)
    tree.add([1, 2, 3], "a", [0.5, 0.5, 0.5])
    tree.add([1, 2, 4], "b", [0.9, 0.5, 0.5])
    tree.add([5], "b", [0.1])
    assert tree.tokens == [9, 1, 2, 3, 4, 5]
    assert tree.parents == [-1, 0, 1, 2, 2, 0]
    assert tree.sources == ["", "a", "a", "a", "b", "b"]
    assert tree.chances == pytest.approx([1, 0.9, 0.45, 0.125, 0.225, 0.1])
    sees = tree.sees()
    for node in range(len(tree)):
        path = {0, *tree.path(node)}
        assert {i for i in range(len(tree)) if sees[node, i]} == path


def test_a_kept_tree_holds_the_parents_of_its_nodes() -> None:
    tree = Tree.of(9)
    tree.add([1, 2, 3], "a", [0.9, 0.9, 0.9])
    tree.add([4, 5], "a", [0.5, 0.9])
    for count in range(len(tree)):
        kept = tree.kept(tree.best_first()[:count])
        assert len(kept) == count + 1
        assert kept.chances == sorted(kept.chances, reverse=True) or not kept.is_chain


# Phrases


def test_phrases_are_found_by_the_longest_agreement_then_the_newest() -> None:
    log = Phrases()
    log.extend([1, 2, 3, 4, 9, 2, 3, 5, 9, 7, 3, 6])
    found = log.find([8, 1, 2, 3], 3)
    assert [log.phrase(place, 1) for place, _ in found] == [[4], [5], [6]]
    assert [agree for _, agree in found] == [3, 2, 1]


def test_phrases_do_not_run_over_the_end_of_a_piece() -> None:
    log = Phrases()
    log.extend([1, 2])
    log.end()
    log.extend([3, 1, 2, 4])
    assert log.phrase(*log.find([1, 2], 1)[0][:1], 5) == [4]
    assert log.find([2, 3], 4) == [] or all(agree == 1 for _, agree in log.find([2, 3], 4))
    assert list(log.pieces()) == [[1, 2], [3, 1, 2, 4]]


def test_phrases_equal_a_search_by_hand() -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4, (300,), generator=draw).tolist()
    log = Phrases()
    log.extend(tokens)
    for at in range(50, 300, 7):
        context = tokens[at - 6 : at]
        best = 0
        for place in range(1, 300):
            count = 0
            while count < min(len(context), place) and (
                tokens[place - 1 - count] == context[-1 - count]
            ):
                count += 1
            best = max(best, count)
        assert log.find(context, 1, tries=10**6)[0][1] >= min(best, 4)


def test_a_pool_forgets_the_oldest_beyond_its_limit() -> None:
    log = Phrases(limit=100)
    for i in range(50):
        log.extend([i] * 5)
        log.end()
        log.trim()
    assert len(log) <= 100
    assert log.find([49, 49], 1) != []
    assert log.find([0, 0], 1) == []
