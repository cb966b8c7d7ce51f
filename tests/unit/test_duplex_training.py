"""Training on slices: weighted loss, rows that are trained, decisions, and a saved delta."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from bmkit.data.batch import Padding
from bmkit.data.chat import IGNORED
from bmkit.data.slices.dialogue import TAGS, Tag
from bmkit.data.slices.examples import code
from bmkit.data.slices.tokens import mark
from bmkit.deltas import attachment, compose
from bmkit.deltas.merge import merge
from bmkit.deltas.recipe import Lora
from bmkit.errors import RecipeError
from bmkit.train import decisions, packing
from bmkit.train import head as heads
from bmkit.train.decisions import Decided, calibrate, figures
from bmkit.train.linear_cross_entropy import linear_cross_entropy
from bmkit.train.loss import next_token_loss
from bmkit.train.packing import Packing, pack
from bmkit.tune.duplex import grow

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False}),
    ("gpt2", {}),
    ("gemma2", {}),  # embeddings are scaled, logits are capped
]
TRAINED = (3, 17, 29)


def example(seed: int, size: int) -> dict[str, list[Any]]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(40, (size,), generator=draw).tolist()
    ids[2:5] = TRAINED  # they are read, and are to be said
    learn = torch.rand(size, generator=draw) < 0.6
    labels = [i if on else IGNORED for i, on in zip(ids, learn.tolist(), strict=True)]
    labels[3] = ids[3]
    weights = (0.25 + torch.rand(size, generator=draw)).tolist()
    places = [code(i % 2 == 0, i % len(TAGS)) if i % 3 == 2 else 0 for i in range(size)]
    return {"input_ids": ids, "labels": labels, "weights": weights, "decisions": places}


EXAMPLES = [example(1, 12), example(2, 20), example(3, 9)]
COLLATE = Padding(0, ("weights", "decisions"))


def prepared(architecture: Any, family: str, **config: Any) -> Any:
    """Return a model with LoRA and rows that are trained, none of it zero."""
    base = architecture(family, real=True, initializer_range=0.3, **config)
    spec = Lora(type="lora", r=2, target_modules="all-linear")
    options = {"tokenizer": None, "tokenizer_path": Path("x"), "task_type": "CAUSAL_LM"}
    model = attachment.attach(base, {"one": spec}, seed=0, tokens=TRAINED, **options)
    draw = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def direct(model: Any) -> tuple[Tensor, int]:
    """Return the weighted loss, row by row, with all logits."""
    total, count = torch.zeros(()), 0
    for row in EXAMPLES:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        said = logits.log_softmax(-1)
        for at in range(1, len(row["input_ids"])):
            if row["labels"][at] != IGNORED:
                total = total - row["weights"][at] * said[at - 1, row["labels"][at]]
                count += 1
    return total, count


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "config"), MODELS)
@pytest.mark.parametrize("way", ["head", "model", "packed"])
def test_the_loss_counts_each_token_by_its_weight(
    architecture: Any, family: str, config: dict[str, Any], way: str
) -> None:
    model = prepared(architecture, family, **config)
    wanted, count = direct(model)
    wanted_gradients = gradients(model, wanted)
    batch = COLLATE(EXAMPLES)
    if way == "packed":
        how = packing.way(model)
        assert how is not None
        batch = Packing(0, how)(pack(EXAMPLES, 34))
    head = None if way == "model" else heads.find(model)
    assert way == "model" or head is not None
    found, labelled = next_token_loss(model, batch, head=head)
    assert labelled == count
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    given = gradients(model, found)
    assert given.keys() == wanted_gradients.keys()
    rows = [name for name in given if "trainable_tokens" in name]
    tied = model.config.tie_word_embeddings
    assert len(rows) == (1 if tied else 2)
    for name, gradient in given.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-3, atol=1e-4)


def test_rows_of_a_head_that_are_apart_have_autograds_gradients() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(30, 8, generator=draw), torch.randn(13, 8, generator=draw)
    bias, rows = torch.randn(13, generator=draw), torch.randn(2, 8, generator=draw)
    targets = torch.randint(13, (30,), generator=draw)
    weights = torch.rand(30, generator=draw)
    given = [t.requires_grad_() for t in (hidden, weight, bias, rows)]
    tokens = torch.tensor([4, 9])
    logits = hidden @ weight.index_copy(0, tokens, rows).T + bias
    logits = 5 * torch.tanh(2 * logits / 5)
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none") @ weights
    wanted_gradients = torch.autograd.grad(wanted, given)
    options = {"bias": bias, "scale": 2.0, "softcap": 5.0, "rows": 7}
    found = linear_cross_entropy(
        hidden, weight, targets, weights=weights, own=(tokens, rows), **options
    )
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(torch.autograd.grad(found, given), wanted_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_rows_that_are_apart_may_be_float32_where_the_head_is_bfloat16() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(30, 8, generator=draw).bfloat16().requires_grad_()
    weight = torch.randn(13, 8, generator=draw).bfloat16()
    rows = torch.randn(2, 8, generator=draw, requires_grad=True)
    targets, tokens = torch.randint(13, (30,), generator=draw), torch.tensor([4, 9])
    weights = torch.rand(30, generator=draw)
    wide = hidden.detach().float().requires_grad_()
    logits = wide @ weight.float().index_copy(0, tokens, rows).T
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none") @ weights
    right = torch.autograd.grad(wanted, (wide, rows))
    found = linear_cross_entropy(
        hidden, weight, targets, weights=weights, own=(tokens, rows), rows=7
    )
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    given = torch.autograd.grad(found, (hidden, rows))
    assert [g.dtype for g in given] == [torch.bfloat16, torch.float32]
    for mine, theirs in zip(given, right, strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(("family", "config"), MODELS)
def test_a_saved_delta_is_small_and_plain_peft_says_the_same(
    architecture: Any, family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    model = prepared(architecture, family, **config).eval()
    ids = COLLATE(EXAMPLES)["input_ids"]
    wanted = model(input_ids=ids).logits
    compose.save(model, "one", tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    table = model.get_input_embeddings().weight.numel() * 4
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) * 4
    assert size < lora + table // 2 + 20_000
    plain = architecture(family, real=True, initializer_range=0.3, **config)
    theirs = PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
    ours = compose.load(
        architecture(family, real=True, initializer_range=0.3, **config), {"x": tmp_path}
    )
    torch.testing.assert_close(ours(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
    whole = merge(model)
    assert not [n for n, _ in whole.named_parameters() if "lora" in n or "token_adapter" in n]
    tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
    assert tied == whole.config.tie_word_embeddings
    torch.testing.assert_close(whole(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-4)


def test_a_delta_with_tokens_of_its_own_grows_its_base(
    architecture: Any, tokenizer: Any, tmp_path: Path
) -> None:
    size = len(tokenizer)
    architecture("llama", real=True, vocab_size=size).save_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<idle>", "<|u|>"]})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    spec = Lora(type="lora", r=2, target_modules="all-linear")
    options = {"tokenizer": None, "tokenizer_path": Path("x"), "task_type": "CAUSAL_LM"}
    model = attachment.attach(model, {"one": spec}, seed=0, tokens=(size, size + 1), **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    ids = torch.tensor([[5, size, 7, size + 1, 9]])
    wanted = model.eval()(input_ids=ids).logits
    compose.save(model, "one", tmp_path / "delta")
    tokenizer.save_pretrained(tmp_path / "delta")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "delta").eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, wanted)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ours = compose.load(plain, {"one": tmp_path / "delta"})
    torch.testing.assert_close(ours(input_ids=ids).logits, wanted)


@pytest.mark.parametrize(("family", "config"), MODELS)
def test_decisions_are_what_the_models_own_logits_say(
    architecture: Any, family: str, config: dict[str, Any]
) -> None:
    model = prepared(architecture, family, **config).eval()
    silent = (3, 17)
    batches = [COLLATE(EXAMPLES[:2]), COLLATE(EXAMPLES[2:])]
    found = decisions.decide(model, batches, silent, torch.device("cpu"))
    said, right = [], []
    for row in EXAMPLES:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        for at, number in enumerate(row["decisions"]):
            if number:
                said.append(float(logits[at - 1].softmax(-1)[list(silent)].sum()))
                right.append((number - 1) % 2 == 1)
    assert found.silence == pytest.approx(said, rel=1e-4, abs=1e-7)
    assert found.speaks == right
    total, count = direct(model)
    assert found.loss == pytest.approx(float(total.detach()) / count, rel=1e-4)


CASES = Decided(
    0.0,
    [0.9, 0.8, 0.3, 0.95, 0.2, 0.7, 0.99, 0.1],
    [True, True, False, True, False, True, True, False],
    [False, False, False, False, True, True, False, True],
    ["mid", "mid", "pause", "barge", "end", "side", "quiet", "cont"],
)


def test_figures_are_those_of_a_table_by_hand() -> None:
    found = figures(CASES)
    # Silent at 5 slices, 4 of them rightly; silence is right at 5.
    assert found["idle_precision"] == pytest.approx(4 / 5)
    assert found["idle_recall"] == pytest.approx(4 / 5)
    assert found["idle_f1"] == pytest.approx(4 / 5)
    assert found["false_takeover"] == pytest.approx(1 / 4)
    assert found["takeover"] == pytest.approx(1 / 2)
    assert found["right_mid"] == 1 and found["right_pause"] == 0 and "right_stop" not in found
    by = figures(CASES, 0.75)
    assert by["takeover"] == 1 and by["false_takeover"] == pytest.approx(1 / 4)


def test_the_threshold_has_the_fewest_errors_of_all() -> None:
    cases = replace(CASES, silence=[0.9, 0.8, 0.85, 0.95, 0.2, 0.7, 0.99, 0.1])
    threshold = calibrate(cases)
    assert threshold is not None and 0.7 < threshold < 0.8

    def errors(at: float) -> float:
        by = figures(cases, at)
        return (
            by["false_takeover"]
            + 1
            - by["takeover"]
            + (2 - by["right_quiet"] - by["right_cont"]) / 2
        )

    assert errors(threshold) == min(errors(at / 1000) for at in range(1, 1000))


@pytest.mark.parametrize(("early", "highest"), [(10, 0.4), (3, 0.9)])
def test_few_turns_are_taken_too_early_even_if_more_answers_come_late(
    early: int, highest: float
) -> None:
    silence = [0.9] * (100 - early) + [0.4] * early + [0.8] * 40
    tags: list[Tag] = ["mid"] * 100 + ["end"] * 40
    speaks = [False] * 100 + [True] * 40
    threshold = calibrate(Decided(0.0, silence, [True] * 140, speaks, tags))
    assert threshold is not None and highest - 0.4 < threshold <= highest


def test_nothing_is_calibrated_where_all_is_silence() -> None:
    assert calibrate(Decided(0.0, [0.5], [True], [False], ["mid"])) is None


def test_a_head_with_a_bias_is_refused_not_trained_without_it(architecture: Any) -> None:
    with pytest.raises(RecipeError, match="bias"):
        prepared(architecture, "phi")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["spare", "added"])
def test_rows_of_new_marks_begin_apart_and_no_other_changes(
    architecture: Any, tokenizer: Any, how: Any, tied: bool
) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>", "<y>", "<z>"]})
    model = architecture("llama", real=True, vocab_size=len(tokenizer), tie_word_embeddings=tied)
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    before = [part.weight.detach().clone() for part in parts]
    marks = mark(tokenizer, "idle", how)
    grow(model, marks, tokenizer, seed=3)
    trained = list(marks.trained)
    for known, part in zip(
        before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True
    ):
        assert len(part.weight) == len(tokenizer)
        same = [i for i in range(len(known)) if i not in trained]
        assert torch.equal(part.weight[same], known[same])
        new = part.weight[trained].detach()
        assert (
            torch.cdist(new, torch.cat((new, known))).topk(2, largest=False).values[:, 1].min() > 0
        )
        assert 0.5 < float(new.std() / known.std()) < 2
