"""Log-probabilities of choices, compared with one plain forward for each row and choice."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bmkit.errors import InputError, RecipeError
from bmkit.prompting.encode import Encoded
from bmkit.verbalizers import likelihood, packed, positions
from bmkit.verbalizers.continuations import tries

CHOICES = [[5, 6, 7], [5, 6, 8, 9], [5], [11, 6], [5, 6, 7], [12]]
LENGTHS = (3, 9, 1, 6, 14)
WINDOWED = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
    "use_sliding_window": True,
}
PACKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {},
    "gptj": {},
    "phi": {},
    "phi3": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "mixtral": {"sliding_window": 4},
    "qwen2": WINDOWED,
    "qwen2_moe": WINDOWED,
    "qwen3": WINDOWED,
    "gemma2": {"layer_types": WINDOWED["layer_types"], "sliding_window": 4},
    "gemma3": {"layer_types": WINDOWED["layer_types"], "sliding_window": 4},
    "gpt_oss": {"layer_types": WINDOWED["layer_types"], "sliding_window": 4},
}
Build = Callable[..., Any]


@pytest.fixture
def sharp(architecture: Build) -> Build:
    """Build a tiny model whose weights are large enough that each token it sees tells."""

    def build(name: str, **config: Any) -> Any:
        model = architecture(name, real=True, **config)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.4, generator=draw)
        model.tie_weights()
        return model

    return build


def prompts(lengths: Sequence[int] = LENGTHS, head: Sequence[int] = ()) -> list[list[int]]:
    draw = random.Random(3)
    return [[*head, *(draw.randrange(2, 40) for _ in range(n))] for n in lengths]


def plain(logits: Tensor, said: Sequence[int]) -> float:
    """Sum the log-probabilities of the last tokens that a pass has read."""
    rows = logits.double().log_softmax(-1)[-len(said) - 1 : -1]
    return float(rows[torch.arange(len(said)), torch.tensor(list(said))].sum())


@torch.no_grad()
def one_by_one(model: Any, prompt: Sequence[int], said: Sequence[int]) -> float:
    return plain(model(input_ids=torch.tensor([[*prompt, *said]])).logits[0], said)


@torch.no_grad()
def in_a_batch(
    model: Any, rows: Sequence[list[int]], said: Sequence[int], side: str
) -> list[float]:
    """Score one choice for all rows at once, padded on a side, as transformers' users do."""
    width = max(map(len, rows)) + len(said)
    ids, mask = [], []
    for row in rows:
        text = [*row, *said]
        gap = [0] * (width - len(text))
        ids.append([*gap, *text] if side == "left" else [*text, *gap])
        seen = [1] * len(text)
        mask.append([*gap, *seen] if side == "left" else [*seen, *gap])
    seen_ = torch.tensor(mask)
    places = (seen_.cumsum(1) - 1).clamp_min(0)
    out = model(input_ids=torch.tensor(ids), attention_mask=seen_, position_ids=places).logits
    return [
        plain(logits if side == "left" else logits[: len(row) + len(said)], said)
        for row, logits in zip(rows, out, strict=True)
    ]


def near(found: Tensor, wanted: Any) -> bool:
    return torch.allclose(found.double(), torch.as_tensor(wanted).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PACKED)
def test_causal_choices_score_as_a_pass_each(sharp: Build, name: str) -> None:
    model = sharp(name, **PACKED[name])
    rows = prompts()
    assert packed.takes(model)
    found = likelihood.causal(model, rows, CHOICES)
    wanted = [[one_by_one(model, row, said) for said in CHOICES] for row in rows]
    assert near(found.words, wanted)
    assert found.word_tokens.tolist() == [[len(said) for said in CHOICES]] * len(rows)
    assert near(found.means, torch.tensor(wanted) / torch.tensor([len(c) for c in CHOICES]))


