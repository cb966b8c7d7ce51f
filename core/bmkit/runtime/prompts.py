"""Rows of a user become token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bmkit.data import chat, rows
from bmkit.data.rows import BadRow, Row
from bmkit.runtime.generate import EVERY
from bmkit.runtime.recipe import GenerateRecipe

ADAPTER = "adapter"
Task = Literal["generate", "score", "encode", "tag"]


@dataclass(frozen=True)
class Prompt:
    """A row that can be used. `number` is its place in the run."""

    number: int
    id: Any
    text: str
    ids: list[int]
    adapter: str | None = EVERY
    """Which adapter answers: a name, None for the model alone, or all of them."""
    scored: int = 0
    """How many of `ids`, at the end, have a likelihood to tell; 0 where it isn't asked for."""
    types: Sequence[int] | None = None
    """Of a pair of texts, which of both each token is in, for models that are told."""
    words: Sequence[str] = ()
    """What gets tags, where words do."""
    places: Sequence[int] = ()
    """Of each word's first token."""


@dataclass(frozen=True)
class Bad:
    """A row that can't be used."""

    number: int
    row: BadRow


class Reader:
    """Tokenises rows of `prompt`, `messages` or `completion`, by a recipe and a chat template."""

    def __init__(
        self,
        tokenizer: Any,
        recipe: GenerateRecipe,
        *,
        context: int | None,
        encoder: bool,
        task: Task,
        adapters: Sequence[str] = (),
        headed: bool = False,
    ) -> None:
        self.tokenizer, self.recipe, self.context = tokenizer, recipe, context
        self.encoder, self.task, self.adapters = encoder, task, adapters
        self.headed = headed
        """Whether an adapter has brought the model's head."""
        self.most: int | None = None
        """Tokens of a row, its answer included, that a budget was planned for."""
        self.raw = recipe.raw or tokenizer.chat_template is None or task != "generate"

    def read(self, number: int, row: Row | BadRow) -> Prompt | Bad:
        """Turn a row into token ids, or say what is wrong with it."""
        if isinstance(row, BadRow):
            return Bad(number, row)
        more: dict[str, Any] = {}
        try:
            if self.task == "tag":
                text, ids, more = self._words(row.values)
                scored = 0
            elif self.task == "encode" and "text_pair" in row.values:
                text, ids, more = self._two(row.values)
                scored = 0
            else:
                text, ids, scored = self._ids(row.values)
            adapter = self._adapter(row.values)
        except ValueError as exc:
            return Bad(number, BadRow(row.line, str(exc)))
        problem = None
        if not ids:
            problem = "the prompt is empty"
        elif self.task == "score":
            problem = None if scored else "there is nothing to score: it has one token"
        elif self.context is not None and len(ids) >= self.context + self.encoder:
            problem = f"the prompt has {len(ids)} tokens, the model reads {self.context}"
        if problem is None and self.most is not None and (need := self._needs(ids)) > self.most:
            problem = f"it takes {need} tokens, the memory budget was planned for {self.most}"
        if problem:
            return Bad(number, BadRow(row.line, problem))
        return Prompt(number, row.values.get("id", number), text, ids, adapter, scored, **more)

    def _needs(self, ids: list[int]) -> int:
        """Return the tokens that are in the cache at the most."""
        answer = self.recipe.max_new_tokens if self.task == "generate" else 0
        return min(len(ids) + answer, self.context or len(ids) + answer)

    def _adapter(self, values: dict[str, Any]) -> str | None:
        if ADAPTER not in values:
            return EVERY
        name = values[ADAPTER]
        if name is None and self.headed:
            raise ValueError("the model alone has no head for this task: it came with an adapter")
        if name is None or name in self.adapters:
            return name if name is None else str(name)
        known = ", ".join(self.adapters) or "none was given"
        raise ValueError(f"`{name}` is no adapter of this run: {known}")

    def _ids(self, values: dict[str, Any]) -> tuple[str, list[int], int]:
        if self.task == "score" and isinstance(values.get("completion"), str):
            return self._pair(values)
        text, ids = self._tokenise(values)
        if self.task != "score":
            return text, ids, 0
        return text, ids, len(ids) if self.encoder else max(len(ids) - 1, 0)

    def _pair(self, values: dict[str, Any]) -> tuple[str, list[int], int]:
        """Tokenise a prompt as it would be answered, and the completion whose likelihood counts."""
        asker = Reader(
            self.tokenizer,
            self.recipe,
            context=None,
            encoder=self.encoder,
            task="generate",
            adapters=self.adapters,
        )
        text, ids = asker._tokenise(values)
        said = rows.require_text(values["completion"])
        more = self.tokenizer(said, add_special_tokens=False)["input_ids"]
        if not more:
            raise ValueError("the completion is empty")
        return text, ids + more, len(more)

    def _two(self, values: dict[str, Any]) -> tuple[str, list[int], dict[str, Any]]:
        """Tokenise a pair of texts, as a model reads it that classifies them."""
        texts = [values.get("text", values.get("prompt")), values["text_pair"]]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(rows.unknown_shape(values, "`text`, `text_pair`"))
        found = self.tokenizer(*[rows.require_text(text) for text in texts])
        return texts[0], found["input_ids"], {"types": found.get("token_type_ids")}

    def _words(self, values: dict[str, Any]) -> tuple[str, list[int], dict[str, Any]]:
        """Tokenise words that are to be tagged: `tokens`, or those of a text."""
        words = values.get("tokens")
        if words is None:
            text = values.get("prompt", values.get("text"))
            if not isinstance(text, str):
                raise ValueError(rows.unknown_shape(values, "`tokens` or `prompt`"))
            words = text.split()
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            raise ValueError("`tokens` is not a list of words")
        found = self.tokenizer([rows.require_text(w) for w in words], is_split_into_words=True)
        owners = found.word_ids()
        places = [owners.index(number) for number in range(len(words)) if number in owners]
        kept = [word for number, word in enumerate(words) if number in owners]
        return " ".join(words), found["input_ids"], {"words": kept, "places": places}

    def _tokenise(self, values: dict[str, Any]) -> tuple[str, list[int]]:
        messages = values.get("messages")
        if self.task == "encode" and messages is None and "prompt" not in values:
            values = {**values, "prompt": values.get("text")}
        if messages is not None:
            if problem := rows.messages_problem(messages):
                raise ValueError(problem)
            if self.raw:
                raise ValueError("it holds `messages`, which need a chat template (and no --raw)")
            text = str(messages[-1]["content"])
        elif isinstance(values.get("prompt"), str):
            text = values["prompt"]
            messages = [{"role": "user", "content": text}]
        else:
            raise ValueError(rows.unknown_shape(values, "`prompt` or `messages`"))
        if self.raw:
            return text, self._start(self.tokenizer(rows.require_text(text))["input_ids"])
        if self.recipe.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.recipe.system}, *messages]
        whole = rows.require_text(chat.render(self.tokenizer, messages, answer=True))
        return text, self.tokenizer(whole, add_special_tokens=False)["input_ids"]

    def _start(self, ids: list[int]) -> list[int]:
        """Drop an end token that some tokenizers put after every text, but for an encoder."""
        if not self.encoder and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            return ids[:-1]
        return ids
