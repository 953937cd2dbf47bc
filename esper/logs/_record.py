"""A record as data: what every format is made of."""

import logging
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, NamedTuple

from esper.logs._fields import bound_fields
from esper.logs._redact import Redaction

FIELDS = "esper_fields"
_OWN = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "color_message", FIELDS}
"""Attributes that are no fields: a record's own, two that formatters of other handlers set, and
uvicorn's, which is its message once more, with colours."""

MOST_FRAMES = 30


class Entry(NamedTuple):
    """One record, without secrets; everything in it is JSON."""

    time: datetime
    level: str
    logger: str
    message: str
    fields: dict[str, Any]
    error: dict[str, Any] | None
    """Type, message and stack of an exception, and under `cause` what it came from."""


class Pending(NamedTuple):
    """What a caller leaves behind: holds no frame of its stack, and nothing that may change."""

    created: float
    level: str
    logger: str
    message: str
    fields: Mapping[str, Any]
    error: traceback.TracebackException | None


_PLAIN = (str, int, float, bool, type(None))


def _kept(value: Any) -> Any:
    """A value that does not change when the caller goes on."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {key: _kept(own) for key, own in list(value.items())}
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_kept(own) for own in list(value))
    try:
        return str(value)
    except Exception as error:  # of somebody's __str__
        return f"<{type(value).__name__}: {type(error).__name__}>"


def pending(record: logging.LogRecord) -> Pending:
    """Take of a record what is written later, in its caller's thread and context."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError) as error:
        message = f"{record.msg} (its arguments do not fit: {error})"
    # The standard library keeps its `extra` among the record's own attributes.
    more = {name: value for name, value in record.__dict__.items() if name not in _OWN}
    own: Mapping[str, Any] = getattr(record, FIELDS, {})
    fields = {name: _kept(value) for name, value in {**bound_fields(), **more, **own}.items()}
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    told = None if error is None else _without_frames(error, error.__traceback__)
    return Pending(record.created, record.levelname, record.name, message, fields, told)


def _without_frames(
    error: BaseException, trace: TracebackType | None
) -> traceback.TracebackException:
    # Lines of source are read from the disk when it is written, not here.
    return traceback.TracebackException(
        type(error), error, trace, limit=-MOST_FRAMES, lookup_lines=False, compact=True
    )


def entry(pending: Pending, redaction: Redaction) -> Entry:
    """What is written of a record."""
    fields = {name: redaction.value(name, value) for name, value in pending.fields.items()}
    return Entry(
        datetime.fromtimestamp(pending.created, UTC),
        pending.level.lower(),
        pending.logger,
        redaction.text(pending.message),
        fields,
        None if pending.error is None else _error(pending.error, redaction),
    )


def _error(
    error: traceback.TracebackException, redaction: Redaction, depth: int = 0
) -> dict[str, Any]:
    message = "".join(error.format_exception_only()).strip()
    kind, _, text = message.partition(": ")
    found: dict[str, Any] = {
        "type": kind.partition("\n")[0],
        "message": redaction.text(text),
        "stack": [f"{own.filename}:{own.lineno} {own.name}" for own in error.stack],
    }
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and depth < 4:
        found["cause"] = _error(cause, redaction, depth + 1)
    return found
