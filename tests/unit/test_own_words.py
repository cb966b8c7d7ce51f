"""What a model says of itself, to be mixed in: answers as likely as its own are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bmkit.artifact import open_artifact
from bmkit.data.chat import IGNORED
from bmkit.plan import Job
from bmkit.report import Silent
from bmkit.tune.own_words import own_words
from bmkit.tune.recipe import TuneRecipe


def test_answers_are_drawn_as_the_model_is_likely_to_say_them(tiny: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    job = Job(
        recipe=TuneRecipe.model_validate(
            {
                "kind": "tune",
                "data": {"train": "rows.jsonl"},
                "deltas": [{"type": "lora"}],
                "seed": 3,
            }
        ),
        model=open_artifact(tiny),
        base=None,
        files={},
        out=tmp_path / "out",
        work=tmp_path / "work",
        reporter=Silent(),
    )
    given = (job, 1500, tokenizer)
    how = {"max_length": 64, "dtype": "float32", "device": torch.device("cpu")}
    said = own_words(*given, **how).examples
    learned = sum(label != IGNORED for e in said for label in e["labels"])
    assert 1500 <= learned < 1500 + 64
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    total, entropy = 0.0, 0.0
    for row in said:
        ids, labels = row["input_ids"], row["labels"]
        first = sum(label == IGNORED for label in labels)
        assert labels == [IGNORED] * first + ids[first:] and len(ids) <= 64
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0, first - 1 : -1].log_softmax(-1)
        total -= float(logs.gather(1, torch.tensor(ids[first:])[:, None]).sum())
        entropy -= float((logs.exp() * logs).sum())
    assert abs(total / entropy - 1) < 0.05  # as samples of the model's own distribution have it
    assert own_words(*given, **how).examples == said


@pytest.mark.parametrize(
    ("steps", "processes", "tokens"),
    [(2, 1, 2048), (2, 2, 4096), (300, 1, 60_000), (-1, 1, 60_000)],
)
def test_no_more_is_said_than_the_steps_read(steps: int, processes: int, tokens: int) -> None:
    data = {"train": "t.jsonl", "own_words": 60_000, "mix_share": 0.25}
    train = {"max_steps": steps, "per_device_train_batch_size": 8}
    values = {"kind": "tune", "task": "duplex", "data": data, "train": train}
    recipe = TuneRecipe.model_validate({**values, "deltas": [{"type": "lora"}]})
    assert recipe.own_words(processes) == tokens
