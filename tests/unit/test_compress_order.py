"""Steps in an order that makes no sense are refused when the recipe is read, and say why."""

from __future__ import annotations

import pytest

from bmkit import recipe
from bmkit.compress.recipe import CompressRecipe
from bmkit.errors import RecipeError

STEPS = {
    "round": "{method: quantize, bits: 4}",
    "int8": "{method: quantize, activations: dynamic}",
    "gptq": "{method: gptq}",
    "awq": "{method: awq}",
    "smooth": "{method: smoothquant}",
    "2:4": '{method: sparsegpt, pattern: "2:4"}',
    "2:4 but down": '{method: wanda, pattern: "2:4", exclude_modules: [mlp.down_proj]}',
    "half": "{method: magnitude}",
    "drop": "{method: drop_layers, keep: 2}",
    "shrink": "{method: shrink, parameters: 0.8}",
    "gates": "{method: gates, parameters: 0.8}",
    "moefy": "{method: moefy}",
    "distill": "{method: distill}",
    "qat": "{method: distill, qat: true}",
}


def read(steps: str) -> CompressRecipe:
    lines = "".join(f"  - {STEPS[name]}\n" for name in steps.split(" > "))
    doc = recipe.parse(f"kind: compress\nsteps:\n{lines}", "r.yaml")
    found = recipe.validate(doc, CompressRecipe)
    assert isinstance(found, CompressRecipe)
    return found


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ("round > distill", "comes last"),
        ("gptq > 2:4", "comes last"),
        ("round > round", "comes last"),
        ("awq", "scales for a grid"),
        ("awq > distill > round", "scales for a grid"),
        ("smooth > round", "inputs easier"),
        ("smooth > gptq", "inputs easier"),
        ("2:4 > shrink", "needs no zeros"),
        ("half > drop", "needs no zeros"),
        ("2:4 > gates > round", "needs no zeros"),
        ("qat > gptq", "right behind it"),
        ("qat", "right behind it"),
        ("moefy > moefy", "twice"),
        ("2:4 > moefy", "another order"),
        ("moefy > shrink", "does not go behind `moefy`"),
        ("moefy > awq > round", "does not go behind `moefy`"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(steps: str, why: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(steps)
    assert why in str(caught.value)
    assert "--> r.yaml:3:3" in str(caught.value)


@pytest.mark.parametrize(
    "steps",
    [
        "shrink > 2:4 > distill > gptq",
        "gates > distill > awq > round",
        "drop > moefy > distill > round",
        "moefy > 2:4 > distill > gptq",
        "half > moefy > gptq",
        "2:4 but down > moefy > gptq",
        "2:4 > qat > round",
        "smooth > int8",
        "distill > distill > half > half",
    ],
)
def test_what_makes_sense_is_taken(steps: str) -> None:
    assert len(read(steps).steps) == len(steps.split(" > "))
