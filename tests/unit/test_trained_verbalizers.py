"""Verbalizers that learn: prototypes and soft words; and labels as texts to say."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bmkit.data.tabular import Record
from bmkit.errors import InputError, RecipeError
from bmkit.prompting.generation import choices, parse_rule, parse_rules, targets
from bmkit.prompting.labelwords import LabelWords, Word
from bmkit.verbalizers import manual as verbalizer
from bmkit.verbalizers import prototypes
from bmkit.verbalizers.manual import Columns
from bmkit.verbalizers.prototypes import Prototypes
from bmkit.verbalizers.softwords import SoftWords


def states(rows: int, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def test_scores_are_cosines_with_prototypes() -> None:
    module = Prototypes(16, 3)
    hidden = states(4)
    found = module(hidden).tolist()
    near = (hidden @ module.projection.weight.T).tolist()
    assert len(near[0]) == 64
    for row, place in zip(found, near, strict=True):
        wanted = [cosine(place, proto) for proto in module.prototypes.tolist()]
        assert row == pytest.approx(wanted, abs=1e-6)


def test_the_loss_is_that_of_the_paper_for_as_many_rows_of_each_label() -> None:
    module = Prototypes(16, 3, size=8)
    hidden, labels = states(6), torch.tensor([0, 1, 2, 0, 1, 2])
    near = (hidden @ module.projection.weight.T).tolist()
    protos = module.prototypes.tolist()
    rows = pairs = 0.0
    for i in range(6):
        others = sum(math.exp(cosine(near[i], near[j])) for j in range(6) if labels[i] != labels[j])
        for j in range(6):
            if labels[i] == labels[j]:
                own = math.exp(cosine(near[i], near[j]))
                pairs += -math.log(own / (own + others)) / 12
        sims = [math.exp(cosine(near[i], proto)) for proto in protos]
        rows += -math.log(sims[int(labels[i])] / sum(sims)) / 6
    assert float(module.loss(hidden, labels).detach()) == pytest.approx(pairs + rows, rel=1e-5)


def test_prototypes_learn_to_tell_labels_apart_and_seeds_decide() -> None:
    labels = torch.tensor([0, 1] * 12)
    hidden = states(24) + 2.0 * labels[:, None]
    module, twin, other = Prototypes(16, 2), Prototypes(16, 2), Prototypes(16, 2, seed=1)
    assert torch.equal(module.prototypes, twin.prototypes)
    assert not torch.equal(module.prototypes, other.prototypes)
    losses = prototypes.fit(module, hidden, labels, epochs=60, learning_rate=1e-2)
    assert losses[-1] < losses[0]
    assert (module(hidden).argmax(-1) == labels).float().mean() > 0.95
    assert prototypes.fit(twin, hidden, labels, epochs=60, learning_rate=1e-2) == losses


def test_states_that_were_made_in_inference_mode_can_be_learned_from() -> None:
    with torch.inference_mode():
        hidden = states(4)
    losses = prototypes.fit(Prototypes(16, 2), hidden, torch.tensor([0, 1, 0, 1]))
    assert losses[-1] < losses[0]


def test_one_label_costs_nothing_and_leaves_gradients_that_make_sense() -> None:
    module = Prototypes(16, 1)
    loss = module.loss(states(3), torch.zeros(3, dtype=torch.long))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    "make", [lambda seed: Prototypes(16, 3, seed=seed), lambda seed: SoftWords(16, 3, bias=True)]
)
def test_trained_verbalizers_come_back_from_safetensors(
    make: Callable[[int], torch.nn.Module], tmp_path: Path
) -> None:
    module, other = make(0), make(1)
    save_file(module.state_dict(), tmp_path / "verbalizer.safetensors")
    assert not torch.equal(module(states(2)), other(states(2)))
    other.load_state_dict(load_file(tmp_path / "verbalizer.safetensors"))
    assert torch.equal(module(states(2)), other(states(2)))


def test_verbalizers_are_brought_to_one_scale_and_indifferent_ones_count_nothing() -> None:
    manual, proto = torch.tensor([[1.0, 3.0, 8.0]]), torch.tensor([[0.3, 0.1, 0.2]])
    found = prototypes.together(manual, proto)[0].tolist()
    spread = math.sqrt(sum((x - 4) ** 2 for x in (1, 3, 8)) / 2)
    wanted = [((m - 4) / spread + (p - 0.2) / 0.1) / 2 for m, p in ((1, 0.3), (3, 0.1), (8, 0.2))]
    assert found == pytest.approx(wanted, rel=1e-4)
    alike = prototypes.together(manual, torch.zeros(1, 3))
    torch.testing.assert_close(alike, prototypes.together(manual) / 2)
    assert prototypes.together(torch.ones(2, 1)).tolist() == [[0.0], [0.0]]


def made(*labels: list[list[int]]) -> LabelWords:
    words = tuple(tuple(Word(str(own), tuple(own)) for own in label) for label in labels)
    return LabelWords(tuple(f"l{i}" for i in range(len(labels))), words)


def test_soft_words_begin_with_the_scores_of_a_language_models_head() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 30)
    hidden = states(5)
    words = made([[3]], [[7]], [[29]])
    soft = SoftWords.of(words, head.weight, head.bias)
    columns = Columns.of(words)
    torch.testing.assert_close(soft(hidden), columns.pick(head(hidden)))
    torch.testing.assert_close(
        soft(hidden).log_softmax(-1),
        verbalizer.label_logprobs(columns.pick(head(hidden)), columns),
    )


def test_soft_words_of_many_tokens_begin_with_their_mean_and_are_copies() -> None:
    weight = states(30)
    before = copy.deepcopy(weight)
    soft = SoftWords.of(made([[1, 2], [5]], [[7]]), weight)
    row = [((weight[1, i] + weight[2, i]) / 2 + weight[5, i]) / 2 for i in range(16)]
    torch.testing.assert_close(soft.head.weight[0], torch.stack(row))
    assert soft.head.weight.requires_grad
    soft(states(2)).sum().backward()
    with torch.no_grad():
        soft.head.weight.sub_(soft.head.weight.grad)
    assert torch.equal(weight, before)
    half = SoftWords.of(made([[1]]), weight.to(torch.bfloat16))
    assert half.head.weight.dtype == torch.bfloat16


ROW: dict[str, Any] = {
    "text_a": "The man slid the razor across his chin.",
    "choice2": "His stubble disappeared.",
    "meta": {"choice1": "His stubble grew.", "answer": 7, "sure": True},
}


RECORD = Record("x.jsonl:4", 4, ROW)


def test_rules_make_the_text_of_a_label_from_a_row() -> None:
    rules = parse_rules({"0": '{"meta": "choice1"}', "1": '{"meta": "choice2"}'}, ["0", "1"])
    assert choices(rules, RECORD) == [["His stubble grew."], ["His stubble disappeared."]]
    rule = parse_rule('It is {"placeholder": "text_a"} so {"meta": "answer"} {"text": "{}"}.')
    assert targets([parse_rule('{"meta": "sure"}')], RECORD) == ["true"]
    assert targets([rule], RECORD) == ["It is The man slid the razor across his chin. so 7 {}."]


def test_a_label_says_something_at_every_mask() -> None:
    spec = {"no": ["no", "{'meta':'choice1'}"], "yes": ["yes", 'because {"meta":"choice2"}']}
    rules = parse_rules(spec, ["yes", "no"], masks=2)
    assert targets(rules[0], RECORD) == ["yes", "because His stubble disappeared."]
    assert targets(rules[1], RECORD) == ["no", "His stubble grew."]
    for masks in (1, 3):
        with pytest.raises(RecipeError, match=f"`yes` has 2 texts for {masks} masks"):
            parse_rules(spec, ["yes", "no"], masks=masks)
    with pytest.raises(RecipeError, match="`no` has 1 texts for 2 masks"):
        parse_rules({**spec, "no": "no"}, ["yes", "no"])
    with pytest.raises(RecipeError, match="`yess` has none") as caught:
        parse_rules(spec, ["yess"], masks=2)
    assert caught.value.hint == "did you mean `yes`?"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('so {"meta": "a"', "column 4: this { is never closed"),
        ('so } {"meta": "a"}', "column 4: this } closes nothing"),
        ('{"mask"}', "`mask` is no piece of a target"),
        ('x {"soft": "a"}', "`soft` is no piece of a target"),
        ("{__import__('os')}", "column 2: a key is text in quotes"),
        ('{"meta": 3}', "column 1"),
    ],
)
def test_what_is_wrong_with_a_rule_is_told_with_its_position(text: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_rule(text)
    assert told in str(caught.value)


def test_a_row_without_what_a_rule_names_is_told() -> None:
    with pytest.raises(InputError, match=r"x.jsonl:4: .* has no `choice3`") as caught:
        targets([parse_rule('{"meta": "choice3"}')], RECORD)
    assert caught.value.hint == "did you mean `choice2`?"
    with pytest.raises(InputError, match=r"x.jsonl:4: .*`meta`: it is an object"):
        targets([parse_rule('{"placeholder": "meta"}')], RECORD)
    empty = Record("x.jsonl:5", 5, {"choice": " "})
    with pytest.raises(InputError, match=r"x.jsonl:5: a label's text is empty"):
        targets([parse_rule('{"meta": "choice"}')], empty)
