"""What a plan of tuning refuses: all that can be known without the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from bmkit import place
from bmkit.deltas.recipe import NON_LINEARITIES
from bmkit.errors import BmkitError, InputError, RecipeError, UsageError
from bmkit.pipeline import stage
from bmkit.report import Silent

SAY = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(4)]
TELL = [{"text": f"{i}", "label": "ab"[i % 2]} for i in range(4)]
PAIRS = [{"prompt": f"{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]


def plan(model: Path, folder: Path, rows: list[dict[str, Any]], *assign: str, **more: Any) -> None:
    for name in ("train", "dev"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    more = {"recipe": "lora", **more}
    request = stage.Request("tune", model=str(model), data=str(folder), assign=assign, **more)
    stage.estimate(stage.prepare(request, Silent()), Silent())


BEST = "train.load_best_model_at_end=true"
BUDGET = {"cpu_memory": "8GiB", "device": "cpu"}


@pytest.mark.parametrize(
    ("rows", "assign", "more", "said"),
    [
        (SAY, [BEST, "train.metric_for_best_model=dev_f1"], {}, "`dev_f1` isn't measured"),
        (PAIRS, [BEST, "train.metric_for_best_model=dev_f1"], {}, "`dev_f1` isn't measured"),
        (SAY, ["gates.dev_accuracy={min: 0.5}"], {}, "`dev_accuracy` isn't measured"),
        (TELL, ["data.packing=true"], {}, "packed"),
        (PAIRS, ["data.packing=true"], {}, "packed"),
        (SAY, ["unfreeze=[norm]"], BUDGET, "unfreeze"),
        (SAY, ["deltas.0.use_dora=true"], BUDGET, "reads the model's weights"),
        (SAY, [], {"recipe": "oft", **BUDGET}, "reads the model's weights"),
        (TELL, [], BUDGET, "needs a head"),
        (SAY, ["unfreeze=[model.norm]"], {"recipe": "layer_norm"}, "model.norm is trained twice"),
        (SAY, ["unfreeze=[q_proj]"], {}, "q_proj is trained twice"),
        (SAY, ["task=masked_lm"], {"recipe": "prompt"}, "masked_lm"),
        (SAY, ["unfreeze=[nosuch]"], {}, "^unfreeze: no module"),
        (SAY, [], {"device": "cudda"}, "`cudda` is not a device"),
        (SAY, ["deltas.0.non_linearity=gelo"], {"recipe": "adapter"}, "did you mean `gelu`"),
    ],
)
def test_what_can_not_work_is_told_by_the_plan(
    tiny: Path, tmp_path: Path, rows: Any, assign: list[str], more: Any, said: str
) -> None:
    plan(tiny, tmp_path, rows)
    with pytest.raises(RecipeError, match=said):
        plan(tiny, tmp_path, rows, *assign, **more)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*SAY, {"prompt": "x"}], "train.jsonl:5"),
        ([*SAY, {"messages": [{"role": "user", "content": "x"}]}], "assistant"),
        ([*PAIRS, {"prompt": "x", "chosen": "y"}], "rejected"),
        ([], "holds no rows"),
    ],
)
def test_rows_that_can_not_be_used_are_told_by_the_plan(
    tiny: Path, tmp_path: Path, rows: Any, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        plan(tiny, tmp_path, rows)


def test_what_the_task_measures_may_be_asked_for(tiny: Path, tmp_path: Path) -> None:
    gate = "gates.dev_accuracy_before={min: 0}"
    plan(tiny, tmp_path, TELL, BEST, "train.metric_for_best_model=dev_f1", gate)
    plan(tiny, tmp_path, PAIRS, BEST, "train.metric_for_best_model=dev_accuracy", gate)
    with pytest.raises(BmkitError):
        plan(tiny, tmp_path, SAY, gate)


def test_activations_are_those_of_transformers() -> None:
    assert set(NON_LINEARITIES) <= set(ACT2FN)


class Heard(Silent):
    """Keeps what it is warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.mark.parametrize(
    ("delta", "said"),
    [
        ("{type: vera, r: 33}", "r is 33, up to 32 "),
        ("{type: low_rank_adapter, bottleneck_dim: 4, low_rank_rank: 5}", "is 5, up to 4 "),
        ("{type: vera, r: 32}", ""),
        ("{type: low_rank_adapter, bottleneck_dim: 4, low_rank_rank: 4}", ""),
    ],
)
def test_a_rank_that_no_product_can_have_is_warned_of(
    tiny: Path, chats: Path, delta: str, said: str
) -> None:
    assign, heard = (f"deltas=[{delta}]",), Heard()
    request = stage.Request("tune", "lora", str(tiny), data=str(chats), assign=assign)
    stage.estimate(stage.prepare(request, Silent()), heard)
    assert bool(heard.warnings) == bool(said)
    assert said in "".join(heard.warnings)


def test_the_same_adapter_twice_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "delta"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig())
    model.save_pretrained(folder)
    twice = (str(folder), str(tmp_path / "x" / ".." / "delta"))
    (tmp_path / "x").mkdir()
    stage.prepare(stage.Request("infer", "greedy", str(tiny), adapters=twice[:1]), Silent())
    with pytest.raises(UsageError, match="twice"):
        stage.prepare(stage.Request("infer", "greedy", str(tiny), adapters=twice), Silent())


def test_a_report_makes_no_directories(tmp_path: Path) -> None:
    place.refuse_report(tmp_path / "r.json")
    with pytest.raises(InputError, match="no directory"):
        place.refuse_report(tmp_path / "nosuch" / "r.json")
    assert not (tmp_path / "nosuch").exists()