@pytest.mark.parametrize("name", ["bloom", "falcon", "gpt_neo", "mpt", "opt"])
def test_a_model_that_takes_no_mask_of_ours_scores_the_same(sharp: Build, name: str) -> None:
    model = sharp(name)
    assert not packed.takes(model)
    rows = prompts()
    found = likelihood.causal(model, rows, CHOICES, [[21, 22]] * len(rows))
    for row, words, behind in zip(rows, found.words, found.behind, strict=True):
        assert near(words, [one_by_one(model, row, said) for said in CHOICES])
        assert near(behind, [one_by_one(model, [*row, *said], [21, 22]) for said in CHOICES])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_rows_of_any_length_score_as_in_batches_padded_on_a_side(
    sharp: Build, name: str, side: str
) -> None:
    model = sharp(name, **PACKED[name])
    rows = prompts()
    found = likelihood.causal(model, rows, CHOICES).sums
    wanted = torch.tensor([in_a_batch(model, rows, said, side) for said in CHOICES]).T
    assert near(found, wanted.tolist())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3", "gemma3"])
def test_text_behind_the_choice_is_scored_along(sharp: Build, name: str) -> None:
    model = sharp(name, **PACKED[name])
    rows, behind = prompts(), [[21, 22, 23], [], [24], [21, 22, 23], [25, 26]]
    found = likelihood.causal(model, rows, CHOICES, behind)
    for number, (row, after) in enumerate(zip(rows, behind, strict=True)):
        sums = [one_by_one(model, row, [*said, *after]) for said in CHOICES]
        assert near(found.sums[number], sums)
        assert near(found.words[number], [one_by_one(model, row, said) for said in CHOICES])
        assert found.behind_tokens[number].tolist() == [len(after)] * len(CHOICES)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3", "gpt_oss"])
def test_what_all_prompts_begin_with_is_run_once(sharp: Build, name: str) -> None:
    model = sharp(name, **PACKED[name])
    rows = prompts((2, 5, 1, 4), head=range(2, 14))
    seen: list[int] = []
    table = model.get_input_embeddings()
    table.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    found = likelihood.causal(model, rows, CHOICES, [[21, 22]] * 4).sums
    once, seen[:] = sum(seen), []
    short = [row[12:] for row in rows]
    likelihood.causal(model, short, CHOICES, [[21, 22]] * 4)
    assert once == sum(seen) + 12
    wanted = [[one_by_one(model, row, [*said, 21, 22]) for said in CHOICES] for row in rows]
    assert near(found, wanted)


@pytest.mark.parametrize("size", [1, 12, 40, 10_000])
@pytest.mark.parametrize("name", ["llama", "bloom", "t5", "bart", "bert"])
def test_the_size_of_batches_is_bounded_and_changes_nothing(
    sharp: Build, name: str, size: int
) -> None:
    model = sharp(name)
    rows = prompts((3, 6, 2, 9))
    fed: list[int] = []
    for table in {m for n, m in model.named_modules() if n.endswith(positions_of(name))}:
        table.register_forward_pre_hook(lambda _, given: fed.append(given[0].numel()))
    found = scored(name, model, rows, batch_tokens=size)
    alone = 12 * 3  # the longest prompt with the longest choice, and a decoder's beginning
    assert max(fed) <= max(size, alone)
    assert near(found, scored(name, model, rows, batch_tokens=4096).tolist())


def positions_of(name: str) -> tuple[str, ...]:
    return ("embed_tokens", "word_embeddings", "shared")


def scored(name: str, model: Any, rows: list[list[int]], **more: Any) -> Tensor:
    if name in ("t5", "bart"):
        return likelihood.seq2seq(model, rows, [[1, 3]] * len(rows), CHOICES, **more).sums
    if name == "bert":
        more |= {"mask_token": 4, "order": "at_once"}
        return likelihood.masked(model, rows, [1] * len(rows), CHOICES, **more).sums
    return likelihood.causal(model, rows, CHOICES, **more).sums


def test_no_logits_are_made_where_nothing_is_asked(sharp: Build) -> None:
    model = sharp("llama")
    made: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, said: made.append(said[..., 0].numel()))
    likelihood.causal(model, prompts(), [[5], [6], [7]])
    assert sum(made) == len(LENGTHS)  # one position a row: choices of a token share it


