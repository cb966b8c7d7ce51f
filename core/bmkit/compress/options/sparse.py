"""Steps that set weights to zero: what a recipe may say of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from bmkit.recipe import Model, contradiction


class _Sparse(Model):
    pattern: str = Field(
        default="unstructured",
        description="`n:m`, as 2:4: n of each m inputs stay; `unstructured`: the best stay.",
    )
    sparsity: float = Field(
        default=0.5, gt=0, lt=1, description="The share of weights that go, if there is no n:m."
    )
    exclude_modules: list[str] = Field(
        default=[], description="Modules to leave as they are, by the end of their name."
    )

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, value: str) -> str:
        kept, colon, of = value.partition(":")
        right = colon and kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of)
        if value != "unstructured" and not right:
            raise contradiction("pattern", "it takes `unstructured` or n:m, as 2:4")
        return value


class Magnitude(_Sparse):
    """Set the smallest weights of linear layers to zero."""

    method: Literal["magnitude"]
    both_ways: bool = Field(
        default=False,
        description="With 2:4: two of four of each row and of each column, so that the transposed "
        "matrix is 2:4 as well.",
    )

    @model_validator(mode="after")
    def _both_ways_are_of_four(self) -> Magnitude:
        if self.both_ways and self.pattern != "2:4":
            raise contradiction("both_ways", "it needs `pattern: 2:4`")
        return self


class Wanda(_Sparse):
    """Set the weights of linear layers to zero that carry least: |w| times its input's size."""

    method: Literal["wanda"]


class SparseGpt(_Sparse):
    """Set weights of linear layers to zero, and let the others make up for it."""

    method: Literal["sparsegpt"]
    damp: float = Field(
        default=0.01, gt=0, le=1, description="Added to the curvature, of its diagonal's mean."
    )
