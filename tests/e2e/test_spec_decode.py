"""`bmkit spec-decode` and `bmkit phrases`: the answers of infer, pools that are kept, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
Rows = Callable[..., Path]

PROMPTS = ["Hi", "Tell me a story about a fox, a fox.", "1 2 3 1 2 3", "Ü and 漢字 and 🦊"]


def objects(done: Done) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def refused(done: Done, code: int, *words: str) -> None:
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)


def pool_tokens(path: Path) -> list[int]:
    with safe_open(path / "phrases.safetensors", "np") as file:
        found: list[int] = file.get_tensor("tokens").tolist()
    return found


@pytest.fixture
def asked(rows: Rows) -> Path:
    return rows("asked.jsonl", *({"prompt": p, "id": f"row-{i}"} for i, p in enumerate(PROMPTS)))


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_rows_are_those_of_infer(bmkit: Run, tiny: Path, asked: Path, how: str) -> None:
    words = ["-m", "tiny", "-i", asked, "--json", "--max-new-tokens", "40"]
    if how == "sampled":
        words += ["-s", "temperature=0.7", "--seed", "4"]
    plain = objects(bmkit("infer", *words))
    guessed = objects(bmkit("spec-decode", *words, "-d", "self", "-s", "adaptive=false"))
    for one, other in zip(plain, guessed, strict=True):
        assert {k: one[k] for k in ("id", "prompt", "text", "token_ids", "finish")} == {
            k: other[k] for k in ("id", "prompt", "text", "token_ids", "finish")
        }
        assert len(other["origins"]) == len(other["token_ids"])
    assert any("draft" in row["origins"] for row in guessed)


def test_the_report_counts_what_was_done(
    bmkit: Run, tiny: Path, asked: Path, tmp_path: Path
) -> None:
    done = bmkit(
        *("spec-decode", "-m", "tiny", "-d", "self", "-i", asked, "--json"),
        *("--max-new-tokens", "30", "--report", "r.json", "--plot", "p.svg", "--verify-exact"),
        *("-s", "draft_length=4", "-s", "adaptive=false"),
    )
    rows = objects(done)
    report = json.loads((tmp_path / "r.json").read_text())
    made = sum(len(row["token_ids"]) for row in rows)
    assert report["stage"] == "spec-decode"
    assert report["tokens"] == made
    assert report["peak_rss_bytes"] >= report["rss_before_bytes"] > 0
    per_forward = report["acceptance"]["per_forward"]
    assert sum(int(k) * v for k, v in per_forward.items()) == made - len(rows)
    assert sum(per_forward.values()) == report["target_forwards"]
    assert report["draft_forwards"] > 0
    assert report["mean_accepted_length"] > 1
    right = sum(s["accepted"] for s in report["acceptance"]["by_source"].values())
    assert right == sum(o != "target" for row in rows for o in row["origins"])
    exact = report["exact"]
    assert exact["rows"] == len(rows)
    assert exact["identical"] + exact["near_ties"] == len(rows)
    assert exact["mismatches"] == 0
    assert (tmp_path / "p.svg").read_text().startswith("<svg")
    assert "forwards of the target" in done.stderr


def test_rivals_answer_the_same_prompts(bmkit: Run, tiny: Path, rows: Rows, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "draft")
    names = ["greedy", "transformers", "assisted", "prompt-lookup", "lookahead"]
    done = bmkit(
        *("spec-decode", "-m", "tiny", "-d", "draft", "-i"),
        *(rows("two.jsonl", *({"prompt": p} for p in PROMPTS[:2])), "--max-new-tokens", "20"),
        *("--compare", ",".join(names), "--report", "r.json", "--json"),
    )
    assert len(objects(done)) == 2
    found = json.loads((tmp_path / "r.json").read_text())["compare"]
    assert list(found) == names
    for name in names:
        assert found[name]["identical"] is True, name
        assert found[name]["tokens_per_second"] > 0 and found[name]["ratio"] > 0
        alone = name in {"greedy", "transformers"}
        assert found[name]["tokens_per_forward"] == 1 or not alone, name
        assert name in done.stderr


def test_origins_colour_the_text_and_lose_none_of_it(bmkit: Run, tiny: Path) -> None:
    words = ("spec-decode", "-m", "tiny", "-p", PROMPTS[1], "-p", PROMPTS[3])
    words += ("--max-new-tokens", "40", "-s", "adaptive=false")
    plain, coloured = bmkit(*words), bmkit(*words, "--origins")
    assert plain.returncode == coloured.returncode == 0, coloured.stderr
    assert "\x1b[" in coloured.stdout
    import re

    assert re.sub(r"\x1b\[\d*m", "", coloured.stdout) == plain.stdout


def test_a_pool_is_made_read_and_added_to(
    bmkit: Run, tiny: Path, rows: Rows, tmp_path: Path
) -> None:
    corpus = rows(
        "c.jsonl",
        {"text": "abc abc abd"},
        {"prompt": "Hi", "completion": "Hello."},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    )
    made = bmkit("phrases", corpus, "-m", "tiny", "-o", "pool", "--json")
    (found,) = objects(made)
    assert (found["path"], found["kind"]) == ("pool", "phrases")
    before = pool_tokens(tmp_path / "pool")
    assert before.count(-1) == 3
    # The same text again changes nothing.
    (again,) = objects(bmkit("phrases", corpus, "-m", "tiny", "-o", "pool", "--json"))
    assert again["digest"] == found["digest"]
    assert bmkit("verify", "pool").returncode == 0
    asks = ("spec-decode", "-m", "tiny", "-p", "Hi", "--max-new-tokens", "60", "--json")
    asks += ("-s", "adaptive=false")  # what pays on a busy machine is another question
    (plain,) = objects(bmkit(*asks))
    (first,) = objects(bmkit(*asks, "--phrases", "pool"))
    after = pool_tokens(tmp_path / "pool")
    assert after[: len(before)] == before and len(after) > len(before)
    (second,) = objects(bmkit(*asks, "--phrases", "pool"))
    assert first["token_ids"] == second["token_ids"] == plain["token_ids"]
    assert second["origins"].count("history") > first["origins"].count("history")
    assert pool_tokens(tmp_path / "pool") == after
    # One that isn't there is made.
    assert bmkit(*asks, "--phrases", "new").returncode == 0
    assert bmkit("show", "new").stdout.startswith("kind     phrases")


def test_runs_that_share_a_pool_lose_nothing(
    start: Callable[..., subprocess.Popen[str]], tiny: Path, tmp_path: Path
) -> None:
    runs = [
        start("spec-decode", "-m", "tiny", "-p", f"row {i}", "--phrases", "pool", "-q")
        for i in range(3)
    ]
    for run in runs:
        _, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
    pieces = "".join(map(str, pool_tokens(tmp_path / "pool"))).count("-1")
    assert pieces == 3


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the command and return at once."""

    def run(*words: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "bmkit_cli", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=dict(os.environ),
        )

    return run


