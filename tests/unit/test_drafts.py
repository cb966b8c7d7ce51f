"""What a draft is made of: layers left out, lessons of a teacher, a head that says less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, CohereConfig, GPTNeoXConfig, PhiConfig

from bmkit import model as models
from bmkit.compress import distill, frequent, layers
from bmkit.compress.recipe import Data
from bmkit.errors import InputError
from bmkit.report import Silent
from bmkit.runtime.cpu import load
from bmkit.runtime.voice import Voice
from bmkit.train import corpus
from bmkit.train.distil import Aim, divergence, has_plain_head, likeliest, teaching_loss

CPU = torch.device("cpu")


def test_layers_that_stay_are_spread_from_the_first_to_the_last() -> None:
    assert layers.spread(30, 3) == [0, 14, 29]
    assert layers.spread(30, 1) == [0]
    assert layers.spread(4, 4) == [0, 1, 2, 3]
    for count in range(2, 40):
        for keep in range(2, count + 1):
            found = layers.spread(count, keep)
            assert (len(found), found[0], found[-1]) == (keep, 0, count - 1)


def test_tensors_of_layers_that_stay_get_new_numbers_and_others_go() -> None:
    kept = [0, 14, 29]
    new = layers.renamed("model.layers.14.mlp.up_proj.weight", "model.layers", kept)
    assert new == "model.layers.1.mlp.up_proj.weight"
    assert layers.renamed("model.layers.1.mlp.up_proj.weight", "model.layers", kept) is None
    assert layers.renamed("model.norm.weight", "model.layers", kept) == "model.norm.weight"


def test_the_most_frequent_tokens_come_first_and_low_numbers_fill_up() -> None:
    texts = [[9, 9, 9, 4, 4, 7], [4, 9]]
    assert frequent.ranked(texts, 2, 20) == [4, 9]
    assert frequent.ranked(texts, 5, 20) == [0, 1, 4, 7, 9]
    assert frequent.covered(texts, [4, 9]) == 7 / 8


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_the_whole_vocabulary_the_loss_is_the_cross_entropy(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 11, generator=generator) for _ in range(2))
    taught = likeliest(teacher, 11)
    got = divergence(student, taught.tokens, taught.logprobs, temperature=temperature)
    p = (teacher / temperature).softmax(-1)
    wanted = functional.cross_entropy(student / temperature, p, reduction="sum") * temperature**2
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)


def test_a_teachers_tokens_that_a_student_cannot_say_count_for_nothing(tiny: Path) -> None:
    model = models.load_model(tiny, device=CPU, dtype="float32")
    ids = torch.tensor([[5, 6, 7, 8]])
    rows = torch.tensor([3, 8, 20])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "places": torch.tensor([[0, 1], [0, 3]]),
        "tokens": torch.tensor([[1, -1], [2, 0]]),
        "logprobs": torch.tensor([[-0.5, -1.0], [-0.2, -2.0]]),
        "said": torch.tensor([1, -1]),
    }
    loss, count = teaching_loss(model, batch, rows=rows)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0][:, rows].log_softmax(-1)
    share = torch.tensor([-0.5, -0.2, -2.0]).exp()
    wanted = -(share[0] * logits[1, 1] + share[1] * logits[3, 2] + share[2] * logits[3, 0])
    assert count == 2
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quant", [None, "int8"])
def test_a_head_of_some_tokens_gives_their_logits(tiny: Path, quant: str | None) -> None:
    said = [0, 2, 3, 17, 40, 41, 42, 258]
    whole = load.load_decoder(tiny, threads=1, quant=quant)
    some = load.load_decoder(tiny, threads=1, quant=quant, said=said)
    ids = [5, 6, 7, 8, 9]
    full = whole.chain(whole.cache(1, 64), 0, ids)
    part = some.chain(some.cache(1, 64), 0, ids)
    np.testing.assert_allclose(part[-1], full[-1][said], rtol=1e-5, atol=1e-6)


@pytest.fixture
def voice(tiny: Path, home: Path) -> Voice:
    return Voice(tiny, device=CPU, dtype="float32", rows=4, reporter=Silent())


def gather(voice: Voice, kept: Path, data: Data, file: Path | None = None) -> list[corpus.Text]:
    made = corpus.gather(
        lambda: voice, voice.tokenizer, data, file, kept, likeliest=4, seed=0, reporter=Silent()
    )
    return made


def test_what_the_model_says_is_kept_with_what_it_found_likeliest(
    voice: Voice, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Say {i}."}}\n' for i in range(70)))
    data = Data(tokens=600, max_new_tokens=8, sequence_length=64)
    texts = gather(voice, tmp_path / "kept", data, prompts)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    first = next(iter(sorted((tmp_path / "kept").iterdir())))
    (stopped / first.name).write_bytes(first.read_bytes())  # a run that was stopped behind it
    again = gather(voice, stopped, data, prompts)
    assert [(t.ids, t.first) for t in again] == [(t.ids, t.first) for t in texts]
    told = distill.lessons(voice, texts, 4, None, tmp_path / "a", reporter=Silent())
    unsaid = [corpus.Text(t.ids, t.first) for t in texts]
    read = distill.lessons(voice, unsaid, 4, None, tmp_path / "b", reporter=Silent())
    for one, other in zip(told, read, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.logprobs, other.logprobs)
        assert one.chosen.tolist() == one.ids[one.first :]  # greedy: it says the likeliest


def test_a_prompt_that_the_model_does_not_end_is_cut(voice: Voice, tmp_path: Path) -> None:
    voice.eos = []
    texts = gather(voice, tmp_path / "kept", Data(tokens=20, max_new_tokens=4))
    assert sum(len(t.ids) - t.first for t in texts) >= 20
    assert all(len(t.ids) == t.first + 4 for t in texts)


def test_a_model_that_says_nothing_asks_for_a_file(
    voice: Voice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "IDLE", 1)
    monkeypatch.setattr(corpus, "BATCH", 2)
    voice.eos = list(range(voice.decoder.vocabulary))
    with pytest.raises(InputError, match="nothing to say"):
        gather(voice, tmp_path / "kept", Data(tokens=50, max_new_tokens=4))


def test_a_text_that_leaves_one_token_over_is_given_whole(voice: Voice, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a" * 40)
    count = len(voice.tokenizer("a" * 40)["input_ids"])
    texts = gather(voice, tmp_path / "kept", Data(tokens=4000, sequence_length=16), file)
    assert count > 17 or pytest.fail("the text is too short to be cut")
    for length in range(16, count):
        texts = gather(voice, tmp_path / "kept", Data(tokens=4000, sequence_length=length), file)
        assert all(t.first < len(t.ids) for t in texts)
        assert sum(len(t.ids) for t in texts) == count - (count % length == 1)
    assert not (tmp_path / "kept").exists()


def test_prompts_are_answered_beside_rows_that_hold_answers(voice: Voice, tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    file.write_text(
        '{"prompt": "One?", "completion": "Two."}\n{"prompt": "Three?"}\n{"prompt": "Five?"}\n'
    )
    texts = gather(voice, tmp_path / "kept", Data(tokens=40, max_new_tokens=5), file)
    assert [t.taught is None for t in texts] == [True, False, False]
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(InputError, match="nothing to learn from"):
        gather(voice, tmp_path / "none", Data(tokens=40), empty)


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        CohereConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        PhiConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
    ],
    ids=lambda config: str(config.model_type),
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_students_of_any_kind_learn_from_their_own_logits(config: Any, temperature: float) -> None:
    torch.manual_seed(0)
    config.pad_token_id = 0
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.3)
    ids = torch.tensor([[5, 6, 7, 8]])
    taught = likeliest(torch.randn(2, 40), 3)
    rows = torch.tensor([1, 3, 8, 20])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "places": torch.tensor([[0, 1], [0, 3]]),
        "tokens": torch.tensor([[1, -1, 3], [-1, -1, -1]]),  # the head can say none of the last
        "logprobs": taught.logprobs,
        "said": torch.tensor([1, -1]),
    }
    plain = has_plain_head(student)
    assert plain == (config.model_type == "gpt_neox")
    loss, _ = teaching_loss(student, batch, aim=Aim(temperature), rows=rows, plain=plain)
    logits = student(input_ids=ids).logits[0, 1, rows]
    logged = taught.logprobs[0, [0, 2]].float() / temperature
    share = logged.softmax(-1) if temperature != 1 else logged.exp()
    said = (logits / temperature).log_softmax(-1)[[1, 3]]
    wanted = -(share * said).sum() * temperature**2
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)


def test_each_place_that_is_taught_is_counted_once() -> None:
    taught = likeliest(torch.randn(4, 9), 2)
    own = torch.zeros(4, dtype=torch.int32)
    lesson = distill.Lesson(
        [1, 2, 3, 4, 5, 6], 2, taught.tokens, taught.logprobs, taught.tokens[:, 0], own
    )
    short = distill.Lesson(
        [1, 2, 3], 1, taught.tokens[:2], taught.logprobs[:2], taught.tokens[:2, 0], own[:2]
    )
    batch = distill.collate([{"input_ids": t.ids[:-1], "lesson": t} for t in (lesson, short)])
    for labels in (batch["labels"], batch["labels"][:, 1:]):  # the trainer may leave the first out
        assert int(labels.ne(-100).sum()) == len(batch["places"]) == 6
