"""Which modules a delta goes to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from pydantic import TypeAdapter
from torch import nn

from bmkit.deltas import address
from bmkit.deltas.modules import Module, modules_of_model
from bmkit.deltas.recipe import Delta
from bmkit.deltas.roles import roles_of
from bmkit.deltas.targets import addressed
from bmkit.errors import RecipeError
from bmkit.nn import walk

LLAMA = [
    f"model.layers.{layer}.{name}"
    for layer in range(12)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
]


def brute_force(
    names: Sequence[str],
    targets: Sequence[str],
    exclude: Sequence[str] = (),
    layers: Sequence[int] | None = None,
) -> list[str]:
    """Say it once more, with split parts instead of string ends."""

    def ends(name: str, pattern: str) -> bool:
        parts, wanted = name.split("."), pattern.split(".")
        return parts[-len(wanted) :] == wanted

    def layer(name: str) -> int:
        return int(name.split(".")[2])

    return [
        n
        for n in names
        if any(ends(n, t) for t in targets)
        and not any(ends(n, e) for e in exclude)
        and (layers is None or layer(n) in layers)
    ]


@pytest.mark.parametrize(
    ("targets", "exclude", "layers"),
    [
        (["q_proj"], [], None),
        (["q_proj", "v_proj"], [], None),
        (["self_attn.q_proj", "mlp.up_proj"], [], None),
        (["layers.1.mlp.up_proj"], [], None),
        (["q_proj"], [], [0, 3]),
        (["q_proj", "up_proj"], ["layers.3.mlp.up_proj"], None),
        (["q_proj", "up_proj"], ["up_proj"], [11]),
        ([LLAMA[5]], [], None),
    ],
)
def test_patterns_match_the_end_of_names_at_a_dot(
    targets: list[str], exclude: list[str], layers: list[int] | None
) -> None:
    found = address.matched(LLAMA, targets, exclude, layers)
    assert found == brute_force(LLAMA, targets, exclude, layers)
    assert found


def test_a_pattern_does_not_match_inside_a_word() -> None:
    with pytest.raises(RecipeError, match="`proj`"):
        address.matched(LLAMA, ["proj"])
    assert address.matched([*LLAMA, "model.layers.0.xq_proj"], ["q_proj"]) == brute_force(
        LLAMA, ["q_proj"]
    )


def test_all_linear_is_every_module_less_what_is_excluded() -> None:
    assert address.matched(LLAMA, "all-linear") == LLAMA
    assert address.matched(LLAMA, ["all-linear"]) == LLAMA
    assert address.matched(LLAMA, "all-linear", ["q_proj"], [2]) == brute_force(
        LLAMA, ["v_proj", "up_proj", "down_proj"], [], [2]
    )


@pytest.mark.parametrize(
    "names",
    [
        ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"],
        ["gpt_neox.layers.0.attention.dense", "gpt_neox.layers.1.attention.dense"],
        ["encoder.block.0.q", "encoder.block.1.q"],
        ["layers.0.q", "layers.1.q"],
        ["model.language_model.layers.0.q", "model.language_model.layers.1.q"],
    ],
)
def test_blocks_are_numbered_in_every_familys_names(names: list[str]) -> None:
    assert address.matched(names, "all-linear", (), [1]) == [names[1]]


def test_a_module_outside_the_blocks_belongs_to_no_layer() -> None:
    names = [*LLAMA, "model.projector"]
    assert address.matched(names, "all-linear", (), [0]) == LLAMA[:4]


@pytest.mark.parametrize("where", ["target_modules", "exclude_modules"])
def test_a_pattern_that_matches_nothing_names_the_nearest(where: str) -> None:
    given = {"target_modules": ["q_proj"], "exclude_modules": [], where: ["qproj"]}
    with pytest.raises(RecipeError, match=re.escape(f"{where}: ")) as caught:
        address.matched(LLAMA, given["target_modules"], given["exclude_modules"])
    assert caught.value.exit_code == 2
    assert str(caught.value.hint).startswith("did you mean `q_proj`? (roles here: attn.q")


def test_a_pattern_far_from_every_name_lists_what_there_is() -> None:
    with pytest.raises(RecipeError) as caught:
        address.matched(LLAMA, ["zzzzzz"])
    assert all(n in str(caught.value.hint) for n in ("q_proj", "v_proj", "up_proj", "down_proj"))


def test_one_wrong_pattern_among_right_ones_is_refused() -> None:
    with pytest.raises(RecipeError, match="`k_proj`"):
        address.matched(LLAMA, ["q_proj", "k_proj"])
    with pytest.raises(RecipeError, match="`k_proj`"):
        address.matched(LLAMA, ["all-linear", "k_proj"])


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    for layers in ([99], [0, 99], [-1]):
        with pytest.raises(RecipeError) as caught:
            address.matched(LLAMA, "all-linear", (), layers)
        assert "12" in f"{caught.value} {caught.value.hint}"


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing is left"):
        address.matched(LLAMA, ["q_proj"], ["q_proj"])


@pytest.mark.parametrize("nothing", [[], [""]])
def test_no_target_at_all_does_not_mean_every_module(nothing: list[str]) -> None:
    with pytest.raises(RecipeError):
        address.matched(LLAMA, nothing)


def test_no_layer_at_all_does_not_mean_every_layer() -> None:
    with pytest.raises(RecipeError):
        address.matched(LLAMA, "all-linear", (), [])


def opendelta(name: str, patterns: Sequence[str], exclude: Sequence[str]) -> bool:
    """OpenDelta's rule on one name, written out.

    Exclusions are beginnings (here at a dot); patterns are ends at a dot, or `[r]` and an
    expression that matches up to the end and begins at a dot.
    """
    words = name.split(".")
    ends = [".".join(words[i:]) for i in range(len(words))]
    begins = [".".join(words[: i + 1]) for i in range(len(words))]
    if any(e in begins for e in exclude):
        return False
    plain = [p for p in patterns if not p.startswith("[r]")]
    regular = [p[3:] for p in patterns if p.startswith("[r]")]
    return any(end in plain for end in ends) or any(
        re.fullmatch(p, end) for p in regular for end in ends
    )


FIVE = {  # q, v, o, up, down, the whole attention, the stack
    "llama": "q_proj v_proj o_proj up_proj down_proj self_attn model.layers",
    "gpt2": "c_attn attn.c_attn attn.c_proj c_fc mlp.c_proj attn transformer.h",
    "bert": "query self.value attention.output.dense intermediate.dense output.dense attention "
    "bert.encoder.layer",
    "t5": "SelfAttention.q v o wi DenseReluDense.wo SelfAttention decoder.block",
    "bart": "q_proj encoder_attn.v_proj out_proj fc1 fc2 self_attn model.decoder.layers",
}


def pattern_sets(words: str) -> list[tuple[list[str], list[str]]]:
    """Twelve ways to say where a delta goes: targets and exclusions."""
    q, v, o, up, down, attention, stack = words.split()
    at_stack = re.escape(stack)
    return [
        ([q], []),
        ([q, v], []),
        ([q, v, o, up, down], []),
        ([attention], []),
        ([f"0.{attention}", up], []),
        ([f"[r](?:{re.escape(q)}|{re.escape(v)})"], []),
        ([rf"[r]{at_stack}\.[01]\..*{re.escape(down)}"], []),
        ([r"[r]\d+\..*(v|proj|dense)", up], []),
        ([r"[r](?i).*(norm|ln_\d)\w*"], []),
        ([q, up], [f"{stack}.0"]),
        ([rf"[r]1\..*{re.escape(up)}", q], [f"{stack}.1"]),
        ([r"[r].*"], [f"{stack}.1", f"{stack}.0.{attention}"] if stack[0] in "mbt" else [stack]),
    ]


@pytest.mark.parametrize("which", range(12))
@pytest.mark.parametrize("family", FIVE)
def test_patterns_match_as_opendelta_says(
    family: str, which: int, architecture: Callable[..., Any]
) -> None:
    model = architecture(family)
    patterns, exclude = pattern_sets(FIVE[family])[which]
    found = address.matched(modules_of_model(model), patterns, exclude)
    every = dict(model.named_modules())
    expected = {n for n in every if opendelta(n, patterns, exclude)}
    assert set(found) <= expected
    for name in expected - set(found):  # what no delta can go to
        module = every[name]
        assert not name or isinstance(module, nn.ModuleList) or not list(module.parameters())


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "bart", "opt", "qwen2_moe", "modernbert"])
def test_all_linear_is_every_linear_layer_but_the_head(
    name: str, architecture: Callable[..., Any]
) -> None:
    model = architecture(name)
    modules = modules_of_model(model)
    assert set(address.matched(modules, "all-linear")) == set(walk.linears(model))


def test_all_linear_knows_gpt2s_own_kind_of_linear_layer(architecture: Callable[..., Any]) -> None:
    model = architecture("gpt2")
    found = address.matched(modules_of_model(model), "all-linear")
    kinds = {type(model.get_submodule(n)).__name__ for n in found}
    assert (len(found), kinds) == (8, {"Conv1D"})


def test_a_classifier_is_no_target_of_all_linear(architecture: Callable[..., Any]) -> None:
    found = address.matched(modules_of_model(architecture("roberta_classifier")), "all-linear")
    assert len(found) == 12
    assert not any("classifier" in n for n in found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "bart", "deepseek_v3"])
def test_a_role_wins_over_names_that_are_spelt_like_it(
    name: str, architecture: Callable[..., Any]
) -> None:
    modules = modules_of_model(architecture(name))
    roles = roles_of(modules)
    for role in {r for rs in roles.values() for r in rs}:
        expected = [n for n in modules if role in roles.get(n, ())]
        assert address.matched(modules, [role]) == expected
    assert len(address.matched(modules, ["norm"])) > sum(n.endswith(".norm") for n in modules)


def test_a_role_behind_a_half_is_that_halfs(architecture: Callable[..., Any]) -> None:
    modules = modules_of_model(architecture("t5"))
    found = address.matched(modules, ["decoder.attn.q", "encoder.mlp.up"])
    assert found == [
        *(f"encoder.block.{i}.layer.1.DenseReluDense.wi" for i in range(2)),
        *(f"decoder.block.{i}.layer.0.SelfAttention.q" for i in range(2)),
    ]
    half = address.matched(modules, ["decoder.all-linear"])
    assert half == [n for n in address.matched(modules, "all-linear") if n.startswith("decoder.")]


def test_excluding_a_block_excludes_what_is_in_it(architecture: Callable[..., Any]) -> None:
    modules = modules_of_model(architecture("bart"))
    everything = address.matched(modules, "all-linear")
    for pattern, gone in {
        "attn": ".self_attn.",
        "encoder_attn": ".encoder_attn.",
        "model.decoder": "model.decoder.",
        "encoder": "model.encoder.",
        "decoder.layers": "model.decoder.",
        "layers.1": ".layers.1.",
        r"[r]decoder\.layers\.[01]\.self_attn": "decoder.layers.",
    }.items():
        found = address.matched(modules, "all-linear", [pattern])
        left = [n for n in everything if gone not in n]
        if pattern.startswith("[r]"):
            left = [n for n in everything if gone not in n or ".self_attn." not in n]
        assert found == left, pattern


def test_layers_are_numbers_or_ranges(architecture: Callable[..., Any]) -> None:
    assert address.layer_numbers("0,3, 20-22") == [0, 3, 20, 21, 22]
    assert address.layer_numbers("7") == address.layer_numbers(7) == [7]
    modules = {n: Module("linear") for n in LLAMA}
    for layers in ("2-4", [2, 3, 4], "2,3-4"):
        found = address.matched(modules, ["q_proj"], (), layers)
        assert found == [f"model.layers.{i}.self_attn.q_proj" for i in (2, 3, 4)]


@pytest.mark.parametrize("text", ["", "a", "3-", "5-3", "1,,2", "-1", "1-2-3", "1.5"])
def test_a_text_that_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="layers: "):
        address.layer_numbers(text)


def test_layers_and_last_apply_to_every_stack() -> None:
    deep = {"encoder": 6, "decoder": 3}
    names = [f"model.{half}.layers.{i}.fc1" for half, n in deep.items() for i in range(n)]
    names.append("model.encoder.fc1")
    assert address.depths(names) == {"model.encoder.layers": 6, "model.decoder.layers": 3}
    assert address.matched(names, ["fc1"], (), "1,4") == [names[1], names[4], names[7]]
    assert address.matched(names, ["fc1"], last=2) == [names[4], names[5], names[7], names[8]]
    assert address.matched(names, ["fc1"], last=5) == names[1:9]
    for last in (0, 7):
        with pytest.raises(RecipeError, match=f"last {last} layers") as caught:
            address.matched(names, ["fc1"], last=last)
        assert "3 and 6" in str(caught.value.hint)
    with pytest.raises(RecipeError, match="layers and last"):
        address.matched(names, ["fc1"], (), [0], last=2)


def test_a_method_gets_the_kinds_that_it_can_go_to(architecture: Callable[..., Any]) -> None:
    modules = modules_of_model(architecture("llama"))
    found = address.matched(modules, ["all-linear", "embed"], kinds=("linear", "embedding"))
    assert {modules[n].kind for n in found} == {"linear", "embedding"}
    assert address.matched(modules, [r"[r].*"], kinds=("norm",)) == address.matched(
        modules, ["norm"]
    )
    with pytest.raises(
        RecipeError, match="`mlp` is a block, and lora goes to linear layers"
    ) as bad:
        address.matched(modules, ["mlp"], kinds=("linear",), method="lora")
    assert bad.value.hint == "it can go to: mlp.gate, mlp.up, mlp.down"
    with pytest.raises(
        RecipeError, match=r"`attn\.q` is a linear layer, and ln goes to norms"
    ) as bad:
        address.matched(modules, ["attn.q"], kinds=("norm",), method="ln")
    assert bad.value.hint == "it can go to: norm"


def test_a_role_that_the_model_lacks_is_told_with_those_it_has(
    architecture: Callable[..., Any],
) -> None:
    modules = modules_of_model(architecture("gpt2"))
    for pattern in ("attn.q", "decoder.cross"):
        with pytest.raises(RecipeError, match=f"the model has no `{pattern}`") as caught:
            address.matched(modules, [pattern])
        assert str(caught.value.hint).startswith("roles here: attn, attn.qkv, attn.o, mlp,")


def test_a_broken_expression_is_refused_with_its_fault() -> None:
    with pytest.raises(RecipeError, match="no regular expression: missing"):
        address.matched(LLAMA, ["[r](q_proj"])


def test_a_delta_that_is_in_the_model_already_changes_no_address(
    architecture: Callable[..., Any],
) -> None:
    from peft import LoraConfig, get_peft_model

    model = architecture("llama")
    before = {
        p: address.matched(modules_of_model(model), [p]) for p in ("attn.q", "mlp.up_proj", "norm")
    }
    wrapped = modules_of_model(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    for pattern, names in before.items():
        found = address.matched(wrapped, [pattern])
        assert [n.removeprefix("base_model.model.") for n in found] == names


def test_no_module_at_all_is_told_as_that() -> None:
    modules = {"mlp": Module("linear", (8, 8))}
    spec = TypeAdapter(Delta).validate_python({"type": "lora", "target_modules": []})
    with pytest.raises(RecipeError, match="names no module"):
        addressed(spec, modules)
