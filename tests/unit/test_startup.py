"""What a command loads before there is work to do: told by its modules, never by the clock."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "peft", "numpy", "safetensors", "accelerate", "tokenizers"}
HEAVY |= {"compressed_tensors", "huggingface_hub", "gguf"}
MIDDLE = {"rich", "yaml", "pydantic"}

DRIVER = """
import atexit, sys
path = sys.argv.pop(1)
atexit.register(lambda: open(path, "w").write("\\n".join(sys.modules)))
from bmkit_cli.main import main
sys.argv[0] = "bmkit"
main()
"""

Loads = Callable[..., tuple[int, str, set[str]]]


@pytest.fixture
def loads(tmp_path: Path) -> Loads:
    """Run a command; return its exit code, its stdout and the packages that it has loaded."""

    def run(*arguments: object, stdin: str = "") -> tuple[int, str, set[str]]:
        listing = tmp_path / "modules"
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(listing), *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=dict(os.environ),
            timeout=120,
        )
        modules = listing.read_text().splitlines()
        assert "bmkit_cli.main" in modules, done.stderr
        return done.returncode, done.stdout, {name.partition(".")[0] for name in modules}

    return run


def test_the_check_sees_a_module_that_is_loaded(loads: Loads) -> None:
    code, _, packages = loads("validate", "int8")
    assert code == 0
    assert {"yaml", "pydantic"} <= packages


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"]], ids=" ".join)
def test_help_and_version_load_next_to_nothing(loads: Loads, arguments: list[str]) -> None:
    code, out, packages = loads(*arguments)
    assert (code, bool(out)) == (0, True)
    assert packages & (HEAVY | MIDDLE) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "--help"],
        ["tune", "--help"],
        ["infer", "--help"],
        ["pull", "--help"],
        ["ls"],
        ["ls", "--json"],
        ["show", "lora"],
        ["schema", "tune"],
        ["schema", "prompt"],
        ["prompt", "--help"],
        ["import", "--help"],
        ["validate", "sentiment"],
        ["validate", "int8"],
        ["validate", "lora", "-s", "train.max_steps=3"],
        ["validate", "quickstart"],
        ["run", "quickstart", "--plan"],
        ["cache", "ls"],
    ],
    ids=" ".join,
)
def test_looking_something_up_loads_nothing_heavy(loads: Loads, arguments: list[str]) -> None:
    code, out, packages = loads(*arguments)
    assert (code, bool(out)) == (0, True)
    assert packages & HEAVY == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "int8"],
        ["tune", "lora"],
        ["prompt", "sentiment"],
        ["infer", "greedy"],
        ["compress", "int8", "--json"],
        ["infer", "greedy", "-p", "Hello"],
    ],
    ids=" ".join,
)
def test_a_plan_loads_nothing_heavy(loads: Loads, arguments: list[str], tiny: Path) -> None:
    code, out, packages = loads(*arguments, "-m", tiny, "--plan")
    assert (code, bool(out)) == (0, True)
    measured = {"numpy"} if arguments[0] == "infer" else set()  # tokens a second of this machine
    assert packages & HEAVY == measured


def test_a_reused_result_loads_nothing_heavy(loads: Loads, tiny: Path) -> None:
    first = loads("compress", "int8", "-m", tiny, "-o", "out", "-q")
    assert "torch" in first[2]
    again = loads("compress", "int8", "-m", tiny, "-o", "out", "-q")
    assert (again[0], again[1]) == (0, "out\n")
    assert again[2] & HEAVY == set()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["compress", "int9", "-m", "x"], 2),
        (["compress", "int8", "-m", "x", "-s", "sead=1"], 2),
        (["compress", "int8", "-m", "nothing-there"], 3),
        (["tune", "lora", "-m", "-"], 3),
        (["infer", "-m", "-", "-p", "Hello"], 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_and_a_wait_for_stdin_load_nothing_heavy(
    loads: Loads, arguments: list[str], code: int
) -> None:
    found, out, packages = loads(*arguments)
    assert (found, out) == (code, "")
    assert packages & HEAVY == set()