def test_stopping_keeps_what_was_said(
    start: Callable[..., subprocess.Popen[str]], bmkit: Run, tiny: Path, rows: Rows, tmp_path: Path
) -> None:
    many = rows("many.jsonl", *({"prompt": f"Say {i}."} for i in range(4000)))
    run = start("spec-decode", "-m", "tiny", "-i", many, "--json", "--phrases", "pool", "-q")
    assert run.stdout is not None
    for _ in range(3):
        assert run.stdout.readline().startswith("{")
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "Traceback" not in err
    assert bmkit("verify", "pool").returncode == 0
    assert pool_tokens(tmp_path / "pool").count(-1) >= 3


def test_a_pool_of_another_tokenizer_or_damaged_is_refused(
    bmkit: Run, tiny: Path, rows: Rows, tmp_path: Path
) -> None:
    corpus = rows("c.jsonl", {"text": "abc abc abd"})
    assert bmkit("phrases", corpus, "-m", "tiny", "-o", "pool").returncode == 0
    other = shutil.copytree(tiny, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    asks = ("spec-decode", "-p", "Hi", "--max-new-tokens", "4", "--phrases")
    refused(bmkit(*asks, "pool", "-m", "other"), 3, "another tokenizer")
    refused(bmkit(*asks, "tiny", "-m", "tiny"), 3, "not a phrase pool")
    file = tmp_path / "pool" / "phrases.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    before = file.read_bytes()
    refused(bmkit(*asks, "pool", "-m", "tiny"), 3, "phrases.safetensors")
    assert file.read_bytes() == before


def test_what_is_wrong_with_a_corpus_is_said_with_its_line(
    bmkit: Run, tiny: Path, rows: Rows, tmp_path: Path
) -> None:
    bad = rows("bad.jsonl", {"text": "a"}, {"txet": "b"})
    refused(bmkit("phrases", bad, "-m", "tiny", "-o", "pool"), 3, "bad.jsonl:2", "`text`")
    assert not (tmp_path / "pool").exists()
    (tmp_path / "empty.jsonl").write_text("")
    refused(bmkit("phrases", "empty.jsonl", "-m", "tiny", "-o", "pool"), 3, "no rows")
    refused(bmkit("phrases", "gone.jsonl", "-m", "tiny", "-o", "pool"), 3, "gone.jsonl")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-s", "draft_length=-1"], 2, "draft_length"),
        (["-s", "draft_length=64"], 2, "draft_length"),
        (["-s", "topk=-1"], 2, "topk"),
        (["-s", "window=99"], 2, "window"),
        (["-s", "phrase_length=0"], 2, "phrase_length"),
        (["--compare", "greedi"], 2, "greedy"),
        (["--compare", "assisted"], 2, "needs a draft"),
        (["-d", "nowhere"], 3, "nowhere"),
        (["-d", "tiny/config.json"], 3, "config.json"),
        (["-p", "x" * 600], 3, "the model reads 512"),
    ],
    ids=lambda value: " ".join(map(str, value))[:24] if isinstance(value, list) else "",
)
def test_bad_words_are_refused(
    bmkit: Run, tiny: Path, words: list[str], code: int, said: str
) -> None:
    prompt = [] if "-p" in words else ["-p", "Hi"]
    refused(bmkit("spec-decode", "-m", "tiny", *prompt, *words), code, said)


