"""What tests share: a BMKIT_HOME of their own, a tiny model made on the spot, the real SmolLM2."""

from __future__ import annotations

import array
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Properties meet the same examples in every run; `--hypothesis-profile explore` draws new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("same")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["BMKIT_LEAST_WORK"] = "0"  # tiny models multiply as large ones do
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the command does
# Each test has a BMKIT_HOME of its own, and would compile the kernels again.
KERNELS = Path(os.environ.get("BMKIT_TEST_HOME") or tempfile.gettempdir()) / "bmkit-test-kernels"
os.environ["NUMBA_CACHE_DIR"] = str(KERNELS)

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A BMKIT_HOME of the test's own.

    Commands run on the CPU, apart from those of tests marked `gpu`. With BMKIT_TEST_GPU, all take a
    GPU where there is one: most tests pass there too, not those about the CPU's memory and bits.
    """
    path = tmp_path / "bmkit-home"
    if "gpu" not in request.keywords and not os.environ.get("BMKIT_TEST_GPU"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("BMKIT_HOME", str(path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(KERNELS))
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 32 dimensions and 2 layers, stored in bfloat16, with a byte tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHATML
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=2,
            bos_token_id=None,
            pad_token_id=0,
            initializer_range=0.5,  # large enough that its answers vary
        )
    )
    model.to(torch.bfloat16).save_pretrained(path)
    fast.save_pretrained(path)
    return path


@pytest.fixture
def tiny(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, the test's own to damage: `tmp_path/tiny`."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


@pytest.fixture
def fresh(tmp_path: Path) -> Run:
    """Run the command in a process of its own, in `tmp_path`; stdin is empty unless given."""

    def run(*arguments: object, stdin: str = "", timeout: float = 300, **env: str) -> Done:
        return subprocess.run(
            [sys.executable, "-m", "bmkit_cli", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **env},
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The socket of a process that forks commands: see `zygote.py`."""
    folder = tempfile.mkdtemp(prefix="bmkit-zygote-")  # a socket's path has to be short
    path = f"{folder}/socket"
    process = subprocess.Popen([sys.executable, str(Path(__file__).parent / "zygote.py"), path])
    end = time.monotonic() + 120
    while not os.path.exists(path):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    yield path
    process.kill()
    process.wait()
    shutil.rmtree(folder)


@pytest.fixture
def bmkit(tmp_path: Path, zygote: str) -> Run:
    """Run the command in `tmp_path`, as `fresh` does, in a process that has its imports already."""

    def run(*arguments: object, stdin: str = "", timeout: float = 300, **env: str) -> Done:
        words = list(map(str, arguments))
        request = {
            "arguments": words,
            "folder": str(tmp_path),
            "environment": {**os.environ, **env},
        }
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
            socket.socket(socket.AF_UNIX) as connection,
        ):
            given.write(stdin.encode("utf-8", "surrogateescape"))
            given.seek(0)
            connection.settimeout(timeout)
            connection.connect(zygote)
            handles = array.array("i", [f.fileno() for f in (given, out, err)])
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, handles)
            text = json.dumps(request).encode() + b"\n"
            sent = connection.sendmsg([text], [rights])
            connection.sendall(text[sent:])
            code = int(connection.makefile().readline())
            out.seek(0)
            err.seek(0)
            return Done(words, code, out.read().decode(), err.read().decode())

    return run


@pytest.fixture
def sh(tmp_path: Path) -> Callable[[str], Done]:
    """Run a shell script in `tmp_path`, with `bmkit` on PATH and pipefail set."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "bmkit").write_text(f'#!/bin/sh\nexec {sys.executable} -m bmkit_cli "$@"\n')
    (folder / "bmkit").chmod(0o755)

    def run(script: str, timeout: float = 600) -> Done:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BMKIT_HOME with SmolLM2-135M pulled; BMKIT_TEST_HOME keeps it from run to run."""
    kept = os.environ.get("BMKIT_TEST_HOME")
    path = Path(kept) if kept else tmp_path_factory.mktemp("smollm2-home")
    done = subprocess.run(
        [sys.executable, "-m", "bmkit_cli", "pull", "smollm2-135m"],
        capture_output=True,
        text=True,
        env={**os.environ, "BMKIT_HOME": str(path)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def smollm2(pulled: Path, home: Path) -> Path:
    """SmolLM2-135M as pulled, known by its name in the test's own BMKIT_HOME."""
    source = next((pulled / "models").glob("smollm2-135m-*"))
    (home / "models").mkdir(parents=True)
    return Path(shutil.copytree(source, home / "models" / source.name, copy_function=os.link))


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Write JSON lines to a file in `tmp_path`."""

    def write(name: str, *values: object) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def chats(rows: Callable[..., Path]) -> Path:
    """Forty short prompts with completions: `tmp_path/chats.jsonl`."""
    return rows(
        "chats.jsonl",
        *({"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(40)),
    )


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """A check that no half artifact, scratch directory or partial file lies about."""

    def check() -> None:
        left = [p for p in tmp_path.rglob(".*") if p.suffix in {".partial", ".replaced"}]
        assert not left, left

    return_value = check
    yield return_value
