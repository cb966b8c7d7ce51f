"""The wheel, as a user gets it: built, installed into a fresh environment, run from `/`."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_works_without_the_checkout(tiny: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    wheel = next(tmp_path.glob("bmkit-*.whl"))
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    # Dependencies come from this environment; its editable bmkit does not, since a plain line in a
    # .pth file adds the folder without reading the .pth files in it.
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def fresh(*words: object) -> str:
        done = subprocess.run(
            [venv / "bin" / "bmkit", *map(str, words)],
            cwd="/",
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [python, "-c", "import bmkit; print(bmkit.__file__)"],
        check=True,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert str(venv) in where.stdout
    assert "compress/int8" in fresh("ls") and "tune/lora" in fresh("ls")
    assert fresh("compress", "int8", "-m", tiny, "-o", tmp_path / "a").strip() == str(
        tmp_path / "a"
    )
    assert "instructions-train" in fresh("tune", "lora", "-m", tmp_path / "a", "--plan")
