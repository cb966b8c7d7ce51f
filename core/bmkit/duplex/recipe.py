"""What a duplex recipe may say: of building data, and of running a session. No torch here."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from bmkit import builtin
from bmkit.duplex import figures
from bmkit.duplex.kinds import MIX
from bmkit.errors import did_you_mean
from bmkit.recipe import Model, Recipe, contradiction
from bmkit.runtime.recipe import GenerateRecipe

Format = Literal["auto", "messages", "conversations", "duplex_ultrachat"]


class SliceSpec(Model):
    """How long a slice is, and how much is said in it."""

    period_ms: int = Field(default=1000, ge=100, le=60_000, description="Milliseconds of a slice.")
    user_words: list[int] = Field(
        default=[2, 4],
        min_length=2,
        max_length=2,
        description="Fewest and most words that a user says in a slice.",
    )
    agent_tokens: int = Field(
        default=10,
        ge=1,
        le=1024,
        description="Most tokens that the agent says in a slice; data are divided by an estimate, "
        "and anew by the model's own tokens.",
    )

    @model_validator(mode="after")
    def _from_few_to_many(self) -> SliceSpec:
        fewest, most = self.user_words
        if not 1 <= fewest <= most:
            raise contradiction("user_words", f"{fewest} to {most} words are no range from 1 up")
        return self


class Source(Model):
    """A file of chats."""

    path: str = Field(description="JSON lines.")
    format: Format = Field(
        default="auto",
        description="`messages`; `conversations` with `from` and `value`; `duplex_ultrachat`: "
        "slices, taken as they are; `auto` looks at each row.",
    )
    limit: int | None = Field(default=None, ge=1, description="Rows that are read of it.")
    kind: str = Field(
        default="imported",
        description="Of `duplex_ultrachat`: what its dialogues are said to show.",
    )


class HeldOut(Model):
    """Shares that are kept for `dev` and `test`; no chat and no transition is in two of them."""

    dev: float = Field(default=0.05, ge=0, lt=1, description="Share of chats in `dev.jsonl`.")
    test: float = Field(default=0.05, ge=0, lt=1, description="Share of chats in `test.jsonl`.")
    transitions: float = Field(
        default=0.15, ge=0, lt=0.5, description="Share of each list's items for each of the two."
    )

    @model_validator(mode="after")
    def _something_is_left(self) -> HeldOut:
        if self.dev + self.test >= 1:
            raise contradiction("test", "`dev` and `test` leave nothing to train on")
        return self


class Policy(Model):
    """When the agent speaks."""

    type: Literal["threshold", "argmax"] = Field(
        default="threshold",
        description="`threshold`: if silence is less likely than `tau`; `argmax`: if it isn't the "
        "likeliest.",
    )
    tau: float | None = Field(
        default=None, gt=0, lt=1, description="If not given, what was calibrated with the model."
    )
    max_wait_slices: int | None = Field(
        default=2,
        ge=1,
        description="Silent slices behind words of the user after which the agent has to answer; "
        "none: it never has to.",
    )
    on_max_wait: Literal["rewind", "speak"] = Field(
        default="rewind",
        description="`rewind`: go back to the slice that ended the query, and answer there; "
        "`speak`: answer in the present one.",
    )
    sure: float = Field(
        default=0.995,
        ge=0,
        le=1,
        description="It never has to where it found silence likelier than this: it was told to be "
        "silent, or the user goes on.",
    )
    cooldown_slices: int = Field(
        default=0, ge=0, description="Slices of silence after an interruption."
    )
    interrupt: Literal["immediate", "slice"] = Field(
        default="immediate",
        description="Words of the user stop the agent within a token, or at the slice's end.",
    )


class Kv(Model):
    """How much of a session is remembered."""

    eviction: Literal["window", "none"] = Field(
        default="window",
        description="`window`: whole slices are forgotten, before there are `high` tokens, down to "
        "`low`, and what is left is read anew; `none`: the session ends there.",
    )
    sink_tokens: int = Field(
        default=4, ge=0, description="Tokens at the beginning whose slices stay."
    )
    high: int = Field(default=3000, ge=16, description="Tokens at which something has to go.")
    low: int = Field(default=2000, ge=8, description="Tokens that are left then.")
    ahead_tokens: int = Field(
        default=128,
        ge=0,
        description="What is left is read beside the session, so many tokens in each slice, at a "
        "further place that all sessions share; 0: at once, when the session is full.",
    )
    revisable_slices: int = Field(
        default=8, ge=1, description="Slices within which words may turn out to be others."
    )

    @model_validator(mode="after")
    def _low_is_lower(self) -> Kv:
        if self.low >= self.high:
            raise contradiction("low", f"{self.low} is not below `high`, {self.high}")
        return self


class SamplingSpec(Model):
    """How the agent's words are drawn."""

    temperature: float = Field(default=0.0, ge=0, description="0 takes the likeliest token.")
    top_p: float = Field(default=0.8, gt=0, le=1, description="Share of probability drawn from.")
    greedy_decision: bool = Field(
        default=True, description="Whether to speak is decided without drawing."
    )
    prompt_lookup_num_tokens: int = Field(
        default=0,
        ge=0,
        le=32,
        description="Tokens of what was said before that are read along while the agent speaks, as "
        "guesses at what comes next: it says the same in fewer forwards.",
    )