def test_rows_may_have_choices_of_their_own(sharp: Build) -> None:
    model = sharp("llama")
    rows = prompts((3, 5))
    own = [[[5, 6], [7]], [[8, 9, 10]]]
    found = likelihood.causal(model, rows, own)
    assert near(found.words[0], [one_by_one(model, rows[0], said) for said in own[0]])
    assert near(found.words[1, :1], [one_by_one(model, rows[1], own[1][0])])
    assert found.words[1, 1] == -torch.inf and found.word_tokens[1, 1] == 0


def test_trained_tokens_behind_are_read_and_not_scored(sharp: Build) -> None:
    model = sharp("llama", vocab_size=44)
    row, said, after = [3, 4, 5], [6, 7], [41, 8]
    found = likelihood.causal(model, [row], [said], [after], soft_start=40)
    assert near(found.behind[0], [one_by_one(model, [*row, *said, 41], [8])])
    assert found.behind_tokens.item() == 1


@pytest.mark.parametrize("name", ["t5", "t5_gated", "bart"])
def test_a_decoder_scores_as_a_pass_each(sharp: Build, name: str) -> None:
    model = sharp(name)
    rows = prompts()
    starts = [[1, 3], [1], [1, 3, 4], [1, 9], [1]]
    behind = [[21], [], [22, 23], [21], [24]]
    found = likelihood.seq2seq(model, rows, starts, CHOICES, behind)
    for number, (row, start, after) in enumerate(zip(rows, starts, behind, strict=True)):
        for choice, said in enumerate(CHOICES):
            text = [*start, *said, *after]
            with torch.no_grad():
                logits = model(
                    input_ids=torch.tensor([row]), decoder_input_ids=torch.tensor([text])
                ).logits[0]
            wanted = plain(logits, [*said, *after])
            assert near(found.sums[number, choice], wanted)


def test_an_encoder_reads_a_prompt_once_for_all_choices(sharp: Build) -> None:
    model = sharp("t5")
    read: list[int] = []
    model.encoder.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    likelihood.seq2seq(model, prompts((4, 4)), [[1]] * 2, CHOICES)
    assert sum(read) == 8


def by_hand(model: Any, row: list[int], at: int, word: Sequence[int], order: str) -> float:
    """Fill a word in as the papers say, a pass at a time."""
    said: list[int] = [4] * len(word)
    total, left = 0.0, list(range(len(word)))
    while left:
        with torch.no_grad():
            text = torch.tensor([[*row[:at], *said, *row[at + 1 :]]])
            rows = model(input_ids=text).logits[0].double().log_softmax(-1)
        chances = {place: float(rows[at + place, word[place]]) for place in left}
        if order == "at_once":
            return sum(chances.values())
        place = left[0] if order == "left_to_right" else max(chances, key=lambda p: chances[p])
        total += chances[place]
        said[place] = word[place]
        left.remove(place)
    return total


@pytest.mark.parametrize("order", ["confident", "left_to_right", "at_once"])
@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "modernbert"])
def test_masks_are_filled_in_as_by_hand(sharp: Build, name: str, order: Any) -> None:
    more = {"max_position_embeddings": 60} if name == "roberta" else {}
    model = sharp(name, **more)
    rows, masks = prompts((3, 9, 2, 6)), [1, 8, 0, 3]
    for row, at in zip(rows, masks, strict=True):
        row[at] = 4
    found = likelihood.masked(model, rows, masks, CHOICES, mask_token=4, order=order)
    for number, (row, at) in enumerate(zip(rows, masks, strict=True)):
        wanted = [by_hand(model, row, at, word, order) for word in CHOICES]
        assert near(found.sums[number], wanted)


def test_words_of_equal_length_share_a_pass_when_filled_at_once(sharp: Build) -> None:
    model = sharp("bert")
    rows: list[int] = []
    model.bert.register_forward_pre_hook(
        lambda _, given, more: rows.append(len((given or (more["input_ids"],))[0])),
        with_kwargs=True,
    )
    words = [[5, 6], [7, 8], [9, 10], [11]]
    likelihood.masked(model, [[2, 4, 3]], [1], words, mask_token=4, order="at_once")
    assert sum(rows) == 2


