"""From an answer that is none to the error that the library itself would have raised."""

import email.utils
import time
from collections.abc import Mapping

from pydantic import ConfigDict, ValidationError

import esper
from esper import errors
from esper.contracts import Data
from esper.errors import InputError, LibraryError, SchemaVersionError, ServiceUnavailableError
from esper.urza._wire import VERSION_HEADER, Problem
from esper.urza.client._messages import Answer
from esper_functional import KasminaException

_LONGEST_SHOWN = 200
AWAY = (502, 503, 504)
"""Statuses by which a service, or what stands before it, says that it cannot work now."""
LATER = (*AWAY, 408, 429)
"""Statuses after which the same request may succeed."""


class _Told(Problem):
    """A problem as a service of any version tells it: members that are not known are passed over.

    RFC 9457 asks that of clients.
    """

    model_config = ConfigDict(extra="ignore")


def began_nothing(answer: Answer) -> bool:
    """Whether a service says that what was asked was not begun, so that it may be asked again."""
    try:
        return _Told.model_validate_json(answer.content).begun is False
    except ValidationError:
        return False


def error_of(url: str, answer: Answer) -> Exception:
    """What to raise for an answer that is a problem.

    Args:
        url: of the service, for messages.
    """
    version = answer.headers.get(VERSION_HEADER.lower())
    try:
        problem = _Told.model_validate_json(answer.content)
    except ValidationError:
        return _not_ours(url, answer)
    kind = getattr(errors, problem.error, None)
    if not (isinstance(kind, type) and issubclass(kind, KasminaException)):
        kind = LibraryError
    advice = other_version(version) if issubclass(kind, InputError) else ""
    return kind(problem.detail + advice)


def unreadable(url: str, model: type[Data], answer: Answer, error: InputError) -> Exception:
    """What to raise for an answer that is no such data."""
    advice = other_version(answer.headers.get(VERSION_HEADER.lower()))
    kind = SchemaVersionError if isinstance(error, SchemaVersionError) else LibraryError
    return kind(f"what {url} answered is no {model.__name__}: {error}{advice}")


def other_version(version: str | None) -> str:
    """What to say where another version of Esper answers."""
    if version is None or version == esper.__version__:
        return ""
    return (
        f" The service is Esper {version[:40]}, and this is Esper {esper.__version__}: update the"
        " older one."
    )


def _not_ours(url: str, answer: Answer) -> Exception:
    came = f"{answer.status} with {answer.headers.get('content-type', 'no content')[:60]}"
    if answer.status in AWAY or answer.status == 429:
        return ServiceUnavailableError(
            f"the library at {url} cannot be asked now: {came} came from what stands before it"
        )
    if 300 <= answer.status < 400:
        where = answer.headers.get("location", "nowhere")[:_LONGEST_SHOWN]
        return InputError(
            f"the library is not at {url}, which leads to {where!r}: give the address of the"
            " service itself, because the token is sent to no other"
        )
    return InputError(
        f"what answers at {url} is no library of Esper's: {came} came; give the address that"
        " `esper serve` tells"
    )


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that the service asks to be left alone; 0 where it does not say."""
    told = headers.get("retry-after", "").strip()
    if told.isascii() and told.isdecimal():
        return float(told[:9])
    try:
        moment = email.utils.parsedate_to_datetime(told)
    except (ValueError, TypeError):
        return 0.0
    return max(0.0, moment.timestamp() - time.time())
