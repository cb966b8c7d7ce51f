"""`bmkit infer` against plain transformers, row by row."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

PROMPTS = ["Hi", "Tell me a story about a fox.", "1 2 3", "Ü and 漢字 and 🦊", "x" * 90]


def rows_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def wide(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of 240 MB with the tiny one's tokenizer."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wide") / "wide"
    shutil.copytree(tiny_checkpoint, path)
    config = AutoConfig.from_pretrained(path)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 2816, 12
    config.head_dim, config.initializer_range = 256, 0.05
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def by_hand(plain: tuple[Any, Any], text: str, count: int, **options: Any) -> list[int]:
    model, tokenizer = plain
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=count, do_sample=False, **options)
    return [int(i) for i in out[0, ids.shape[1] :]]


def chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_greedy_batches_give_what_transformers_gives_one_by_one_in_order(
    bmkit: Run, tiny: Path, rows: Callable[..., Path], plain: tuple[Any, Any], batch: int
) -> None:
    file = rows("p.jsonl", *({"prompt": p, "id": f"row-{i}"} for i, p in enumerate(PROMPTS)))
    done = bmkit(
        *("infer", "-m", "tiny", "-i", file, "--json", "--max-new-tokens", "12"),
        *("-s", f"batch_size={batch}"),
    )
    found = rows_of(done)
    assert [r["id"] for r in found] == [f"row-{i}" for i in range(len(PROMPTS))]
    for row, prompt in zip(found, PROMPTS, strict=True):
        assert row["token_ids"] == by_hand(plain, chat(prompt), 12), prompt
        assert row["prompt"] == prompt


def test_raw_sends_the_prompt_as_it_is(bmkit: Run, tiny: Path, plain: tuple[Any, Any]) -> None:
    done = bmkit("infer", "-m", "tiny", "-p", "Hi", "--raw", "--json", "--max-new-tokens", "8")
    assert rows_of(done)[0]["token_ids"] == by_hand(plain, "Hi", 8)


def test_a_system_prompt_comes_first(bmkit: Run, tiny: Path, plain: tuple[Any, Any]) -> None:
    done = bmkit(
        *("infer", "-m", "tiny", "-p", "Hi", "--system", "Be brief.", "--json"),
        *("--max-new-tokens", "8"),
    )
    text = "<|im_start|>system\nBe brief.<|im_end|>\n" + chat("Hi")
    assert rows_of(done)[0]["token_ids"] == by_hand(plain, text, 8)


def test_messages_with_history(
    bmkit: Run, tiny: Path, rows: Callable[..., Path], plain: tuple[Any, Any]
) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    file = rows("m.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]})
    done = bmkit("infer", "-m", "tiny", "-i", file, "--json", "--max-new-tokens", "8")
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n" + chat("c")
    assert rows_of(done)[0]["token_ids"] == by_hand(plain, text, 8)


def test_repetition_penalty_is_transformers_own(
    bmkit: Run, tiny: Path, plain: tuple[Any, Any]
) -> None:
    done = bmkit(
        *("infer", "-m", "tiny", "-p", "Hi", "--json", "--max-new-tokens", "16"),
        *("-s", "repetition_penalty=1.8"),
    )
    expected = by_hand(plain, chat("Hi"), 16, repetition_penalty=1.8)
    assert rows_of(done)[0]["token_ids"] == expected
    assert expected != by_hand(plain, chat("Hi"), 16)


def test_a_seed_decides_the_draws_and_the_batch_does_not(
    bmkit: Run, tiny: Path, rows: Callable[..., Path]
) -> None:
    file = rows("p.jsonl", *({"prompt": p} for p in PROMPTS))
    words = ("infer", "sample", "-m", "tiny", "-i", file, "--json", "--max-new-tokens", "10")

    def draw(*more: object) -> list[list[int]]:
        return [r["token_ids"] for r in rows_of(bmkit(*words, *more))]

    one = draw("--seed", 1)
    assert one == draw("--seed", 1, "-s", "batch_size=2")
    assert one != draw("--seed", 2)


def test_an_answer_does_not_depend_on_its_neighbours(
    bmkit: Run, tiny: Path, rows: Callable[..., Path], plain: tuple[Any, Any]
) -> None:
    file = rows(
        "p.jsonl", {"prompt": "Hi"}, {"prompt": "Hi there, " * 49}
    )  # near the context's end
    words = ("infer", "-m", "tiny", "--json", "--max-new-tokens", "40", "--raw")
    words = (*words, "-s", "repetition_penalty=1.5")
    together = rows_of(bmkit(*words, "-i", file))
    alone = rows_of(bmkit(*words, "-p", "Hi"))[0]
    assert together[0]["token_ids"] == alone["token_ids"]
    assert len(together[1]["token_ids"]) < 40, "the context ends the second answer early"
    assert alone["token_ids"] == by_hand(plain, "Hi", 40, repetition_penalty=1.5)


def test_the_end_of_a_prompt_does_not_stop_its_answer(
    bmkit: Run, tiny: Path, rows: Callable[..., Path]
) -> None:
    words = ("infer", "-m", "tiny", "--json", "--max-new-tokens", "12", "--raw", "-p", "one\n\n")
    free = rows_of(bmkit(*words))[0]
    held = rows_of(bmkit(*words, "-s", r'stop_strings=["\n\n"]'))[0]
    assert held["token_ids"] == free["token_ids"][: len(held["token_ids"])]
    assert held["text"] == free["text"].partition("\n\n")[0]


def test_answers_flow_before_the_last_row_is_read(tiny: Path, tmp_path: Path) -> None:
    """The first answers are there while later batches of the window are still to be done."""
    words = ["infer", "-m", "tiny", "-i", "-", "--json", "-q", "--max-new-tokens", "1"]
    words += ["-s", "batch_size=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bmkit_cli", *words],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        for number in range(8):  # one window
            process.stdin.write(json.dumps({"prompt": "x" * (20 - number), "id": number}) + "\n")
        process.stdin.flush()
        assert [json.loads(process.stdout.readline())["id"] for _ in range(8)] == list(range(8))
        process.stdin.close()
    assert process.returncode == 0


def test_top_k_1_is_greedy_whatever_the_temperature(
    bmkit: Run, tiny: Path, plain: tuple[Any, Any]
) -> None:
    done = bmkit(
        *("infer", "-m", "tiny", "-p", "Hi", "--json", "--max-new-tokens", "8"),
        *("-s", "temperature=5", "-s", "top_k=1"),
    )
    assert rows_of(done)[0]["token_ids"] == by_hand(plain, chat("Hi"), 8)


def test_an_answer_ends_before_its_stop_string_also_in_a_batch(
    bmkit: Run, tiny: Path, rows: Callable[..., Path]
) -> None:
    file = rows("p.jsonl", *({"prompt": p} for p in PROMPTS))
    words = ("infer", "-m", "tiny", "-i", file, "--json", "--max-new-tokens", "24")
    free = rows_of(bmkit(*words))
    stop = free[0]["text"][6:9]
    assert stop.strip()
    for row, whole in zip(
        rows_of(bmkit(*words, "-s", f"stop_strings={json.dumps([stop])}")), free, strict=True
    ):
        if stop in whole["text"]:
            assert row["finish"] == "stop"
            assert row["text"] == whole["text"].split(stop)[0]
            assert row["token_ids"] == whole["token_ids"][: len(row["token_ids"])]
        else:
            assert (row["text"], row["finish"]) == (whole["text"], whole["finish"])


def test_an_end_token_is_kept_in_token_ids_and_ends_the_answer(
    bmkit: Run, tiny: Path, plain: tuple[Any, Any]
) -> None:
    free = by_hand(plain, chat("Hi"), 12)
    later = next(i for i in range(1, 12) if free[i] not in free[:i])
    config = json.loads((tiny / "generation_config.json").read_text())
    config["eos_token_id"] = [2, free[later]]
    (tiny / "generation_config.json").write_text(json.dumps(config))
    done = bmkit("infer", "-m", "tiny", "-p", "Hi", "--json", "--max-new-tokens", "12")
    row = rows_of(done)[0]
    assert row["token_ids"] == free[: later + 1] and row["finish"] == "eos"


def test_an_answer_never_leaves_the_context(bmkit: Run, tiny: Path) -> None:
    done = bmkit(
        *("infer", "-m", "tiny", "-p", "x" * 490, "--raw", "--json", "--max-new-tokens", "60")
    )
    assert len(rows_of(done)[0]["token_ids"]) == 512 - 490


def test_what_a_checkpoint_prefers_does_not_change_greedy(
    bmkit: Run, tiny: Path, plain: tuple[Any, Any]
) -> None:
    config = json.loads((tiny / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 9.0, "repetition_penalty": 3.0}
    (tiny / "generation_config.json").write_text(json.dumps(config))
    done = bmkit("infer", "-m", "tiny", "-p", "Hi", "--json", "--max-new-tokens", "8")
    assert rows_of(done)[0]["token_ids"] == by_hand(plain, chat("Hi"), 8)


def test_text_streams_to_a_terminal_and_equals_the_whole(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    import os
    import pty
    import sys

    words = ("infer", "-m", "tiny", "-p", "Hi", "--max-new-tokens", "24")
    whole = bmkit(*words).stdout
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "bmkit_cli", *words],
        stdout=side,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    os.close(side)
    pieces = []
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:
            break
        if not piece:
            break
        pieces.append(piece)
    assert process.wait(60) == 0
    os.close(main)
    assert len(pieces) > 3
    assert b"".join(pieces).decode().replace("\r\n", "\n") == whole


def test_out_takes_the_json_lines(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    done = bmkit(
        "infer", "-m", "tiny", "-p", "a", "-p", "b", "-o", "o.jsonl", "--max-new-tokens", "3"
    )
    assert done.stdout == "o.jsonl\n"
    found = [json.loads(x) for x in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in found] == ["a", "b"]


def test_out_that_is_there_is_replaced_only_by_force(
    bmkit: Run, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "mine"}\n')
    words = ("infer", "-m", "tiny", "--max-new-tokens", "2", "-o", "a.jsonl")
    assert bmkit(*words, "-p", "x").returncode == 3
    assert bmkit(*words, "-i", "a.jsonl", "--force").returncode == 2
    assert "mine" in (tmp_path / "a.jsonl").read_text()
    assert bmkit(*words, "-p", "x", "--force").returncode == 0
    assert json.loads((tmp_path / "a.jsonl").read_text())["prompt"] == "x"


@pytest.mark.parametrize("how", [(), ("--quant", "int8"), ("--quant", "int4")])
def test_a_budget_changes_no_token_and_is_kept(
    bmkit: Run, fresh: Run, tmp_path: Path, wide: Path, how: tuple[str, ...]
) -> None:
    words = ("infer", "-m", wide, "-p", "Hi there", "--json", "--max-new-tokens", "20", "--report")
    words = (*words, "r.json", "-s", "batch_size=1", *how)
    free = rows_of(bmkit(*words))
    refused = bmkit(*words, "--cpu-memory", "1MiB")
    assert refused.returncode == 4, refused.stderr
    smallest = re.search(r"smallest that works is --cpu-memory (\d+)MiB", refused.stderr)
    assert smallest is not None, refused.stderr
    budget = int(smallest[1])
    # What is rounded while loading isn't streamed: it would be rounded again for every token.
    for limit in (budget,) if how else (budget, budget + 20, budget + 60):
        held = fresh(*words, "--cpu-memory", f"{limit}MiB")
        assert rows_of(held)[0]["token_ids"] == free[0]["token_ids"]
        report = json.loads((tmp_path / "r.json").read_text())
        taken = report["peak_rss_bytes"] - report["rss_before_bytes"]
        assert taken <= limit * 2**20
        assert report["budget_bytes"]["cpu"] == limit * 2**20
        assert how or "0 B a token" not in report["plan"]["steps"][0] or limit > budget


def test_quant_equals_the_weights_that_it_rounds_to(
    bmkit: Run, tiny: Path, plain: tuple[Any, Any]
) -> None:
    """int8 while loading: the same tokens as plain transformers with the rounded weights."""
    import copy

    from bmkit.nn.rounding import dequantize, quantize

    model = copy.deepcopy(plain[0])
    for parameter in model.parameters():
        if parameter.ndim == 2:
            values, scale = quantize(parameter.data, 8)
            parameter.data = dequantize(values, scale)
    model.tie_weights()
    done = bmkit("infer", "-m", "tiny", "-p", "Hi", "--raw", "--json", "--quant", "int8")
    wanted = by_hand((model, plain[1]), "Hi", 256)
    assert rows_of(done)[0]["token_ids"] == wanted[: wanted.index(2) + 1 if 2 in wanted else None]


def test_the_report_says_what_it_took(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    done = bmkit(
        *("infer", "-m", "tiny", "-p", "a", "--json", "--max-new-tokens", "7"),
        *("--report", "r.json"),
    )
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["tokens"] == len(rows_of(done)[0]["token_ids"])
    assert report["peak_rss_bytes"] > report["rss_before_bytes"] > 10**7
    assert report["plan"]["peak"]["ram_bytes"] > 0
    assert "expected" not in report["plan"]  # measuring would take memory that a budget bounds
    assert report["tokens_per_second"] == pytest.approx(
        report["tokens"] / report["seconds"], rel=0.02
    )


def test_a_plan_says_how_fast_it_should_be(bmkit: Run, tiny: Path) -> None:
    plan = json.loads(bmkit("infer", "-m", "tiny", "-p", "a", "--plan", "--json").stdout)
    assert set(plan["expected"]) == {"decode_tokens_per_second", "prefill_tokens_per_second"}
    assert all(10 < rate < 1e9 for rate in plan["expected"].values())
    assert "decode: about" in bmkit("infer", "-m", "tiny", "-p", "a", "--plan").stdout
