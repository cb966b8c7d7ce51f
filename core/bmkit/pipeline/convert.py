"""Recipes out of what other programs have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bmkit import recipe as recipes
from bmkit import registry
from bmkit.errors import InputError
from bmkit.pipeline.chain import to_yaml
from bmkit.prompting.imported import convert


def openprompt(file: Path) -> tuple[dict[str, Any], str, list[str]]:
    """Return the recipe of an experiment of OpenPrompt, it as YAML, and what is left out of it.

    The notes also say what keeps the recipe from running as it is. Raises InputError for a file
    that is no experiment, RecipeError for one that is no YAML.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"there is no file {file}") from None
    except IsADirectoryError:
        raise InputError(f"{file} is a folder", hint="name one of its files") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not a text file") from None
    found = recipes.parse(text, str(file))
    if not isinstance(found.data, dict):
        raise InputError(f"{file} is no experiment of OpenPrompt: it is no mapping")
    recipe, notes = convert(found.data)
    written = to_yaml(recipe)
    notes = [*dict.fromkeys(found.problems), *notes]
    doc = recipes.parse(written, "the recipe", folder=file.absolute().parent)
    problems, _ = recipes.look_at(doc, registry.load(registry.STAGES["prompt"].recipe))
    if problems:
        notes.append(recipes.refused(doc, problems))
    return recipe, f"# Made from {file.name}, of OpenPrompt.\n{written}", notes