class EvalSpec(Model):
    """What is measured."""

    suites: list[Literal["decision", "replay", "simulate", "retain"]] = Field(
        default=["decision", "replay", "simulate"],
        min_length=1,
        description="`decision`: on what was really said; `replay`: at fixed times; `simulate`: "
        "with a user who reacts; `retain`: ordinary tasks before and after.",
    )
    window_slices: int = Field(
        default=3, ge=1, description="Slices behind a query within which an answer counts."
    )
    limit: int | None = Field(default=None, ge=1, description="Dialogues that are looked at.")
    data: str | None = Field(
        default=None,
        description="Dialogues in slices, which no training has seen. None: bmkit's own, written "
        "by hand; `--data` takes their place.",
    )
    chats: str | None = Field(
        default=None, description="Of `retain`: chats whose loss is measured. None: bmkit's own."
    )
    questions: str | None = Field(
        default=None,
        description="Of `retain`: rows of `prompt`, `choices` and `answer`. None: bmkit's own.",
    )
    before: str | None = Field(
        default=None,
        description="Of `retain`: the model as it was before. A delta's base needn't be named.",
    )


class Serve(Model):
    """Where and for how many sessions to listen."""

    host: str = Field(default="127.0.0.1", description="The address to listen on.")
    port: int = Field(default=8765, ge=0, le=65_535, description="0 takes a free one.")
    max_sessions: int = Field(default=4, ge=1, description="Sessions at one time.")
    queue: int = Field(default=16, ge=0, description="Clients that may wait for one.")
    idle_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="Seconds without a word of either side after which a session ends.",
    )
    auth: Literal["none", "token"] = Field(
        default="none", description="`token`: clients say one that is written at the start."
    )
    origins: list[str] = Field(default=[], description="Pages of other hosts that may connect.")


class DuplexRecipe(Recipe):
    """`bmkit duplex`."""

    METRICS: ClassVar = (
        "dialogues",
        "train_dialogues",
        "dev_dialogues",
        "test_dialogues",
        "slices",
        "idle_ratio",
        "decision_balance",
        "unpunctuated_share",
        "duplicate_rate",
        "leaked_chats",
        "leaked_turns",
        "leaked_transitions",
        "rows_read",
        "rows_skipped",
        *figures.METRICS,
    )
    FILES: ClassVar = (
        "sources.*.path",
        "transitions",
        "eval.data",
        "eval.chats",
        "eval.questions",
    )
    MODELS: ClassVar = ("eval.before",)

    kind: Literal["duplex"]
    scheme: Literal["idle", "state", "minicpm"] = Field(
        default="idle",
        description="Marks of slices: `idle`, one token for silence (arXiv 2406.15718); `state`, "
        "a token for what the user does; `minicpm`, the layout of the published model.",
    )
    slice: SliceSpec = SliceSpec()
    sources: list[Source] = Field(
        default=[], description="Chats to build from; `--data` takes their place."
    )
    transitions: str | None = Field(
        default=None,
        description="A JSON file of what is said to stop, to rephrase, to change the topic, …: a "
        "list for each. None: bmkit's own.",
    )
    mix: dict[str, float] = Field(
        default_factory=lambda: dict(MIX), description="Shares of the interactions."
    )
    unpunctuated: float = Field(
        default=0.5, ge=0, le=1, description="Share of dialogues whose user has no punctuation."
    )
    disfluent: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Share of queries with fillers or repetitions; fewer have words ahead of "
        "them, or a courtesy behind.",
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Dialogues in all: chats are used several times if there are fewer, each time "
        "otherwise. None: each chat once.",
    )
    max_slices: int = Field(
        default=96, ge=8, description="Slices of a dialogue; what is behind them is left out."
    )
    held_out: HeldOut = HeldOut()
    export: Literal["none", "duplex_ultrachat"] = Field(
        default="none", description="Write the rows in the form of Duplex-UltraChat as well."
    )
    policy: Policy = Policy()
    kv: Kv = Kv()
    sampling: SamplingSpec = SamplingSpec()
    eval: EvalSpec = EvalSpec()
    serve: Serve = Serve()
    quant: Literal["int8", "int4", "w8a8"] | None = Field(
        default=None, description="Round weights while they are loaded, for this run."
    )
    gpu_memory: str | None = Field(
        default=None, description="A budget on the GPU for everything, as 6GiB."
    )
    cpu_memory: str | None = Field(
        default=None, description="A budget in RAM for what comes on top of the libraries."
    )
    adapters: list[str] = Field(default=[], description="Deltas to put on the model.")

    def places(self, sessions: int) -> int:
        """Return how many caches so many sessions have: one is for what stays of one of them."""
        return sessions + (self.kv.eviction == "window" and self.kv.ahead_tokens > 0)

    def generating(self, sessions: int) -> GenerateRecipe:
        """Return how a model for so many sessions is opened."""
        return GenerateRecipe(
            kind=self.kind,
            seed=self.seed,
            device=self.device,
            dtype=self.dtype,
            max_new_tokens=self.kv.high,
            batch_size=self.places(sessions),
            quant=self.quant,
            gpu_memory=self.gpu_memory,
            cpu_memory=self.cpu_memory,
        )

    @model_validator(mode="before")
    @classmethod
    def _own_transitions(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("transitions") is None:
            ours = builtin.directory() / "data" / "duplex-transitions.json"
            return {**values, "transitions": str(ours)}
        return values

    @field_validator("mix")
    @classmethod
    def _known_interactions(cls, mix: dict[str, float]) -> dict[str, float]:
        for name, share in mix.items():
            if name not in MIX:
                near = did_you_mean(name, MIX, otherwise=f"there are: {', '.join(MIX)}")
                raise contradiction(name, f"`{name}` is not an interaction; {near}")
            if share < 0:
                raise contradiction(name, f"`{name}` has a share below 0")
        if not sum(mix.values()) > 0:
            raise ValueError("the shares of `mix` sum to 0: nothing would be built")
        return mix
