"""Find a recipe: a file, a built-in name, or stdin."""

from __future__ import annotations

import sys
from pathlib import Path

from bmkit.errors import InputError, RecipeError, did_you_mean

_PACKAGED = Path(__file__).parent / "configs"  # in an installed wheel
_CHECKOUT = Path(__file__).parents[2] / "configs"  # in a git checkout


def directory() -> Path:
    """Return the folder of built-in recipes and data."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def names(stage: str) -> list[str]:
    """Return the built-in recipes of `stage` (`pipelines` for pipelines), sorted."""
    return sorted(p.stem for p in (directory() / stage).glob("*.yaml"))


def stages() -> list[str]:
    """Return the stages that have built-in recipes, sorted."""
    return sorted(p.name for p in directory().iterdir() if p.is_dir() and names(p.name))


def first_line(stage: str, name: str) -> str:
    """Return what a built-in recipe says about itself: its first comment."""
    with (directory() / stage / f"{name}.yaml").open(encoding="utf-8") as lines:
        return lines.readline().lstrip("# ").strip()


def read(stage: str, name: str) -> tuple[str, str, str, Path]:
    """Return the text of recipe `name`, what to call it in errors, its short name, its folder.

    Raises RecipeError if there is no such recipe, InputError if the file can't be read.
    """
    if name == "-":
        return sys.stdin.read(), "<stdin>", "stdin", Path.cwd()
    path = Path(name)
    if path.is_file():
        return _text(path), str(path), path.stem, path.absolute().parent
    known = names(stage)
    if name in known:
        path = directory() / stage / f"{name}.yaml"
        return _text(path), f"{stage}/{name}.yaml", name, path.parent
    if path.suffix in {".yaml", ".yml"} or "/" in name:
        raise InputError(f"no recipe file `{name}`", hint=_hint(name, known, stage))
    raise RecipeError(
        f"no file and no built-in {stage} recipe is called `{name}`",
        hint=_hint(name, known, stage),
    )


def _hint(name: str, known: list[str], stage: str) -> str:
    listing = f"built in: {', '.join(known)}" if known else f"there is no built-in {stage} recipe"
    return did_you_mean(Path(name).stem, known) or listing


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file", hint="a recipe is YAML in UTF-8") from None
    except OSError as exc:
        raise InputError(f"{path} cannot be read: {exc.strerror}") from None
