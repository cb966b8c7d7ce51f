"""`infer` on a prompt that says texts: rows in, each with its text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from bmkit import model as models
from bmkit.data.tabular import Record
from bmkit.plan import Job
from bmkit.prompt import texts
from bmkit.prompt.answer import Asked, Session
from bmkit.prompting.encode import Encoded
from bmkit.prompting.wrap import show
from bmkit.runtime.answered import Answered, how_to
from bmkit.runtime.recipe import GenerateRecipe


class Said(Answered):
    """One row and its text, which is whole before it is written."""

    streamed: ClassVar = False

    def line(self) -> str:
        """Return what is printed as text."""
        return self.answer.text.strip()


class TextSession(Session):
    """A prompt on its model, that says texts. Rows are answered as `infer` does."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        recipe = job.recipe
        assert isinstance(recipe, GenerateRecipe)  # the registry pairs recipe and engine
        own = self.kept.generate
        how = how_to(recipe, min(recipe.max_new_tokens, own.max_new_tokens))
        least = max(recipe.min_new_tokens, own.min_new_tokens)
        more = {**how.more, "min_new_tokens": least} if least else how.more
        self.how = replace(how, stop_strings=(*how.stop_strings, *own.stop_strings), more=more)
        config = models.load_generation_config(job.checkpoint)
        self.forced = getattr(config, "forced_bos_token_id", None)

    def _encoded(self, record: Record) -> list[Encoded]:
        values = {k: v for k, v in record.values.items() if k != texts.TARGET}
        bare = replace(record, values=values)
        most = self.kept.generate.max_new_tokens
        return [*texts.aimed(self.only.prompts, [bare], self.kept.model_kind, most, self.forced)]

    def _tell(self, asked: list[Asked]) -> Sequence[Any]:
        prompts = [prompt for found in asked for prompt in found.encoded]
        said = texts.answers(
            self.asker,
            self.tokenizer,
            prompts,
            self.how,
            self.batch_size,
            numbers=[found.number for found in asked],
        )
        return [
            Said(found.id, self._shown(found.record), answer)
            for found, answer in zip(asked, said, strict=True)
        ]

    def _shown(self, record: Record) -> str:
        """Return the prompt for people to read, without its mask."""
        return show([part for part in self.only.prompts.wrap(record) if part.role != "mask"])