def test_a_static_cache_is_the_targets_and_the_drafts(bmkit: Run, tiny: Path, asked: Path) -> None:
    words = ("spec-decode", "-m", "tiny", "-i", asked, "--json", "--max-new-tokens", "24")
    words = (*words, "-s", "dtype=bfloat16", "-d", "self", "-s", "draft_quant=null")
    words = (*words, "-s", "adaptive=false", "-s", "draft_length=3", "--verify-exact")
    for cache in ("static", "dynamic"):
        done = bmkit(*words, "-s", f"cache={cache}", "--report", f"{cache}.json")
        assert any("draft" in row["origins"] for row in objects(done))
        report = json.loads((asked.parent / f"{cache}.json").read_text())
        assert report["cache"] == report["draft_cache"] == cache
        assert report["exact"]["mismatches"] == 0
    refused(bmkit(*words[:5], "-s", "cache=static"), 4, "leave it at auto")  # it is fused


def test_odd_but_possible_words_work(bmkit: Run, tiny: Path) -> None:
    asks = ("spec-decode", "-m", "tiny", "--json", "--max-new-tokens", "600", "-p", "x" * 470)
    (plain,) = objects(bmkit(*asks, "-s", "topk=0"))
    (absurd,) = objects(
        bmkit(
            *(*asks, "-d", "self", "-s", "draft_length=63", "-s", "topk=16"),
            *("-s", "phrase_length=63", "-s", "adaptive=false"),
        )
    )
    assert plain["token_ids"] == absurd["token_ids"]


def test_a_draft_larger_than_its_target_is_told(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    assert bmkit("compress", "int8", "-m", "tiny", "-o", "small").returncode == 0
    done = bmkit(
        *("spec-decode", "-m", "small", "-d", "tiny", "-p", "Hi", "--max-new-tokens", "4"),
        *("-s", "draft_quant=null"),
    )
    assert done.returncode == 0, done.stderr
    assert "larger than its target" in done.stderr


def test_a_streamed_target_answers_the_same(
    bmkit: Run, tiny: Path, asked: Path, tmp_path: Path
) -> None:
    words = ("spec-decode", "-m", "tiny", "-i", asked, "--json", "--max-new-tokens", "30")
    plain = objects(bmkit(*words))
    least = bmkit(*words, "--cpu-memory", "1KiB")
    assert least.returncode == 4
    size = least.stderr.rpartition("smallest")[2] or least.stderr
    import re

    found = re.search(r"([\d.]+ ?[KMG]iB)", size)
    assert found, least.stderr
    done = bmkit(*words, "--cpu-memory", found[1].replace(" ", ""), "--report", "r.json")
    assert [r["token_ids"] for r in objects(done)] == [r["token_ids"] for r in plain]
    report = json.loads((tmp_path / "r.json").read_text())
    used = report["peak_rss_bytes"] - report["rss_before_bytes"]
    assert used <= report["budget_bytes"]["cpu"]


def test_a_pipeline_may_end_with_it(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "- compress: int8\n  model: tiny\n"
        "- spec-decode: ouroboros\n  prompt: Hi\n  max_new_tokens: 5\n  draft: tiny\n"
        "  phrases: pool\n  set: {topk: 2}\n"
    )
    done = bmkit("run", "p.yaml", "--json")
    assert len(objects(done)[0]["token_ids"]) == 5
    assert (tmp_path / "pool" / "bmkit.json").is_file()


def test_plan_loads_nothing(bmkit: Run, tiny: Path) -> None:
    start = time.monotonic()
    done = bmkit("spec-decode", "-m", "tiny", "-d", "self", "--plan", "--json", "-p", "Hi")
    plan = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert any("draft" in step for step in plan["steps"])
    assert time.monotonic() - start < 60
