"""What travels on the bus."""

import time
import uuid
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, ValidationError, field_validator
from pydantic_core import from_json

from esper.contracts._data import Data, Name, Seconds, Token
from esper.contracts._topics import Topic, topic_of
from esper.contracts._versions import explained, schema_version, upgraded

MAX_MESSAGE_BYTES = 1 << 20


def _new_id() -> str:
    return uuid.uuid4().hex


class OonaMessage(Data):
    """One message, and what carries it needs to know of it."""

    schema_version: Literal[1] = 1
    topic: Topic
    key: Annotated[Name, Field(max_length=200)] = ""
    """Messages of one topic and key are received in the order in which they were published."""
    sender_id: Annotated[Name, Field(max_length=200)]
    message_id: Token = Field(default_factory=_new_id)
    """Published again under the same one, it is the same message."""
    trace_id: Annotated[Name, Field(max_length=200)] = ""
    """What it belongs to, across services."""
    sent_at: Seconds = Field(default_factory=time.time)
    payload: dict[str, JsonValue]
    """As the topic's model in `PAYLOADS` says; a bus does not look into it."""

    @field_validator("payload")
    @classmethod
    def _check_keys(cls, payload: dict[str, JsonValue]) -> dict[str, JsonValue]:
        # pydantic writes keys that are no Unicode as others; it refuses such values by itself.
        "".join(payload).encode()
        return payload

    def to_bytes(self) -> bytes:
        """As a bus carries it.

        Raises:
            MessageError: where that is more than a message may have, or is no JSON.
        """
        try:
            data = self.model_dump_json().encode()
            if data.count(b"[") + data.count(b"{") > _MOST_DEPTH:
                from_json(data)
        except ValueError as error:
            raise _error(self.topic, f"it cannot be written as JSON: {error}") from error
        if len(data) > MAX_MESSAGE_BYTES:
            raise _too_large(self.topic, len(data))
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote.

        Raises:
            MessageError: for what is no message, naming each thing that is wrong.
            SchemaVersionError: for a message of a newer version.
            UnknownTopicError: for one whose topic is unknown here.
        """
        if len(data) > MAX_MESSAGE_BYTES:
            raise _too_large("", len(data))
        try:
            # NaN and infinity are let through by pydantic, in values of any type.
            found = from_json(data, allow_inf_nan=False)
        except ValueError as error:
            raise _error("", f"it is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise _error("", f"it is no JSON object, but a {type(found).__name__}")
        found: dict[str, Any] = found
        if found.get("schema_version") != schema_version(cls):
            found = upgraded(cls, found)
        topic = found.get("topic")
        if isinstance(topic, str):
            found["topic"] = topic_of(topic)
        missing = [name for name in _SENT if name not in found]
        if missing:
            # Their defaults are of messages that are made here.
            raise _error("", f"it lacks {', '.join(missing)}")
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            raise _error("", explained(error)) from error


_SENT = ("topic", "sender_id", "message_id", "sent_at", "payload")
_MOST_DEPTH = 190
"""Brackets within brackets that are read back whatever else there is; a few more may be."""


def _error(topic: str, what: str) -> Exception:
    from esper.errors import MessageError

    about = f" about {topic}" if topic else ""
    return MessageError(f"this is no message{about}: {what}")


def _too_large(topic: str, size: int) -> Exception:
    from esper.errors import MessageError

    about = f" about {topic}" if topic else ""
    return MessageError(
        f"a message{about} has {size:,} bytes, and may have at most {MAX_MESSAGE_BYTES:,}: send"
        " less at once, or put it into the library and send its id"
    )
