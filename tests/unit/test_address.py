"""Which modules a delta goes to."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from bmkit.deltas import address
from bmkit.errors import RecipeError

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
