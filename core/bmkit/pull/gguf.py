"""Turn a GGUF file into a clean checkpoint: bf16 safetensors, tied weights once, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bmkit.errors import InputError, LibraryRefusal


def check_magic(file: Path) -> None:
    """Raise InputError unless `file` starts as a GGUF file does."""
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
    except OSError as exc:
        raise InputError(f"{file} cannot be read: {exc.strerror}") from None
    if start != b"GGUF":
        raise InputError(f"{file} is not a GGUF file", hint="was it downloaded whole?")


def convert(file: Path, out: Path, *, chat_template: str | None = None) -> int:
    """Write the model in `file` into directory `out`, and return its number of parameters.

    transformers dequantises the tensors; the result is rounded to bfloat16, since a 4- or 8-bit
    weight needs no more. A model read from GGUF refuses `save_pretrained`, so its weights move
    into a fresh one. Peak memory: the model in bfloat16 twice. Raises InputError for a file that
    is damaged or of an architecture that transformers can't read.
    """
    check_magic(file)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    folder = str(file.absolute().parent)
    hint = "the file may be cut off, or of an architecture that transformers doesn't read"
    with LibraryRefusal(f"{file} can't be converted", hint):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    config = loaded.config
    for name in ("quantization_config", "_name_or_path"):
        if name in vars(config):
            delattr(config, name)
    config.architectures = [type(loaded).__name__]
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), strict=False, assign=True)
    model.tie_weights()
    left = [n for n, p in model.named_parameters() if p.is_meta]
    if left:
        raise InputError(f"{file} lacks {len(left)} tensors, as {left[0]}")
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(out)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if (limit := getattr(config, "max_position_embeddings", None)) is not None:
        tokenizer.model_max_length = limit
    tokenizer.save_pretrained(out)
    return int(sum(p.numel() for p in model.parameters()))
