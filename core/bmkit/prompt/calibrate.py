"""What a recipe says of calibration. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bmkit.recipe import Model


class Calibrate(Model):
    """What a template makes likely by itself is divided away."""

    type: Literal["none", "content_free", "contextual"] = Field(
        default="none",
        description="`content_free`: measured on inputs that say nothing (arXiv 2102.09690); "
        "`contextual`: on rows without their labels (arXiv 2108.02035).",
    )
    num_examples: int = Field(
        default=50, ge=1, description="Of `contextual`: rows of train, else of test or dev."
    )
    texts: list[str] = Field(
        default=["", "N/A", "[MASK]"],
        min_length=1,
        description="Of `content_free`: what stands in the place of a row's texts.",
    )
