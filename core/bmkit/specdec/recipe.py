"""What a spec-decode recipe may say: infer's keys, and how to guess."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bmkit.recipe import contradiction
from bmkit.runtime.recipe import GenerateRecipe

Rival = Literal["greedy", "transformers", "assisted", "prompt-lookup", "lookahead"]


class SpecDecodeRecipe(GenerateRecipe):
    """`bmkit spec-decode`. Nothing here changes what is said, only how fast."""

    kind: Literal["spec-decode"]
    draft: str | None = Field(
        default=None,
        description="A smaller model that guesses; `self` is the target, rounded to `draft_quant`.",
    )
    draft_quant: Literal["auto", "int8", "int4"] | None = Field(
        default="auto",
        description="How the draft's weights are rounded, where it has a choice. auto: int8; on a "
        "GPU, where rounding saves memory and no time, only that of `self`.",
    )
    retokenise: bool = Field(
        default=True, description="Let a draft with another tokenizer guess: by its text."
    )
    draft_length: int | None = Field(
        default=None, ge=0, le=63, description="Tokens a draft guesses; if not given, what pays."
    )
    topk: int = Field(
        default=3, ge=0, le=16, description="Phrases tried at a place, of each source."
    )
    phrase_length: int = Field(
        default=8,
        ge=1,
        le=63,
        description="Tokens of a phrase; four times as many where the last twelve agree.",
    )
    window: int = Field(
        default=0,
        ge=0,
        le=16,
        description="Places ahead whose tokens are found by Jacobi iteration; 0: none.",
    )
    levels: int = Field(default=4, ge=2, le=8, description="Iterations that the window holds.")
    phrases: str | None = Field(
        default=None, description="A phrase pool to read, and to add to; made if it isn't there."
    )
    adaptive: bool = Field(
        default=True, description="Leave out what isn't expected to be quicker; else guess always."
    )
    compare: list[Rival] = Field(
        default=[],
        description="Others to run on the same prompts, in turns with this one: greedy is bmkit "
        "without guesses, lookahead bmkit with a Jacobi window alone; transformers, assisted and "
        "prompt-lookup are transformers' own.",
    )
    verify_exact: bool = Field(
        default=False, description="Answer again without guesses, and tell what differs."
    )

    @model_validator(mode="after")
    def _a_rival_has_its_draft(self) -> SpecDecodeRecipe:
        if "assisted" in self.compare and self.draft in {None, "self"}:
            raise contradiction("compare", "`assisted` needs a draft that is a model of its own")
        return self

    @property
    def guesses(self) -> int:
        """Return the most tokens that are guessed at and read in one forward, of all rows."""
        return 64

    def of_draft(self) -> SpecDecodeRecipe:
        """Return how the draft is opened: rounded, without the target's adapters."""
        quant = self.draft_quant
        if quant == "auto":
            on_gpu = self.device.startswith("cuda")
            quant = None if on_gpu and self.draft != "self" else "int8"
        return self.model_copy(update={"quant": quant, "adapters": []})
