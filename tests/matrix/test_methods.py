"""Every registered method, on a tiny random Llama: it runs, is reused, repeats, and reloads."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bmkit import artifact, registry
from bmkit.errors import BmkitError
from bmkit.pipeline import stage as stages
from bmkit.pipeline.stage import Request, Result
from bmkit.registry import Method
from bmkit.report import Silent


@dataclass(frozen=True)
class Line:
    """What a method's line in the matrix says."""

    kind: str
    """The kind of artifact that it makes."""
    assign: tuple[str, ...] = ()
    """What keeps it short."""
    data: bool = False
    """Whether it takes rows."""
    another: bool = False
    """Whether what comes out is another model, not one that does nearly the same."""
    needs: str = ""
    """A library that not everybody has; without it the line is skipped."""
    row: tuple[tuple[str, str], ...] = (("prompt", "Say 1."),)
    """What `infer` is asked."""


GIVEN = "data.calibration={texts}"
"""A file of texts: what a model says itself takes it half a minute."""
DRAFT = Line(
    "model",
    (
        *("data.tokens=300", "data.max_new_tokens=12", "data.sequence_length=64", GIVEN),
        *("steps.0.keep=1", "steps.1.tokens=64", "steps.2.train.max_steps=3"),
        "steps.2.train.num_train_epochs=1",
    ),
    another=True,
)
OWN = ("data.tokens=600", "data.max_new_tokens=24", "data.sequence_length=64")
SHORT = (*OWN, GIVEN)
NARROW = "steps.0.exclude_modules=[k_proj,v_proj]"
"""Layers with fewer outputs than GPTQModel packs."""
TUNED = Line(
    "delta",
    ("train.max_steps=2", "train.per_device_train_batch_size=4", "data.max_length=64"),
    data=True,
)
CHOICES = (
    *(("premise", "It fell."), ("asks", "so")),
    *(("choice1", "It broke."), ("choice2", "It grew.")),
)
WORDS = "{negative: [<!>b, <!>c], positive: [<!>g, <!>h]}"
PROMPT = Line("prompt", ("verbalizer.label_words={negative: <!>b, positive: <!>g}",))
"""With words of one byte each: the tiny model has no longer tokens."""
LEARNED = Line("prompt", ("learning_setting.num_examples_per_label=2",))
# One line a method: `("stage", "method"): Line(…)`.
MATRIX = {
    ("compress", "quantize"): Line("model"),
    ("compress", "gptq"): Line("model", (*SHORT, "steps.0.bits=8")),
    ("compress", "quanto"): Line("model", ("steps.0.weights=int8",), needs="optimum.quanto"),
    ("compress", "optimum_gptq"): Line(
        "model", (*SHORT, "steps.0.bits=8", NARROW), needs="gptqmodel"
    ),
    ("compress", "awq"): Line("model", (*SHORT, "steps.1.bits=8")),
    ("compress", "smoothquant"): Line("model", SHORT),
    ("compress", "magnitude"): Line("model", another=True),
    ("compress", "wanda"): Line("model", OWN, another=True),
    ("compress", "sparsegpt"): Line("model", SHORT, another=True),
    ("compress", "moefy"): Line(
        "model", (*SHORT, "steps.0.size=4", "steps.0.max_loss=100"), another=True
    ),
    ("compress", "drop_layers"): DRAFT,
    ("compress", "shrink"): Line("model", SHORT, another=True),
    ("compress", "gates"): Line(
        "model", (*SHORT, "steps.0.train.max_steps=4", "steps.0.multiple_of=8"), another=True
    ),
    ("compress", "frequent_tokens"): DRAFT,
    ("compress", "distill"): DRAFT,
    ("tune", "lora"): TUNED,
    ("tune", "adalora"): TUNED,
    ("tune", "ia3"): TUNED,
    ("tune", "vera"): TUNED,
    ("tune", "oft"): replace(TUNED, assign=(*TUNED.assign, "deltas.0.oft_block_size=16")),
    ("tune", "boft"): TUNED,
    ("tune", "layer_norm"): TUNED,
    ("tune", "trainable_tokens"): TUNED,
    ("tune", "prefix"): replace(TUNED, another=True),
    ("tune", "prompt"): replace(TUNED, another=True),
    ("tune", "p_tuning"): replace(TUNED, another=True),
    ("tune", "adapter"): TUNED,
    ("tune", "parallel_adapter"): TUNED,
    ("tune", "compacter"): replace(TUNED, assign=(*TUNED.assign, "deltas.0.reduction_factor=4")),
    ("tune", "low_rank_adapter"): TUNED,
    ("tune", "bitfit"): TUNED,
    ("prompt", "manual"): PROMPT,
    ("prompt", "one_to_one"): PROMPT,
    ("prompt", "knowledgeable"): replace(PROMPT, assign=(f"verbalizer.label_words={WORDS}",)),
    ("prompt", "automatic"): LEARNED,
    ("prompt", "soft"): Line("prompt", (*PROMPT.assign, *LEARNED.assign, "train.max_steps=2")),
    ("prompt", "prototypical"): LEARNED,
    ("prompt", "ptr"): Line(
        "prompt", ("verbalizer.label_words={negative: [<!>b, <!>h], positive: [<!>g, <!>l]}",)
    ),
    ("prompt", "generation"): Line("prompt", row=CHOICES),
    ("prompt", "content_free"): PROMPT,
    ("prompt", "contextual"): PROMPT,
}

