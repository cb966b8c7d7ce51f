"""What a recipe says of the words that stand for labels. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bmkit.recipe import Model, contradiction


class VerbalizerSpec(Model):
    """Which words stand for labels."""

    type: Literal[
        "manual",
        "one_to_one",
        "knowledgeable",
        "automatic",
        "soft",
        "prototypical",
        "ptr",
        "generation",
        "none",
    ] = Field(
        default="manual",
        description="`manual`: words of any number of tokens; `one_to_one`: one word for each "
        "label, of one token; `knowledgeable`: many words, of which those are kept that fit; "
        "`automatic`: words that are searched on rows; `soft`: a trained row of the head for "
        "each label; `prototypical`: a point among the states at the mask for each label; `ptr`: "
        "a word for each mask of the template; `generation`: texts that each row has for its "
        "labels; `none`: of tasks without labels.",
    )
    label_words: dict[str, str | list[str]] | list[str | list[str]] | None = Field(
        default=None,
        min_length=1,
        description="Words by label, or lists of words in the order of labels.",
    )
    file_path: str | None = Field(
        default=None,
        description="A file of label words: JSON by label, or text with a line for each label.",
    )
    choice: int = Field(default=0, ge=0, description="Which set of the file, from 0.")
    prefix: str = Field(
        default=" ", description="What is before each word; `<!>` in front of a word keeps it away."
    )
    multi_token_handler: Literal["first", "mean", "max", "likelihood"] = Field(
        default="first",
        description="The score of a word of several tokens: its first one's, their mean or "
        "highest; `likelihood`: of all, each behind those before it, and of what a causal prompt "
        "has behind its mask.",
    )
    combine: Literal["sum", "mean"] = Field(
        default="sum",
        description="Of `likelihood`: a word has that of all of its tokens, or the mean of theirs, "
        "so that long words lose nothing.",
    )
    aggregate: Literal["logarithms", "probabilities"] = Field(
        default="logarithms", description="A label has the mean of its words: of which of both."
    )
    max_token_split: int | None = Field(
        default=None, ge=1, description="Words of more tokens are left out."
    )
    candidate_frac: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Of `knowledgeable`: words with a token in this rarest share of the vocabulary "
        "are left out, by how likely they are at the mask.",
    )
    relevance: float = Field(
        default=1.0,
        ge=0,
        description="Of `knowledgeable`: words that go less with their own label than this, "
        "compared with the others, are left out.",
    )
    num_candidates: int = Field(
        default=1000,
        ge=0,
        description="Of `automatic`: how many of the likeliest tokens are looked at; 0: all.",
    )
    words_per_label: int = Field(
        default=1, ge=1, description="Of `automatic`: how many words a label gets."
    )
    balanced: bool = Field(
        default=True,
        description="Of `automatic`: a label's rows count together as much as all others.",
    )
    word_weights: bool = Field(
        default=False,
        description="With `tune.mode`: how much each word counts for its label is trained.",
    )
    size: int = Field(default=64, ge=1, description="Of `prototypical`: its points' dimensions.")
    epochs: int = Field(
        default=50,
        ge=1,
        description="Of `prototypical` with `tune.mode: none`: passes over the rows' states.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Another learning rate for what `soft`, `prototypical` and `word_weights` "
        "train.",
    )

    @property
    def learns(self) -> bool:
        """Tell whether it can't do without rows that have labels."""
        return self.type in ("automatic", "soft", "prototypical")

    @property
    def reads_states(self) -> bool:
        """Tell whether it works on states at masks, and not on words."""
        return self.type in ("soft", "prototypical")

    @model_validator(mode="after")
    def _words_are_somewhere(self) -> VerbalizerSpec:
        if self.type in ("automatic", "prototypical", "none"):
            for said in ("label_words", "file_path"):
                if getattr(self, said) is not None:
                    raise contradiction(said, f"`{self.type}` finds its own, or has none")
            return self
        if (self.label_words is None) == (self.file_path is None):
            problem = "it goes without `label_words`"
            if self.label_words is None:
                problem = "one of `label_words` and `file_path` is required"
            raise contradiction("file_path" if self.file_path else "label_words", problem)
        words = self.label_words
        listed = list(words.values() if isinstance(words, dict) else words or ())
        if self.type == "one_to_one" and any(len(_listed(own)) != 1 for own in listed):
            raise contradiction("label_words", "`one_to_one` takes one word for each label")
        seen: dict[frozenset[str] | tuple[str, ...], str] = {}
        names = list(words) if isinstance(words, dict) else [f"number {i}" for i in range(99)]
        for name, own in zip(names, listed, strict=False):
            key = tuple(_listed(own)) if self.type == "ptr" else frozenset(_listed(own))
            if key in seen:
                raise contradiction(
                    "label_words", f"`{seen[key]}` and `{name}` have the same words"
                )
            seen[key] = name
        return self


def _listed(own: str | list[str]) -> list[str]:
    return [own] if isinstance(own, str) else own
