"""What `bmkit doctor` finds."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from bmkit_cli import checkup


@pytest.mark.parametrize("name", checkup.EXTRAS)
def test_optional_packages_are_listed_with_their_version_or_how_to_get_them(name: str) -> None:
    said = dict(checkup.flat(checkup.look()))[name]
    try:
        assert said == version(name)
    except PackageNotFoundError:
        assert f"bmkit[{checkup.EXTRAS[name]}]" in said


def test_each_is_in_the_extra_that_is_named() -> None:
    file = Path(__file__).parents[2] / "pyproject.toml"
    wanted = tomllib.loads(file.read_text())["project"]["optional-dependencies"]
    for name, extra in checkup.EXTRAS.items():
        assert any(one.startswith(name) for one in wanted[extra])