def test_encoded_prompts_are_scored_by_their_kind(sharp: Build) -> None:
    llama, t5, bert = (sharp(name) for name in ("llama", "t5", "bert"))
    said = [[5, 6], [7]]
    causal = Encoded([3, 4], [], [], [2], [1], [], behind=[8, 9])
    found = likelihood.score(llama, [causal], "causal", said)
    assert near(found.sums[0], [one_by_one(llama, [3, 4], [*own, 8, 9]) for own in said])
    halves = Encoded([3, 4, 5], [], [], [1], [1], [], decoder_ids=[0, 4])
    found = likelihood.score(t5, [halves], "seq2seq", said)
    assert torch.equal(found.sums, likelihood.seq2seq(t5, [[3, 4, 5]], [[0, 4]], said).sums)
    masked = Encoded([2, 4, 3], [], [], [1], [1], [])
    found = likelihood.score(bert, [masked], "masked", said, mask_token=4)
    assert torch.equal(
        found.sums, likelihood.masked(bert, [[2, 4, 3]], [1], said, mask_token=4).sums
    )


def test_gradients_flow_as_through_plain_passes(sharp: Build) -> None:
    model = sharp("llama", tie_word_embeddings=False)
    row, said = [3, 4, 5], [[6, 7], [6, 8, 9]]
    likelihood.causal(model, [row], said).sums.sum().backward()
    found = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    for own in said:
        logits = model(input_ids=torch.tensor([[*row, *own]])).logits[0].log_softmax(-1)
        at = torch.arange(len(own)) + len(row) - 1
        logits[at, torch.tensor(own)].sum().backward()
    assert torch.allclose(found, model.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_what_peft_puts_in_front_counts(sharp: Build, name: str, kind: str) -> None:
    import peft

    task = "CAUSAL_LM" if name == "llama" else "SEQ_2_SEQ_LM"
    made = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[kind]
    model = peft.get_peft_model(sharp(name), made(task_type=task, num_virtual_tokens=3)).eval()
    row = [3, 4, 5]
    for said, found in zip(CHOICES, scored(name, model, [row])[0], strict=True):
        text = torch.tensor([[1, 3, *said]])
        given = {"input_ids": torch.tensor([row]), "decoder_input_ids": text}
        if name == "llama":
            given = {"input_ids": torch.tensor([[*row, *said]])}
        with torch.no_grad():
            logits = model(**given, attention_mask=torch.ones_like(given["input_ids"])).logits[0]
        assert near(found, plain(logits, said))


def test_tries_share_what_choices_have_in_common() -> None:
    (trie,) = tries(CHOICES, scored=40, most_nodes=100, most_reads=100)
    assert [trie.tokens[node] for path in trie.paths() for node in path] == [5, 6, 8, 11]
    assert len(trie.asked) == 8 and trie.depth == 3


def test_bad_input_is_named(sharp: Build) -> None:
    model = sharp("llama")
    with pytest.raises(InputError, match="row 2: nothing is before"):
        likelihood.causal(model, [[3], []], CHOICES)
    with pytest.raises(InputError, match="row 1: choice 2 has no tokens"):
        likelihood.causal(model, [[3]], [[5], []])
    with pytest.raises(InputError, match=r"row 1: 35 tokens with its longest choice.* reads 34"):
        likelihood.causal(model, [[3] * 32], [[5, 6, 7, 8]])
    with pytest.raises(RecipeError, match="at one mask"):
        likelihood.score(model, [Encoded([3], [], [], [1, 2], [0], [])], "causal", CHOICES)


def test_a_batch_of_large_vocabulary_is_bounded_by_its_logits(sharp: Build) -> None:
    assert list(positions.batches([5, 5, 5], [3, 3, 3], 1000, 6)) == [[0, 1], [2]]
    assert list(positions.batches([9, 2, 5], [1, 1, 1], 10, 100)) == [[0], [2, 1]]
