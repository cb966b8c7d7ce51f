"""What an infer recipe may say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bmkit.runtime.recipe import GenerateRecipe


class InferRecipe(GenerateRecipe):
    """`bmkit infer`."""

    kind: Literal["infer"]
    score: bool = Field(
        default=False, description="Answer nothing; tell how likely the given text is."
    )

    @property
    def scores(self) -> bool:
        """Tell whether given text is scored, and none made."""
        return self.score
