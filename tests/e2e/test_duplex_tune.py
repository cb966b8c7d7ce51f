"""`bmkit tune duplex`: a model that knows when to speak, by dialogues in slices."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from bmkit.data.slices import stored
from bmkit.data.slices.layout import Pair, rendered

Run = Callable[..., subprocess.CompletedProcess[str]]
FEW = ("-s", "train.max_steps=2", "-s", "train.per_device_train_batch_size=2", "--json")
FEW = (*FEW, "-s", "data.own_words=0")


def dialogue(draw: random.Random, number: int) -> dict[str, Any]:
    """Return a dialogue whose answers begin where the user's slice ends with a question mark."""
    slices: list[tuple[str | None, str | None, str]] = []
    for _ in range(draw.randint(0, 2)):
        slices.append((draw.choice(["so", "well", "and"]), None, "mid"))
        if draw.random() < 0.4:
            slices.append((None, None, "pause"))
    slices.append((f"{draw.choice('abc')}?", "yes it is", "end"))
    if draw.random() < 0.5:
        slices.append((None, " so.", "cont"))
    else:
        slices.append(("stop", None, "stop"))
    slices.append((None, None, "quiet"))
    rows = [{"u": u, "a": a, "tag": tag} for u, a, tag in slices]
    return {"id": str(number), "kind": "basic", "lang": "en", "slices": rows}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of dialogues in slices: `train.jsonl`, `dev.jsonl`, `test.jsonl`."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count, seed in (("train", 96, 1), ("dev", 24, 2), ("test", 8, 3)):
        draw = random.Random(seed)
        rows = [dialogue(draw, i) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_tiny_model_learns_when_to_be_silent(
    bmkit: Run, tiny: Path, data: Path, tmp_path: Path, dtype: str
) -> None:
    words = (
        "-s",
        "train.max_steps=150",
        "-s",
        "train.learning_rate=0.01",
        "-s",
        "data.own_words=0",
    )
    words = (*words, "-s", f"dtype={dtype}", "-s", "data.max_length=256", "-s", "seed=3", "--json")
    done = result(bmkit("tune", "duplex", "-m", tiny, "--data", data, "-o", "m", *words))
    figures = done["metrics"]
    assert done["kind"] == "model"
    assert figures["dev_idle_f1_before"] < 0.8
    assert figures["dev_idle_f1"] >= 0.95
    assert figures["dev_idle_f1_by_threshold"] >= 0.95
    assert figures["dev_takeover"] >= 0.9 and figures["dev_false_takeover"] <= 0.1
    assert figures["dev_right_end"] >= 0.9
    known = stored.read(tmp_path / "m")
    assert known is not None and known.threshold == figures["threshold"]
    # Plain transformers loads the grown checkpoint, and decides as was measured.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert model.config.vocab_size == len(tokenizer) == 262
    assert tokenizer.convert_tokens_to_ids("<idle>") == known.layout.idle
    for text, speaks in (("so", False), ("b?", True)):
        said = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = rendered(known.layout, [Pair(said, None)]).ids[:-2]
        silence = float(model(torch.tensor([ids])).logits[0, -1].softmax(-1)[known.layout.idle])
        assert (silence < 0.5) == speaks


def test_a_delta_brings_its_tokens_along(
    bmkit: Run, tiny: Path, data: Path, tmp_path: Path
) -> None:
    mix = "data.mix=builtin:data/instructions-train.jsonl"
    words = ("-s", "merge=false", "-s", mix, "-s", "data.mix_share=0.5", *FEW)
    done = result(bmkit("tune", "duplex", "-m", tiny, "--data", data, "-o", "d", *words))
    assert done["kind"] == "delta" and done["metrics"]["delta_bytes"] < 300_000
    assert done["metrics"]["rows"] == 192  # as many ordinary rows as dialogues
    known = stored.read(tmp_path / "d")
    assert known is not None and (known.layout.idle, known.layout.end) == (259, 2)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "d", dtype=torch.float32)
    assert model(torch.tensor([[260, 5, 261]])).logits.shape[-1] == 262
    said = bmkit("infer", "-m", "d", "-p", "Hello", "-s", "max_new_tokens=4", "--json")
    assert len(json.loads(said.stdout)["token_ids"]) <= 4, said.stderr
    # Merged afterwards it is a duplex model, too, that plain transformers loads.
    result(bmkit("merge", "-m", "d", "-o", "whole", "--json"))
    assert stored.read(tmp_path / "whole") == known
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    ids = torch.tensor([[260, 5, 261]])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "whole")) == 262
    wanted = model(ids).logits
    assert (whole(ids).logits - wanted).abs().max() < 0.1 * wanted.abs().max()  # it is bfloat16


