"""The CUDA paths, against the CPU's. Run where there is a GPU: scripts/test tests/gpu."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch

Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_compress_on_the_gpu_writes_the_cpus_bytes(bmkit: Run, tiny: Path, recipe: str) -> None:
    digests = [
        json.loads(
            bmkit("compress", recipe, "-m", "tiny", "-o", d, "--device", d, "--json").stdout
        )["digest"]
        for d in ("cpu", "cuda")
    ]
    assert digests[0] == digests[1]


def test_greedy_float32_answers_are_the_cpus(
    bmkit: Run, tiny: Path, rows: Callable[..., Path]
) -> None:
    file = rows("p.jsonl", *({"prompt": p} for p in ("Hi", "Tell me a story.", "1 2 3")))
    words = ("infer", "-m", "tiny", "-i", file, "--json", "--max-new-tokens", "12")
    found = [
        [json.loads(x)["token_ids"] for x in bmkit(*words, "--device", d, *f32).stdout.splitlines()]
        for f32 in [("-s", "dtype=float32")]
        for d in ("cpu", "cuda")
    ]
    assert found[0] == found[1]


def test_seeded_draws_on_the_gpu_repeat(bmkit: Run, tiny: Path) -> None:
    words = ("infer", "sample", "-m", "tiny", "-p", "Hi", "--json", "--device", "cuda")
    found = [json.loads(bmkit(*words, "--seed", s).stdout)["token_ids"] for s in ("3", "3", "4")]
    assert found[0] == found[1] != found[2]


def test_the_report_holds_the_gpus_peak(bmkit: Run, tiny: Path, tmp_path: Path) -> None:
    words = ("infer", "-m", "tiny", "-p", "Hi", "--device", "cuda", "--report", "r.json")
    assert bmkit(*words).returncode == 0
    assert json.loads((tmp_path / "r.json").read_text())["peak_gpu_bytes"] > 0


def test_tuning_on_the_gpu_learns_and_its_delta_answers_on_the_cpu(
    bmkit: Run, tiny: Path, chats: Path
) -> None:
    done = bmkit(
        *("tune", "lora", "-m", "tiny", "--data", chats, "-o", "d", "--device", "cuda", "--json"),
        *("-s", "data.dev=chats.jsonl", "-s", "train.max_steps=30"),
        *("-s", "train.learning_rate=0.01"),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)["metrics"]
    assert metrics["dev_loss"] < metrics["dev_loss_before"]
    answer = bmkit("infer", "-m", "d", "-p", "Say 1.", "--device", "cpu", "--max-new-tokens", "4")
    assert answer.returncode == 0, answer.stderr


PLACED = ("infer", "-p", "Hi", "-p", "Tell me a story.", "--json", "--max-new-tokens", "12")


@pytest.fixture
def wide(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with 800 MB of layers."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    path = tmp_path / "wide"
    shutil.copytree(tiny_checkpoint, path)
    config = AutoConfig.from_pretrained(path)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 2048, 5632, 8
    config.head_dim, config.initializer_range = 512, 0.05
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def tokens(done: subprocess.CompletedProcess[str]) -> list[list[int]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["token_ids"] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ram", [False, True])
def test_streamed_weights_give_the_resident_models_tokens_in_the_budget(
    bmkit: Run, wide: Path, tmp_path: Path, dtype: str, ram: bool
) -> None:
    words = (*PLACED, "-m", wide, "--device", "cuda", "-s", f"dtype={dtype}")
    limits = {"--gpu-memory": "50MiB"} | ({"--cpu-memory": "1MiB"} if ram else {})
    tight = bmkit(*words, *chain(*limits.items()))
    assert tight.returncode == 4
    for _ in limits:  # each refusal says the smallest of one
        told = re.search(r"the smallest that works is (--\w+-memory) (\w+)", tight.stderr)
        assert told is not None, tight.stderr
        limits[told[1]] = told[2]
        tight = bmkit(*words, *chain(*limits.items()), "--report", "r.json")
    assert tokens(tight) == tokens(bmkit(*words))
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["peak_gpu_bytes"] <= report["budget_bytes"]["gpu"]
    if ram:
        taken = report["peak_rss_bytes"] - report["rss_before_bytes"]
        assert taken <= report["budget_bytes"]["cpu"]


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantised_float32_on_the_gpu_is_the_cpus(bmkit: Run, tiny: Path, quant: str) -> None:
    words = (*PLACED, "-m", "tiny", "--quant", quant, "-s", "dtype=float32")
    assert tokens(bmkit(*words, "--device", "cuda")) == tokens(bmkit(*words, "--device", "cpu"))


def test_w8a8_scores_near_the_dense_model(bmkit: Run, wide: Path) -> None:
    words = ("infer", "-m", wide, "--score", "-p", "A text to score, of a few words.", "--json")
    dense, rounded = (
        json.loads(bmkit(*words, "--device", "cuda", *more).stdout)["logprob"]
        for more in ((), ("--quant", "w8a8"))
    )
    assert abs(dense - rounded) < 0.05 * abs(dense)


def test_a_static_cache_gives_the_dynamic_ones_tokens(bmkit: Run, tiny: Path) -> None:
    words = (*PLACED, "-m", "tiny", "--device", "cuda", "-s", "dtype=float32")
    found = [tokens(bmkit(*words, "-s", f"cache={c}")) for c in ("dynamic", "static")]
    assert found[0] == found[1]


def test_tuning_on_a_streamed_base_is_the_same_training(
    bmkit: Run, wide: Path, chats: Path, tmp_path: Path
) -> None:
    words = ("tune", "lora", "-m", wide, "--data", chats, "--device", "cuda", "--json")
    words = (*words, "-s", "train.max_steps=4", "-s", "dtype=float32")
    free = json.loads(bmkit(*words, "-o", "a").stdout)["metrics"]["train_loss"]
    tight = bmkit(*words, "-o", "b", "--gpu-memory", "3GiB", "--report", "r.json")
    assert tight.returncode == 0, tight.stderr
    assert 0 < json.loads((tmp_path / "r.json").read_text())["peak_gpu_bytes"] <= 3 * 2**30
    found = json.loads(tight.stdout)["metrics"]["train_loss"]
    assert abs(found - free) < 1e-3 * free


OWN = ("-d", "self", "-s", "draft_quant=null")


@pytest.mark.parametrize(
    "draft", [(), ("-d", "self"), OWN, (*OWN, "-s", "window=4"), ("-s", "cache=dynamic")]
)
def test_guessed_answers_on_the_gpu_are_the_targets_own(
    bmkit: Run, wide: Path, tmp_path: Path, draft: tuple[str, ...]
) -> None:
    words = ("-m", wide, "-p", "Hi", "-p", "1 2 3 1 2 3 1 2", "--json", "--max-new-tokens", "400")
    words = (*words, "--device", "cuda", "-s", "dtype=float32")
    guessed = bmkit("spec-decode", *words, *draft, "-s", "adaptive=false", "--report", "r.json")
    assert tokens(guessed) == tokens(bmkit("infer", *words))
    report = json.loads((tmp_path / "r.json").read_text())
    dynamic = "cache=dynamic" in draft
    assert report["cache"] == ("dynamic" if dynamic else "static")
    if "draft_quant=null" in draft:
        assert report["draft_cache"] == "static"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_graphs_on_the_second_gpu(bmkit: Run, wide: Path) -> None:
    words = ("-m", wide, "-p", "1 2 3 1 2 3 1 2", "--json", "--max-new-tokens", "40")
    words = (*words, "-s", "dtype=float32")
    guessed = bmkit("spec-decode", *words, "--device", "cuda:1", "-s", "adaptive=false")
    assert tokens(guessed) == tokens(bmkit("infer", *words, "--device", "cuda:0"))


def test_what_waits_for_the_device_is_not_recorded() -> None:
    from bmkit.runtime.speculation.static import Graphs

    graphs = Graphs(torch.device("cuda"))
    x = torch.zeros(4, device="cuda")
    assert graphs(lambda: x.add_(1)) is not None and graphs.works
    again = graphs(lambda: x.fill_(float(x.sum())))
    assert not graphs.works
    x.fill_(1)
    again()
    assert x.tolist() == [4.0] * 4
    assert torch.cuda.current_stream() != graphs.stream


def test_forwards_of_a_few_sizes_are_graphs(tiny_checkpoint: Path) -> None:
    """A graph that is replayed reads what was sent last, and gives what the model's code gives."""
    from transformers import AutoModelForCausalLM

    from bmkit.runtime.speculation.static import StaticTarget
    from bmkit.runtime.speculation.targets import ModelTarget
    from bmkit.runtime.speculation.tree import Tree

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).cuda()
    static, plain = StaticTarget(model, 2), ModelTarget(model)
    assert static.check()
    captured = torch.cuda.CUDAGraph.replay
    replayed: list[int] = []
    try:
        torch.cuda.CUDAGraph.replay = lambda own: (replayed.append(1), captured(own))[1]
        for one in (static, plain):
            one.begin(0, [5, 6, 7], slots=40, adapter=None)
        for count in (1, 4, 4, 3, 7, 7):
            tree = Tree.of(9)
            tree.add([10] * (count - 1), "", [1.0] * (count - 1))
            read = [one.forward({0: tree})[0].cpu() for one in (static, plain)]
            assert torch.allclose(*read, atol=1e-3)
            for one in (static, plain):
                one.keep(0, [0])
    finally:
        torch.cuda.CUDAGraph.replay = captured
    assert len(replayed) == 6
