"""`dtype: quickest`: settled by machine, model and what is trained, before there is a key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bmkit import env
from bmkit.pipeline import stage
from bmkit.pipeline.stage import Prepared, Request
from bmkit.report import Silent

LORA = [{"type": "lora"}]


@pytest.fixture
def prepared(
    tiny: Path, rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Prepared]:
    def prepare(amx: bool = True, stored: str = "bfloat16", **keys: Any) -> Prepared:
        monkeypatch.setattr(env, "has_amx", lambda: amx)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        config = json.loads((tiny / "config.json").read_text())
        (tiny / "config.json").write_text(json.dumps({**config, "dtype": stored}))
        row = keys.pop("row", {"text": "a b c"})
        values = {"dtype": "quickest", "deltas": LORA, "seed": 1, **keys}
        assign = tuple(f"{key}={json.dumps(value)}" for key, value in values.items())
        data = rows("rows.jsonl", row)
        request = Request(stage="tune", recipe="lora", model=str(tiny), data=data, assign=assign)
        return stage.prepare(request, Silent())

    return prepare


def test_it_is_bfloat16_with_amx_and_the_key_says_so(prepared: Callable[..., Prepared]) -> None:
    quick, careful = prepared(), prepared(amx=False)
    assert (quick.recipe.dtype, careful.recipe.dtype) == ("bfloat16", "auto")
    assert quick.key == prepared(dtype="bfloat16").key
    assert careful.key == prepared(dtype="auto").key != quick.key


@pytest.mark.parametrize(
    "how",
    [
        {"stored": "float32"},
        {"stored": "float16"},
        {"device": "cuda"},
        {"deltas": [], "unfreeze": ["all"], "merge": True},
        {"unfreeze": ["model.norm"]},
        {"row": {"text": "a", "label": "b"}},
    ],
)
def test_it_is_auto_where_bfloat16_is_not_quicker_or_rounds_steps_away(
    prepared: Callable[..., Prepared], how: dict[str, Any]
) -> None:
    assert prepared(**how).recipe.dtype == "auto"


def test_this_processor_is_asked_as_torch_does() -> None:
    import torch

    env.has_amx.cache_clear()
    found = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if found is None:
        pytest.skip("this torch can't tell")
    assert env.has_amx() == found()
