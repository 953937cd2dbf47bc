"""Contracts made of what a database holds, or of what a caller gave."""

from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from esper.contracts import Label
from esper.errors import InputError

M = TypeVar("M", bound=BaseModel)
_LABEL: TypeAdapter[str] = TypeAdapter(Label)


def valid(model: type[M], **values: Any) -> M:
    """A contract.

    Raises:
        InputError: for values that it does not take, naming the first.
    """
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "its values"
        raise InputError(
            f"this is no {model.__name__}: {place} is {str(first['input'])[:80]!r}: {first['msg']}"
        ) from error


def checked_label(text: str, what: str) -> str:
    """A name that is stored.

    Raises:
        InputError: for a text that is none.
    """
    try:
        return _LABEL.validate_python(text, strict=True)
    except ValidationError as error:
        raise InputError(
            f"{str(text)[:80]!r} is no name of a {what}: expected 1 to 200 characters without line"
            " breaks"
        ) from error
