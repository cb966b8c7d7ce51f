"""Templates that are chats: messages, put through the chat template that the model came with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bmkit.data import chat, rows
from bmkit.errors import RecipeError
from bmkit.prompting.jinja import cut_blanks
from bmkit.prompting.pieces import Piece, Scaffold
from bmkit.prompting.template import NO_MASK, Named, Template, parse


@dataclass(frozen=True)
class Chat:
    """Messages whose words are templates; the last one is the model's, and has the masks."""

    messages: tuple[tuple[str, Template], ...]
    where: str = "chat"

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the keys that a row needs, each once."""
        return tuple(dict.fromkeys(name for _, t in self.messages for name in t.fields))

    def require_mask(self) -> Chat:
        """Return the chat. Raises RecipeError if it has no mask."""
        if not self.messages[-1][1].masks:
            hint = "its last message is {role: assistant, content: '{\"mask\"}'}"
            raise RecipeError(f"{self.where}: {NO_MASK}", hint=hint)
        return self

    def template(self, tokenizer: Any) -> Template:
        """Return it as one template, as the tokenizer's chat template writes it.

        What would follow the last message is left out: the model is about to say it. Raises
        RecipeError if there is no chat template, or it changes or refuses the messages.
        """
        if tokenizer.chat_template is None:
            hint = "use template.text"
            raise RecipeError(f"{self.where}: the model has no chat template", hint=hint)
        marks = [f"message-{n}-of-the-chat" for n in range(len(self.messages))]
        told = [
            {"role": role, "content": mark}
            for (role, _), mark in zip(self.messages, marks, strict=True)
        ]
        try:
            text = chat.render(tokenizer, told, answer=False)
        except ValueError as exc:
            raise RecipeError(f"{self.where}: {exc}") from None
        places = [text.find(mark) for mark in marks]
        once = all(text.count(mark) == 1 for mark in marks)
        if not once or places != sorted(places):
            problem = "the model's chat template doesn't leave the messages as they are"
            raise RecipeError(f"{self.where}: {problem}", hint="use template.text")
        found: list[Piece] = []
        space = False
        for (_, template), mark in zip(self.messages, marks, strict=True):
            before, _, text = text.partition(mark)
            opens, words, space = cut_blanks(before, space)
            if words:
                found.append(Scaffold(words, opens))
            for number, piece in enumerate(template.pieces):
                found.append(replace(piece, space=space) if number == 0 else piece)
                space = False
        return Template(tuple(found), self.where)


def parse_chat(messages: Sequence[Mapping[str, Any]], where: str = "chat") -> Chat:
    """Read messages of `role` and `content`, a template each.

    Trainable tokens are shared over messages by their `soft_id`. Raises RecipeError that names the
    message.
    """
    if problem := rows.messages_problem(list(messages)):
        raise RecipeError(f"{where}: {problem}")
    named: Named = {}
    found: list[tuple[str, Template]] = []
    for number, message in enumerate(messages):
        place = f"{where}.{number}.content"
        template = parse(message["content"], place, named=named)
        if template.masks and (number < len(messages) - 1 or message["role"] != "assistant"):
            problem = "a mask can only be in the last message, the assistant's"
            raise RecipeError(f"{place}: {problem}")
        found.append((message["role"], template))
    if found[-1][0] != "assistant":
        hint = "add {role: assistant, content: '{\"mask\"}'}"
        raise RecipeError(f"{where}: the last message is not the assistant's", hint=hint)
    return Chat(tuple(found), where)
