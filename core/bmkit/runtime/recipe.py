"""What recipes of stages that generate text may say: GenerationConfig's names. No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from bmkit import env
from bmkit.errors import UsageError
from bmkit.recipe import Recipe, contradiction


class GenerateRecipe(Recipe):
    """How text is generated, and in what memory."""

    METRICS: ClassVar = ()

    kind: str
    max_new_tokens: int = Field(default=256, ge=1, description="Most tokens of an answer.")
    do_sample: bool | None = Field(
        default=None,
        description="Draw tokens at random; if not given, when temperature is above 0.",
    )
    temperature: float | None = Field(
        default=None, ge=0, description="Sharpness of the draw: 0 is greedy, 1 is the model's own."
    )
    top_k: int = Field(default=0, ge=0, description="Draw among the k likeliest; 0 is all.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Draw among the likeliest that make up this share."
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Leave out what is less likely than this share of the top.",
    )
    typical_p: float = Field(
        default=1.0, gt=0, le=1, description="Draw among the most typical that make up this share."
    )
    epsilon_cutoff: float = Field(
        default=0.0, ge=0, lt=1, description="Leave out what is less likely than this."
    )
    eta_cutoff: float = Field(
        default=0.0, ge=0, lt=1, description="The same, with less left out where much is likely."
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, description="Above 1, tokens that were there before become less likely."
    )
    no_repeat_ngram_size: int = Field(
        default=0, ge=0, description="No run of so many tokens is said twice; 0: any may be."
    )
    min_new_tokens: int = Field(default=0, ge=0, description="Fewest tokens of an answer.")
    bad_words_ids: list[list[int]] = Field(
        default=[], description="Runs of token ids that are never said."
    )
    sequence_bias: list[tuple[list[int], float]] = Field(
        default=[], description="Pairs of a run of token ids and what is added to its score."
    )
    suppress_tokens: list[int] = Field(default=[], description="Token ids that are never said.")
    begin_suppress_tokens: list[int] = Field(
        default=[], description="Token ids that no answer begins with."
    )
    exponential_decay_length_penalty: tuple[int, float] | None = Field(
        default=None, description="After so many tokens, an end grows likelier by this factor each."
    )
    stop_strings: list[str] = Field(default=[], description="The answer ends before any of these.")
    system: str | None = Field(default=None, description="A system prompt for every chat.")
    raw: bool = Field(default=False, description="Send prompts as they are, without chat template.")
    quant: Literal["int8", "int4", "w8a8"] | None = Field(
        default=None,
        description="Round weights while they are loaded, for this run: int8 with a scale a row, "
        "int4 with one per 64 inputs; embedding and head to int8 in all. w8a8, on a GPU, also "
        "rounds what goes into the int8 products, a scale a token.",
    )
    cache: Literal["auto", "dynamic", "static"] = Field(
        default="auto",
        description="Keys and values in memory that grows, or of a fixed size, for which "
        "transformers compiles the decode step into a CUDA graph. auto: static on a GPU for files "
        "of many prompts. In spec-decode it is bmkit that records a graph for each size of a "
        "forward, and auto is static on a GPU.",
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Add each token's log-probability to the JSON, and so many of the likeliest.",
    )
    gpu_memory: str | None = Field(
        default=None, description="A budget on the GPU for everything, as 6GiB."
    )
    cpu_memory: str | None = Field(
        default=None, description="A budget in RAM for what comes on top of the libraries."
    )
    adapters: list[str] = Field(default=[], description="Deltas to put on the model.")
    batch_size: int = Field(default=8, ge=1, description="Prompts that are answered together.")

    @property
    def scores(self) -> bool:
        """Tell whether given text is scored, and none made."""
        return False

    @property
    def guesses(self) -> int:
        """Return the most tokens that are guessed at and read in one forward, of all rows."""
        return 0

    def of_draft(self) -> GenerateRecipe:
        """Return how a draft of this recipe is opened."""
        return self

    @property
    def sampled(self) -> bool:
        """Tell whether tokens are drawn at random."""
        if self.do_sample is not None:
            return self.do_sample
        return bool(self.temperature)

    @field_validator("gpu_memory", "cpu_memory", mode="before")
    @classmethod
    def _is_a_size(cls, value: object) -> object:
        if type(value) is int:
            value = str(value)  # bytes
        if isinstance(value, str):
            try:
                env.parse_bytes(value)
            except UsageError as exc:
                raise PydanticCustomError("size", "{text}", {"text": str(exc)}) from None
        return value

    @model_validator(mode="after")
    def _draws_agree(self) -> GenerateRecipe:
        if self.do_sample and self.temperature == 0:
            raise contradiction("temperature", "do_sample is true, but temperature 0 is greedy")
        if "" in self.stop_strings:
            raise contradiction(
                "stop_strings", "an empty stop string would end every answer at once"
            )
        return self