def test_what_the_model_says_itself_is_mixed_in(
    bmkit: Run, tiny: Path, data: Path, texts: Path
) -> None:
    words = ("-s", "data.mix_share=0.25", *FEW)
    asked = ("tune", "duplex", "-m", tiny, "--data", data)
    alone = result(bmkit(*asked, "-o", "a", *words))["metrics"]
    both = result(bmkit(*asked, "-o", "b", *words, "-s", "data.own_words=400"))["metrics"]
    again = result(bmkit(*asked, "-o", "c", *words, "-s", "data.own_words=400", "--force"))
    assert alone["rows"] == 96
    assert both["rows"] == 128  # a quarter of all
    assert again["reused"] or again["metrics"] == both
    asked = ("tune", "lora", "-m", tiny, "--data", texts, "-o", "d")
    plain = bmkit(*asked, "-s", "data.own_words=9")
    assert plain.returncode == 2 and "own_words" in plain.stderr


def test_two_deltas_carry_the_tokens_both(
    bmkit: Run, tiny: Path, data: Path, tmp_path: Path
) -> None:
    both = "deltas=[{type: ia3}, {type: lora, r: 4}]"
    words = ("-s", "merge=false", "-s", both, *FEW)
    result(bmkit("tune", "duplex", "-m", tiny, "--data", data, "-o", "d", *words))
    assert stored.read(tmp_path / "d") is not None
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "d" / "adapters" / "lora")
    assert model(torch.tensor([[260, 5, 261]])).logits.shape[-1] == 262
    result(bmkit("merge", "-m", "d", "-o", "whole", "--json"))
    assert stored.read(tmp_path / "whole") == stored.read(tmp_path / "d")
    said = bmkit("infer", "-m", "d", "-p", "Hello", "-s", "max_new_tokens=2", "--json")
    assert said.returncode == 0, said.stderr


@pytest.mark.parametrize("scheme", ["state", "minicpm"])
def test_other_schemes_are_trained_and_stored(
    bmkit: Run, tiny: Path, data: Path, tmp_path: Path, scheme: str
) -> None:
    words = ("-s", f"scheme.name={scheme}", "-s", "slice.threshold=argmax", *FEW)
    done = result(bmkit("tune", "duplex", "-m", tiny, "--data", data, "-o", "m", *words))
    known = stored.read(tmp_path / "m")
    assert known is not None and known.scheme == scheme and known.threshold is None
    assert "threshold" not in done["metrics"]
    assert len(known.layout.states) == (6 if scheme == "state" else 0)
    assert len(known.layout.user) == (1 if scheme == "state" else 8)  # bytes, of which three are 用


