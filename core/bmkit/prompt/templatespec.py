"""What a recipe says of its template. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bmkit.prompt.pointing import PointingAt
from bmkit.prompt.templates import WAYS, parse
from bmkit.recipe import Model, contradiction


class Message(Model):
    """One message of a chat."""

    role: str = Field(description="`system`, `user` or `assistant`; the last one's is `assistant`.")
    content: str = Field(description="A template.")


class TemplateSpec(Model):
    """How a row becomes a prompt: one of `text`, `file_path`, `jinja`, `chat`. See templates.md."""

    text: str | None = Field(default=None, description="A template in OpenPrompt's language.")
    file_path: str | None = Field(default=None, description="A file with one on each line.")
    choice: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        default=0, description="Which line of the file, from 0; `all` of them with `search`."
    )
    jinja: str | None = Field(default=None, description="A template in Jinja, with `{{ mask }}`.")
    chat: list[Message] | None = Field(
        default=None, min_length=1, description="Messages, put through the model's chat template."
    )
    truncate_method: Literal["tail", "head", "balanced"] = Field(
        default="tail", description="Where what may be shortened loses tokens."
    )
    max_seq_length: int = Field(
        default=512, ge=4, description="Tokens of a prompt; the model's context bounds it as well."
    )

    @model_validator(mode="after")
    def _one_that_can_be_read(self) -> TemplateSpec:
        said = [way for way in WAYS if getattr(self, way) is not None]
        if len(said) != 1:
            names = ", ".join(f"`{way}`" for way in WAYS)
            problem = f"it goes without `{said[0]}`" if said else f"one of {names} is required"
            raise contradiction(said[1] if said else "text", problem)
        if said[0] != "file_path":
            with PointingAt(said[0]):
                parse(self.model_dump(include={said[0]}), said[0])
        return self
