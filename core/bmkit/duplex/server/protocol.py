"""What clients may say, by the names of the Realtime protocols: JSON objects with a `type`.

Any frame that isn't understood is answered with an `error` event, and changes nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from bmkit.errors import did_you_mean

VERSION = 1
MAX_TEXT = 4000
"""Characters of one piece of text."""
MAX_NAME = 200
"""Characters of what a client calls something."""


@dataclass
class Refused(Exception):
    """A frame that isn't understood: a short code for programs, a sentence for people."""

    code: str
    message: str


class Event(BaseModel):
    """Base of what a client may say."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    event_id: str | None = Field(default=None, max_length=MAX_NAME)
    """Comes back in an error about this event."""


class Options(BaseModel):
    """What a client may choose for its session."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    interrupt: Literal["immediate", "slice"] | None = None
    threshold: float | None = Field(default=None, gt=0, le=1)


class Update(Event):
    """Change how the session goes on."""

    type: Literal["session.update"]
    session: Options


class Append(Event):
    """Words of the user. `t` is the client's own clock in milliseconds, and never goes back."""

    type: Literal["input_text.append"]
    text: str = Field(max_length=MAX_TEXT)
    t: int | None = Field(default=None, ge=0)
    final: bool = True
    rev: int = Field(default=0, ge=0)


class Clear(Event):
    """Forget words that no slice has taken yet."""

    type: Literal["input_text.clear"]


class Cancel(Event):
    """Stop what is being said."""

    type: Literal["response.cancel"]


class Truncate(Event):
    """Say how much of an answer was heard; the rest never was."""

    type: Literal["conversation.item.truncate"]
    response_id: str = Field(max_length=MAX_NAME)
    chars: int = Field(ge=0)


class Ack(Event):
    """Say how much of an answer has been heard so far."""

    type: Literal["playback.ack"]
    response_id: str = Field(max_length=MAX_NAME)
    chars: int = Field(ge=0)


class Heartbeat(Event):
    """Say that the client is there."""

    type: Literal["session.heartbeat"]


class Resume(Event):
    """Come back to a session, as the first thing said; events after `after` are sent again."""

    type: Literal["session.resume"]
    session_id: str = Field(max_length=MAX_NAME)
    resume_token: str = Field(max_length=MAX_NAME)
    after: int = Field(default=0, ge=0)


class Close(Event):
    """End the session."""

    type: Literal["session.close"]


Client = Update | Append | Clear | Cancel | Truncate | Ack | Heartbeat | Resume | Close
NAMES = tuple(get_args(kind.model_fields["type"].annotation)[0] for kind in get_args(Client))
_ADAPTER: TypeAdapter[Client] = TypeAdapter(Annotated[Client, Field(discriminator="type")])


def understand(frame: str | bytes) -> Client:
    """Return what a client has said. Raises Refused."""
    try:
        values = json.loads(frame)
    except (ValueError, RecursionError):
        raise Refused("invalid_json", "a frame is one JSON object") from None
    if not isinstance(values, dict):
        raise Refused("invalid_json", "a frame is one JSON object")
    name = values.get("type")
    if name not in NAMES:
        shown = str(name)[:MAX_NAME]
        near = did_you_mean(shown, NAMES, otherwise=", ".join(NAMES))
        if name is None:
            raise Refused("unknown_event", f"a frame says its `type`: {', '.join(NAMES)}")
        raise Refused("unknown_event", f"`{shown}` is not an event; {near}")
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        raise Refused("invalid_event", f"{name}: `{where}`: {first['msg']}") from None


def error(refused: Refused, event_id: str | None = None) -> dict[str, Any]:
    """Return the event that answers a frame which wasn't understood."""
    values = {"type": "error", "code": refused.code, "message": refused.message}
    return values if event_id is None else {**values, "event_id": event_id}