def test_a_compressed_duplex_model_is_one_still_and_answers(
    bmkit: Run, tiny: Path, data: Path, tmp_path: Path
) -> None:
    result(bmkit("tune", "duplex", "-m", tiny, "--data", data, "-o", "m", *FEW))
    result(bmkit("compress", "int8", "-m", "m", "-o", "small", "--json"))
    assert stored.read(tmp_path / "small") == stored.read(tmp_path / "m")
    words = ("-p", "Hello", "-s", "max_new_tokens=4", "--json")
    guessed = bmkit("spec-decode", "-m", "m", "-d", "small", *words)
    plain = bmkit("infer", "-m", "m", *words)
    assert json.loads(guessed.stdout)["token_ids"] == json.loads(plain.stdout)["token_ids"]
    for model in ("m", "small"):
        done = bmkit("infer", "-m", model, "-p", "Hello", "-s", "max_new_tokens=4", "--json")
        assert json.loads(done.stdout)["token_ids"], done.stderr
    # Trained again, it keeps its tokens.
    result(bmkit("tune", "duplex", "-m", "m", "--data", data, "-o", "again", *FEW))
    again, before = stored.read(tmp_path / "again"), stored.read(tmp_path / "m")
    assert again is not None and before is not None and again.layout == before.layout


def test_the_plan_counts_the_rows_of_the_marks(bmkit: Run, tiny: Path, data: Path) -> None:
    done = bmkit("tune", "duplex", "-m", tiny, "--data", data, "--plan", "--json")
    steps = result(done)["steps"]
    trained = result(bmkit("tune", "duplex", "-m", tiny, "--data", data, "-o", "m", *FEW))
    told = sum(int(s.rpartition("(")[2].split()[0]) for s in steps if s.endswith("parameters)"))
    assert told == trained["metrics"]["trainable_parameters"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "completion": "b"}], "it has no `slices`"),
        ([{"slices": [{"u": "a", "a": None, "tag": "middle"}]}], "did you mean `mid`"),
        ([{"slices": [{"u": "a " * 800, "a": "b", "tag": "end"}]}], "within 512 tokens"),
    ],
)
def test_rows_that_are_no_dialogues_are_refused_by_line(
    bmkit: Run, tiny: Path, data: Path, tmp_path: Path, rows: list[Any], said: str
) -> None:
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = bmkit("tune", "duplex", "-m", tiny, "--data", data, "-o", "m", *FEW)
    assert done.returncode == 3 and said in done.stderr
    assert "train.jsonl" in done.stderr and not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-s", "scheme.tokens=spare"), "spare tokens"),
        (("-s", "slice.threshold=1.5"), "between 0 and 1"),
        (("-s", "gates.dev_accuracy.min=0.5"), "isn't measured"),
        (("-s", "scheme.nam=idle"), "did you mean `name`"),
        (("--cpu-memory", "2GiB", "-s", "merge=false"), "leave the budget out"),
        (("-s", "deltas.0={type: bitfit}"), "trained with `lora`"),
    ],
)
def test_what_a_recipe_cannot_have_is_told(
    bmkit: Run, tiny: Path, data: Path, words: tuple[str, ...], said: str
) -> None:
    done = bmkit("tune", "duplex", "-m", tiny, "--data", data, "-o", "m", *FEW, *words)
    assert done.returncode == 2 and said in done.stderr, done.stderr


def test_what_is_cut_is_counted(bmkit: Run, tiny: Path, data: Path) -> None:
    slices = [{"u": f"{i}?", "a": "yes", "tag": "end"} for i in range(90)]
    with (data / "train.jsonl").open("a") as stream:
        stream.write(json.dumps({"slices": slices}) + "\n")
    done = bmkit("tune", "duplex", "-m", tiny, "--data", data, "-o", "m", *FEW)
    assert result(done)["metrics"]["rows_truncated"] == 1
    assert "1 row cut at 512 tokens" in done.stderr


def test_the_data_must_be_data(bmkit: Run, tiny: Path, data: Path) -> None:
    result(bmkit("tune", "duplex", "-m", tiny, "--data", data, "-o", "m", *FEW))
    done = bmkit("tune", "duplex", "-m", tiny, "--data", "m", "-o", "n", *FEW)
    assert done.returncode == 3 and "is a model, not data" in done.stderr
    done = bmkit("tune", "duplex", "-m", tiny, "-o", "n", *FEW)
    assert done.returncode == 3 and "--data" in done.stderr
