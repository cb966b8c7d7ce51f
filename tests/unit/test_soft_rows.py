"""Trained tokens behind the vocabulary: parity with words, training, files, merging."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bmkit.deltas import compose, soft_files, soft_rows, soft_words
from bmkit.errors import BmkitError, InputError, RecipeError
from bmkit.prompting import encode, template, wrap
from bmkit.prompting.encode import SoftRow

Build = Callable[..., Any]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gemma3": {},
    "bert": {},
    "electra": {},
    "t5": {},
    "bart": {"scale_embedding": True},
}
WORDS = [SoftRow(0, 7, "it", False), SoftRow(0, 9, "is", False), SoftRow(1, None, None, True)]
IDS = [3, 40, 41, 5, 42, 42, 6]
AS_WORDS = [3, 7, 9, 5, 42, 42, 6]


def inputs(model: Any, ids: list[int], decoder: list[int] | None = None) -> dict[str, Tensor]:
    given = {"input_ids": torch.tensor([ids])}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.tensor([decoder or [1, 4]])
    return given


@torch.no_grad()
def logits(model: Any, ids: list[int], decoder: list[int] | None = None) -> Tensor:
    found: Tensor = model(**inputs(model, ids, decoder)).logits
    return found


def trained(model: Any, ids: list[int], steps: int = 3) -> None:
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs(model, ids)).logits.log_softmax(-1)[..., 8].sum().neg().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_that_begins_as_a_word_says_what_the_word_says(
    architecture: Build, name: str, dtype: torch.dtype
) -> None:
    model = architecture(name, real=True, **MODELS[name]).to(dtype)
    words = logits(model, [3, 7, 9, 5], [1, 7])
    soft_rows.add(model, WORDS)
    found = logits(model, [3, 40, 41, 5], [1, 40])
    assert torch.equal(found, words) and found.shape[-1] == 40
    assert torch.equal(logits(model, [3, 7, 9, 5], [1, 7]), words)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_the_rows_alone(architecture: Build, name: str) -> None:
    model = architecture(name, real=True, **MODELS[name]).requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    soft = soft_rows.add(model, WORDS)
    begun = soft.values.detach().clone()
    trained(model, IDS)
    assert all((row != old).any() for row, old in zip(soft.values, begun, strict=True))
    left = dict(model.named_parameters())
    assert all(torch.equal(left[n], p) and left[n].grad is None for n, p in before.items())


def test_the_gradient_of_a_row_is_that_of_its_places(architecture: Build) -> None:
    model = architecture("llama", real=True).requires_grad_(False)
    soft = soft_rows.add(model, WORDS)
    model(**inputs(model, IDS)).logits[..., 8].sum().backward()
    table = torch.cat((model.model.embed_tokens.weight, soft.values.detach()))
    embedded = functional.embedding(torch.tensor([IDS]), table).requires_grad_()
    model(inputs_embeds=embedded).logits[..., 8].sum().backward()
    assert embedded.grad is not None
    by_place = embedded.grad[0]
    wanted = torch.stack((by_place[1], by_place[2], by_place[4] + by_place[5]))
    assert torch.allclose(soft.values.grad, wanted, atol=1e-6)


def test_the_whole_model_may_be_trained_as_well(architecture: Build) -> None:
    model = architecture("llama", real=True)
    soft_rows.add(model, WORDS)
    model(**inputs(model, [40, 41])).logits[..., 8].sum().backward()
    table = model.model.embed_tokens.weight.grad  # the head is tied, and has its part in it
    assert table is not None and table[8].abs().sum() > 0 and table[0].abs().sum() == 0


def test_random_rows_are_drawn_like_the_vocabulary() -> None:
    table = torch.randn(5000, 4, generator=torch.Generator().manual_seed(1)) * 3 + torch.arange(4)
    rows = soft_rows.initial(table, [()] * 4000, seed=2)
    assert torch.allclose(rows.mean(0), table.mean(0), atol=0.2)
    assert torch.allclose(rows.std(0), table.std(0), rtol=0.05)
    assert torch.equal(rows, soft_rows.initial(table, [()] * 4000, seed=2))
    assert torch.equal(soft_rows.initial(table, [(3, 5)])[0], table[[3, 5]].mean(0))


@pytest.mark.parametrize("way", ["mlp", "lstm"])
def test_an_encoder_begins_as_nothing_and_leaves_rows(
    architecture: Build, tmp_path: Path, way: Any
) -> None:
    model = architecture("llama", real=True).requires_grad_(False)
    before = copy.deepcopy(model)
    words = logits(model, [3, 7, 9, 5])
    soft = soft_rows.add(model, WORDS, way=way, seed=4)
    assert torch.equal(logits(model, [3, 40, 41, 5]), words)
    held = {n: p.detach().clone() for n, p in soft.named_parameters()}
    trained(model, IDS)
    assert all((p != held[n]).any() for n, p in soft.named_parameters())
    assert not torch.equal(soft(), soft.values)
    said = logits(model, IDS)
    soft_files.save(model, tmp_path / "soft")
    loaded = soft_files.load(before, tmp_path / "soft")
    assert torch.equal(logits(before, IDS), said) and loaded.encoder is None
    soft.settle()
    assert torch.equal(logits(model, IDS), said) and len(list(soft.parameters())) == 1


def test_the_lstm_tells_of_neighbours_and_the_mlp_does_not() -> None:
    from bmkit.deltas.soft_encoders import encoder

    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    other = rows.clone()
    other[3] += 1
    for way, hears in (("mlp", False), ("lstm", True)):
        made = encoder(way, 6, None, 1)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(3))
        assert torch.equal(made(rows)[0], made(other)[0]) is not hears


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_saved_and_loaded_bit_for_bit(
    architecture: Build, tmp_path: Path, name: str
) -> None:
    model = architecture(name, real=True, **MODELS[name]).requires_grad_(False)
    plain = copy.deepcopy(model)
    soft = soft_rows.add(model, WORDS, seed=3)
    trained(model, IDS)
    soft_files.save(model, tmp_path / "soft")
    assert sum(f.stat().st_size for f in (tmp_path / "soft").iterdir()) < 2048
    again = soft_files.load(plain, tmp_path / "soft")
    assert torch.equal(again.values, soft.values) and again.about == tuple(WORDS)
    assert torch.equal(logits(plain, IDS), logits(model, IDS))
    assert not any(p.requires_grad for p in plain.parameters())


def test_rows_of_another_base_and_damaged_ones_are_refused(
    architecture: Build, tmp_path: Path
) -> None:
    folder = tmp_path / "soft"
    model = architecture("llama", real=True)
    soft_rows.add(model, WORDS)
    soft_files.save(model, folder)
    with pytest.raises(InputError, match="vocabulary of 40, and this model's is 44"):
        soft_files.load(architecture("llama", real=True, vocab_size=44), folder)
    with pytest.raises(InputError, match="of width 16, and this model's is 32"):
        soft_files.load(architecture("llama", real=True, hidden_size=32), folder)
    with pytest.raises(RecipeError, match="already"):
        soft_files.load(model, folder)
    about = folder / soft_files.ABOUT
    about.write_text(json.dumps({**json.loads(about.read_text()), "rows": []}))
    with pytest.raises(InputError, match="don't belong together"):
        soft_files.read(folder)
    (folder / soft_files.WEIGHTS).write_bytes(b"no")
    with pytest.raises(InputError, match="damaged"):
        soft_files.read(folder)
    about.unlink()
    with pytest.raises(InputError, match="holds no trained tokens"):
        soft_files.read(folder)


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    "embedding": lambda: peft.LoraConfig(
        r=2, target_modules=["embed_tokens"], init_lora_weights=False
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("names", [["lora"], ["embedding"], ["prefix"], ["lora", "prompt"]])
def test_rows_and_deltas_are_trained_and_reloaded_together(
    architecture: Build, tmp_path: Path, names: list[str]
) -> None:
    plain = architecture("llama", real=True)
    model = compose.attach(copy.deepcopy(plain), {name: CONFIGS[name]() for name in names})
    soft = soft_rows.add(model, WORDS)
    begun = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trained(model, IDS)
    moved = {n for n, p in model.named_parameters() if n in begun and (p != begun[n]).any()}
    assert any("soft_rows" in n for n in moved) and len(moved) >= 1 + len(names)
    for name in names:
        compose.save(model, name, tmp_path / name)
        assert (tmp_path / name / "adapter_model.safetensors").stat().st_size < 4096
    soft_files.save(model, tmp_path / "soft")
    said = logits(model.eval(), IDS)
    again = compose.load(copy.deepcopy(plain), {name: tmp_path / name for name in names})
    soft_files.load(again, tmp_path / "soft")
    assert torch.equal(logits(again, IDS), said)
    with compose.active(again, ()):
        alone = copy.deepcopy(plain)
        soft_files.load(alone, tmp_path / "soft")
        assert torch.equal(logits(again, IDS), logits(alone, IDS))
    assert torch.equal(soft_rows.require(again).values, soft.values)


def test_rows_come_off_and_leave_the_model_as_it_was(architecture: Build) -> None:
    for name in ("llama", "t5"):
        model = architecture(name, real=True)
        before, state = logits(model, [3, 4]), list(model.state_dict())
        soft = soft_rows.add(model, WORDS)
        assert soft_rows.detach(model) is soft and soft_rows.of(model) is None
        assert list(model.state_dict()) == state and torch.equal(logits(model, [3, 4]), before)
        assert not [m for m in model.modules() if "forward" in vars(m)]
        with pytest.raises(IndexError):
            logits(model, IDS)
        with pytest.raises(InputError, match="no trained tokens"):
            soft_rows.detach(model)


def test_a_copy_of_a_model_reads_its_own_rows(architecture: Build) -> None:
    model = architecture("llama", real=True)
    soft_rows.add(model, WORDS)
    other, before = copy.deepcopy(model), logits(model, IDS)
    with torch.no_grad():
        soft_rows.require(other).values.zero_()
    assert torch.equal(logits(model, IDS), before)
    assert not torch.equal(logits(other, IDS), before)


def test_an_id_behind_the_rows_is_an_error(architecture: Build) -> None:
    model = architecture("llama", real=True)
    soft_rows.add(model, WORDS)
    with pytest.raises(IndexError):
        logits(model, [43])


def test_a_table_that_is_none_is_refused(architecture: Build) -> None:
    model = architecture("llama", real=True)

    class Odd(torch.nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model.model.embed_tokens = Odd(40, 16)
    with pytest.raises(RecipeError, match="Odd does more"):
        soft_rows.add(model, WORDS)
    model.model.embed_tokens = torch.nn.Linear(1, 16)
    with pytest.raises(BmkitError, match="the model's is Linear"):
        soft_rows.add(model, WORDS)


def test_the_rows_of_a_template_are_where_its_tokens_say(
    architecture: Build, tokenizer: Any
) -> None:
    model = architecture("llama", real=True, vocab_size=len(tokenizer))
    made = template.parse(
        '{"soft": "The answer"} {"placeholder": "text"} {"soft"}{"soft": None, "duplicate": 2, '
        '"same": True} {"mask"}'
    )
    encoder = encode.Encoder(tokenizer, "causal", 64, soft_start=len(tokenizer))
    rows = encoder.soft_rows(made)
    soft = soft_rows.add(model, rows)
    encoded = encoder.encode(wrap.wrap(made, {"text": "is it"}, 1))
    words = [rows[n].token if n >= 0 else None for n in encoded.soft]
    as_words = [i if w is None else w for i, w in zip(encoded.ids, words, strict=True)]
    told = [n for n in encoded.soft if n >= 0]
    assert len(soft.values) == len(rows) and told[-1] == told[-2] != told[-3]
    assert any(w is not None for w in words)
    assert torch.equal(logits(model, encoded.ids), logits(model, as_words))


def test_the_nearest_words_are_those_of_the_highest_cosine(
    architecture: Build, tokenizer: Any
) -> None:
    model = architecture("llama", real=True, vocab_size=len(tokenizer) + 5)
    table = model.model.embed_tokens.weight.detach()
    rows = torch.stack((table[50] * 2, table[60] + 0.1 * table[70]))
    found = soft_words.nearest(rows, table, tokenizer, k=3)
    assert (found[0][0].token, found[1][0].token) == (50, 60)
    assert found[0][0].word == tokenizer.decode([50])
    cosines = functional.cosine_similarity(rows[1].double()[None], table.double())
    special = set(tokenizer.all_special_ids)
    order = [t for t in cosines.argsort(descending=True).tolist() if t not in special]
    assert [n.token for n in found[1]] == [t for t in order if t < len(tokenizer)][:3]
    assert found[1][0].cosine == pytest.approx(float(cosines[60]))


@pytest.mark.parametrize("room", [0, 2, 8])
@pytest.mark.parametrize("name", MODELS)
def test_a_merged_checkpoint_says_the_same_in_plain_transformers(
    architecture: Build, tokenizer: Any, tmp_path: Path, name: str, room: int
) -> None:
    import transformers

    size = len(tokenizer) + room
    model = architecture(name, real=True, vocab_size=size, **MODELS[name]).requires_grad_(False)
    soft_rows.add(model, WORDS)
    ids = [i if i < 40 else size + i - 40 for i in IDS]
    trained(model, ids)
    said = logits(model, ids)
    merged = soft_words.merged(model, tokenizer)
    merged.model.save_pretrained(tmp_path / "plain")
    merged.tokenizer.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert words.convert_tokens_to_ids(["<soft_0>", "<soft_2>"]) == merged.token_ids[::2]
    assert merged.token_ids == list(range(len(tokenizer), len(tokenizer) + 3))
    text = [i if i < size else merged.token_ids[i - size] for i in ids]
    found = logits(again, text)
    assert found.shape[-1] == max(size, len(tokenizer) + 3)
    real = len(tokenizer)  # behind it there were numbers without a token
    assert torch.allclose(found[..., :real], said[..., :real], atol=1e-6)
    assert words("a <soft_1>")["input_ids"][-1] == merged.token_ids[1]
    assert len(tokenizer) == real
    if again.can_generate():
        assert again.generation_config.suppress_tokens == merged.token_ids
    if name in ("bert", "electra"):
        assert (found[..., merged.token_ids] < -5000).all()


def test_a_merged_checkpoint_never_says_a_soft_token(architecture: Build, tokenizer: Any) -> None:
    model = architecture("llama", real=True, vocab_size=len(tokenizer))
    soft = soft_rows.add(model, WORDS)
    said = logits(model, [3, 4])[0, -1]
    with torch.no_grad():  # tied to the head, this row would be the likeliest
        soft.values[0] = 100 * model.model.embed_tokens.weight[said.argmax()]
    merged = soft_words.merged(model, tokenizer)
    out = merged.model.generate(torch.tensor([[3, 4]]), max_new_tokens=1, do_sample=False)
    assert logits(merged.model, [3, 4])[0, -1].argmax() == merged.token_ids[0]
    assert out[0, -1] == said.argmax()


def test_merging_with_deltas_there_is_refused(architecture: Build, tokenizer: Any) -> None:
    model = compose.attach(architecture("llama", real=True), {"lora": CONFIGS["lora"]()})
    soft_rows.add(model, WORDS)
    with pytest.raises(RecipeError, match="has deltas"):
        soft_words.merged(model, tokenizer)
