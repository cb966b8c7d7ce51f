"""A recipe's template, however it is written. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmkit.prompting import template as language
from bmkit.prompting.chat import Chat, parse_chat
from bmkit.prompting.jinja import Jinja, from_jinja
from bmkit.prompting.template import Template

WAYS = ("text", "file_path", "jinja", "chat")
"""The keys of a recipe's `template` that hold one."""

Written = Template | Jinja | Chat


def parse(spec: Mapping[str, Any], where: str = "template") -> Written:
    """Read a template of `text`, `jinja` or `chat`. Raises RecipeError, also if it has no mask."""
    if spec.get("chat") is not None:
        return parse_chat(spec["chat"], where).require_mask()
    if spec.get("jinja") is not None:
        return from_jinja(spec["jinja"], where).require_mask()
    return language.parse(spec["text"], where).require_mask()


def written(spec: Mapping[str, Any], file: Path | None) -> dict[str, Any]:
    """Return what an artifact keeps of a recipe's template: `text`, `jinja` or `chat`.

    Of several it is the first. Raises RecipeError for what is wrong in `file`.
    """
    return every(spec, file)[0]


def every(spec: Mapping[str, Any], file: Path | None) -> list[dict[str, Any]]:
    """Return the same of all templates of a recipe: `choice: all` are those of a file."""
    if file is None:
        return [{way: spec[way] for way in WAYS if spec.get(way) is not None}]
    if spec["choice"] == "all":
        found = language.read_all(file)
    else:
        found = [language.read_file(file, int(spec["choice"]))]
    return [{"text": language.to_text(one.require_mask())} for one in found]


def for_tokenizer(found: Written, tokenizer: Any) -> Template | Jinja:
    """Return the template to wrap rows with. Raises RecipeError for a chat that can't be had."""
    return found.template(tokenizer) if isinstance(found, Chat) else found
