"""From an opened model to a target: a place for each prompt, and tokens that can be taken back."""

from __future__ import annotations

from bmkit.runtime.opening import Engine
from bmkit.runtime.speculation import calibrate
from bmkit.runtime.speculation.static import StaticTarget, suits
from bmkit.runtime.speculation.targets import DecoderTarget, ModelTarget, Target


def target_of(engine: Engine, name: str, cache: str) -> Target:
    """Return what verifies: the fused decoder, or any model that can take guesses back.

    `name` says which model, dtype and device: whether it takes masks is remembered by it; `cache`
    is the recipe's.
    """
    if engine.decoder is not None:
        return DecoderTarget(engine.decoder, engine.rows, engine.most_tokens)
    fixed = cache == "static" or (cache == "auto" and engine.device.type == "cuda")
    if fixed and may_be_static(engine):
        static = StaticTarget(engine.model, engine.rows)
        if calibrate.reads_trees(static, f"{name} static"):
            return static
    found = ModelTarget(engine.model, chunk=engine.chunk)
    if not found.encoder_decoder:
        calibrate.reads_trees(found, name)
    return found


def may_be_static(engine: Engine) -> bool:
    """Tell whether a cache of a fixed size can be had."""
    return engine.decoder is None and engine.placed is None and suits(engine.model)