# Methods that share a built-in recipe are tried in one.
each_method = pytest.mark.parametrize(
    "method",
    {(m.stage, m.builtin): m for m in registry.METHODS}.values(),
    ids=lambda m: f"{m.stage}-{m.builtin}",
)

each_method_with_weights = pytest.mark.parametrize(
    "method",
    {(m.stage, m.builtin): m for m in registry.METHODS if m.stage != "prompt"}.values(),
    ids=lambda m: f"{m.stage}-{m.builtin}",
)
"""A prompt has none: no other library reads it."""

Make = Callable[..., Result]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of texts to calibrate on."""
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    lines = (f"What is {n} and {n}? It is {2 * n}, as you know. Well, so be it." for n in range(60))
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture(scope="session")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows, as `chats` is, that stays."""
    path = tmp_path_factory.mktemp("said") / "chats.jsonl"
    rows = ({"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(40))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def assigned(texts: Path) -> Callable[[Method], tuple[str, ...]]:
    """Return what keeps a method's run short."""
    return lambda m: tuple(a.replace("{texts}", str(texts)) for a in MATRIX[m.stage, m.name].assign)


@pytest.fixture
def make(tiny: Path, chats: Path, assigned: Callable[[Method], tuple[str, ...]]) -> Make:
    """Run a method's built-in recipe on the tiny model."""

    def run(method: Method, **more: Any) -> Result:
        line = MATRIX[method.stage, method.name]
        if line.needs:
            pytest.importorskip(line.needs)
        request = Request(
            method.stage,
            method.builtin,
            str(tiny),
            assign=assigned(method),
            data=str(chats) if line.data else None,
            device="cpu",
            threads=1,
        )
        return stages.run_stage(replace(request, **more), Silent())

    return run


@pytest.fixture(scope="session")
def before() -> dict[tuple[str, str], Result]:
    """What was made before, by stage and recipe."""
    return {}


@pytest.fixture
def made(
    make: Make,
    said: Path,
    before: dict[tuple[str, str], Result],
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Make:
    """Return what `make` does, made once for all tests, in a BMKIT_HOME of its own."""
    import torch

    def run(method: Method) -> Result:
        name = (method.stage, method.builtin)
        if name not in before:
            with monkeypatch.context() as patch:
                patch.setenv("BMKIT_HOME", str(tmp_path_factory.mktemp("made")))
                torch.manual_seed(12345)  # what another test did before must not matter
                data = str(said) if MATRIX[method.stage, method.name].data else None
                before[name] = make(method, model=str(tiny_checkpoint), data=data)
        return before[name]

    return run


def token_ids() -> Any:
    """Return a few token ids."""
    import torch

    return torch.arange(3, 43).reshape(2, 20)


def plain_logits(result: Result, base: Path) -> Any:
    """Load a result with the stock library for its kind, and return its logits on a few tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = result.artifact.path
    if result.artifact.kind == "delta":
        model: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), path
        )
    elif (path / artifact.QUANTO).is_file():
        from optimum.quanto import QuantizedModelForCausalLM

        model = QuantizedModelForCausalLM.from_pretrained(path)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert AutoTokenizer.from_pretrained(path).chat_template
    with torch.no_grad():
        return model.eval()(token_ids()).logits.float()


def our_logits(result: Result, base: Path) -> Any:
    """Load a result as bmkit does, and return its logits on the same tokens."""
    import torch

    from bmkit import model as models
    from bmkit.deltas import plugged

    is_delta = result.artifact.kind == "delta"
    path = result.artifact.path
    cpu = torch.device("cpu")
    loaded = models.load_model(base if is_delta else path, device=cpu, dtype="float32")
    with torch.no_grad():
        return plugged.load(loaded, {"a": path} if is_delta else {})(token_ids()).logits


def test_every_registered_method_has_a_line_and_every_line_a_method() -> None:
    assert set(MATRIX) == {(m.stage, m.name) for m in registry.METHODS}


@each_method
def test_a_method_makes_a_whole_artifact(method: Method, make: Make, home: Path) -> None:
    result = make(method)
    line = MATRIX[method.stage, method.name]
    found = result.artifact
    assert (found.kind, result.reused) == (line.kind, False)
    assert found.path.parent == home / "artifacts"
    manifest = artifact.read_manifest(found.path)
    assert artifact.differences(found.path, manifest) == []
    assert (manifest.key, manifest.digest) == (result.key, found.digest)
    assert manifest.loads_in
    assert manifest.metrics
    on_disk = {p.relative_to(found.path).as_posix() for p in found.path.rglob("*") if p.is_file()}
    assert on_disk == {*manifest.files, "bmkit.json"}
    assert not [n for n in on_disk if n.endswith((".bin", ".pt", ".pth", ".pkl"))]


OF_OTHER_TASKS = {
    *("templates", "combinations"),  # of a search: tests/e2e/test_prompt_search.py
    *("precision_at_1", "precision_at_10", "mean_reciprocal_rank"),  # test_prompt_tasks.py
    *("exact_match", "token_f1", "rouge_l"),  # likewise
    "threshold",  # of `task: duplex`: test_duplex_tune.py
}
"""What methods' built-in recipes don't measure, since it is another task's."""


@pytest.mark.parametrize("stage", sorted({m.stage for m in registry.METHODS}))
def test_the_metrics_that_gates_may_name_are_measured(stage: str, made: Make) -> None:
    recipe = registry.load(registry.STAGES[stage].recipe)
    methods = {m.builtin: m for m in registry.METHODS if m.stage == stage}
    here = [
        m
        for m in methods.values()
        if not (needs := MATRIX[stage, m.name].needs) or _is_there(needs)
    ]
    measured = {name for m in here for name in made(m).artifact.metrics}
    missing = set(recipe.METRICS) - measured
    apart = {"best_step", "lost_share_left"}  # only where a recipe asks for them
    apart |= OF_OTHER_TASKS
    others = ("dev_", "train_a", "train_m")  # of splits that a built-in recipe doesn't measure
    assert {name for name in missing - apart if not name.startswith(others)} == set()


@each_method
def test_the_same_stage_again_is_reused(method: Method, make: Make) -> None:
    first, again = make(method), make(method)
    assert (first.reused, again.reused) == (False, True)
    assert (first.artifact.path, first.artifact.digest, first.key) == (
        again.artifact.path,
        again.artifact.digest,
        again.key,
    )


@each_method
def test_the_same_key_gives_the_same_bytes(
    method: Method, make: Make, made: Make, tmp_path: Path
) -> None:
    import torch

    first = made(method)  # what the process did before must not matter
    torch.manual_seed(54321)
    again = make(method, out=tmp_path / "elsewhere")
    assert again.reused is False
    assert (first.key, first.artifact.digest) == (again.key, again.artifact.digest)


@each_method
def test_key_and_bytes_do_not_depend_on_where_the_model_lies(
    method: Method, make: Make, made: Make, tiny: Path, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(tiny, tmp_path / "other folder" / "copy")
    first = made(method)
    again = make(method, model=str(elsewhere), out=tmp_path / "elsewhere")
    assert (first.key, first.artifact.digest) == (again.key, again.artifact.digest)


@each_method
def test_another_seed_or_recipe_gives_another_key(
    method: Method, make: Make, made: Make, assigned: Callable[[Method], tuple[str, ...]]
) -> None:
    first = made(method)
    keys = []
    for more in ({"seed": 7}, {"assign": (*assigned(method), "dtype=bfloat16")}):
        result = make(method, **more)
        keys.append(result.key)
        assert result.reused is False
    assert len({first.key, *keys}) == 3


@each_method
@pytest.mark.parametrize("seed", [2**32 - 1, 2**32, 2**64])
def test_a_large_seed_is_used_or_refused_but_never_a_crash(
    method: Method, make: Make, seed: int
) -> None:
    try:
        assert make(method, seed=seed).artifact.kind == MATRIX[method.stage, method.name].kind
    except BmkitError as exc:
        assert "seed" in str(exc)


@each_method_with_weights
def test_the_result_loads_in_the_stock_library_with_the_same_logits(
    method: Method, made: Make, tiny: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    result = made(method)
    ours, theirs = our_logits(result, tiny), plain_logits(result, tiny)
    if MATRIX[method.stage, method.name].needs:  # another library, which computes in 16 bits
        assert float((ours - theirs).norm() / theirs.norm()) < 0.06
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)(token_ids()).logits
    ours = ours[:, -plain.shape[1] :]  # virtual tokens stand in front
    assert not torch.equal(ours, plain), "the method has changed nothing"
    if not MATRIX[method.stage, method.name].another:
        assert float((ours - plain).norm() / plain.norm()) < 0.2, "the method has broken the model"


@each_method
def test_the_result_answers_through_infer(method: Method, made: Make) -> None:
    from bmkit.data.rows import Row
    from bmkit.pipeline.generate import open_answers

    result = made(method)
    request = Request(
        "infer",
        "greedy",
        str(result.artifact.path),
        device="cpu",
        threads=1,
        flags={"max_new_tokens": 4},
    )
    answers = list(
        open_answers(request, [Row(1, dict(MATRIX[method.stage, method.name].row))], Silent())
    )
    (found,) = (a.values() for a in answers)
    if result.artifact.kind == "prompt":
        assert found["probabilities"][found["label"]] >= 0.5
        return
    assert len(found["token_ids"]) == 4 or found["finish"] == "eos"


@each_method
def test_its_manifest_makes_it_again(method: Method, made: Make, tmp_path: Path) -> None:
    from bmkit.pipeline import chain

    first = made(method)
    pipeline = tmp_path / "again.yaml"
    pipeline.write_text(chain.to_yaml(chain.lineage(first.artifact.steps)))
    items = chain.read(str(pipeline))
    chain.check(items)
    left = chain.run(items, Silent(), lambda *_: None)
    assert left is not None
    assert left[2].digest == first.artifact.digest
    result = left[1]
    assert result is not None
    assert result.key == first.key


@each_method
def test_a_gate_is_judged_on_the_result(
    method: Method, make: Make, assigned: Callable[[Method], tuple[str, ...]]
) -> None:
    first = make(method)
    name, value = next(
        (n, v)
        for n, v in first.artifact.metrics.items()
        if isinstance(v, float) and n in registry.load(registry.STAGES[method.stage].recipe).METRICS
    )
    for bound, met in (({"max": value}, True), ({"max": value / 2}, False), ({"min": value}, True)):
        assign = (*assigned(method), f"gates.{name}={json.dumps(bound)}")
        result = make(method, assign=assign)
        assert (result.reused, not result.unmet) == (True, met), bound
