"""LoRA that begins with what rounding took: the best there is of its rank, on any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from bmkit.errors import InputError
from bmkit.report import Silent
from bmkit.tune.lost import begin_with_lost

Build = Callable[..., Any]
RANK = 3


@pytest.fixture(params=["llama", "gpt2"])
def pair(request: Any, architecture: Build, tmp_path: Path) -> tuple[Any, Path, dict[str, Any]]:
    """Return a LoRA on a rounded model, the original's folder, and its weights."""
    model = architecture(request.param, real=True)
    model.save_pretrained(tmp_path / "original")
    targets = ["q_proj", "down_proj"] if request.param == "llama" else ["c_attn", "c_proj"]
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(t in name for t in targets):
                step = parameter.abs().max() / 4
                parameter.copy_((parameter / step).round() * step)
    config = LoraConfig(
        r=RANK, lora_alpha=5, target_modules=targets, fan_in_fan_out=request.param == "gpt2"
    )
    return get_peft_model(model, config), tmp_path / "original", kept


def test_no_matrices_of_the_rank_leave_less(pair: tuple[Any, Path, dict[str, Any]]) -> None:
    model, original, kept = pair
    left = begin_with_lost(model, "default", original, Silent())
    lost = best = 0.0
    layers = 0
    for path, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layers += 1
        name = path.removeprefix("base_model.model.") + ".weight"
        own = module.get_base_layer().weight.detach()
        gone = (kept[name] - own).double().numpy()
        values = np.linalg.svd(gone, compute_uv=False)
        now = (kept[name] - own - module.get_delta_weight("default").detach()).double().numpy()
        assert np.linalg.norm(now) ** 2 == pytest.approx((values[RANK:] ** 2).sum(), rel=1e-3)
        lost += float((values**2).sum())
        best += float((values[RANK:] ** 2).sum())
    assert layers >= 4
    assert left == pytest.approx(best / lost, rel=1e-3)


def test_a_model_of_other_layers_or_with_nothing_lost_is_refused(
    pair: tuple[Any, Path, dict[str, Any]], architecture: Build, tmp_path: Path
) -> None:
    model, original, kept = pair
    architecture("bert", real=True).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="has no "):
        begin_with_lost(model, "default", tmp_path / "bert", Silent())
    with torch.no_grad():
        for name, parameter in model.base_model.model.named_parameters():
            if (bare := name.replace("base_layer.", "")) in kept:
                parameter.copy_(kept[bare])
    with pytest.raises(InputError, match="nothing was lost"):
        begin_with_lost(model, "default", original, Silent())
