"""Secrets, which are not written: by the name of a field, by the form of a text, by their value."""

import re
from collections.abc import Mapping
from typing import Any

from esper.settings._password import HIDDEN, without_password

_SECRET_NAME = re.compile(
    r"(^|[_.-])(password|passwd|passphrase|secret|token|api_?key|access_?key|private_?key"
    r"|authorization|cookie|credentials?)([_.-]|s?$)",
    re.IGNORECASE,
)
_PUBLIC = re.compile(r"(_id|_file|_name|_count|_bytes|_seconds)$", re.IGNORECASE)
"""Ends of names that only sound like one: `token_file`, `access_key_id`."""

# Repetitions are bounded, so that a long text takes a time that is proportional to its length.
_BEARER = re.compile(r"\b(bearer|basic)\s{1,9}[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE)
_GIVEN = re.compile(
    r"(?P<name>(?:password|passwd|secret|token|api_?key)[\w.-]{0,40}['\"]?\s{0,9}[=:]\s{0,9})"
    r"(?P<quote>['\"]?)[^\s'\",;&]+(?P=quote)",
    re.IGNORECASE,
)

SHORTEST_SECRET = 6
"""Shorter values are not looked for in texts: they would hide half of them."""


def is_secret_name(name: str) -> bool:
    """Whether a field of that name holds a secret."""
    return _SECRET_NAME.search(name) is not None and _PUBLIC.search(name) is None


class Redaction:
    """Takes secrets out of what is to be written.

    Args:
        secrets: values that are taken out wherever they stand.
    """

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        long = sorted((own for own in secrets if len(own) >= SHORTEST_SECRET), key=len)
        self._known = re.compile("|".join(map(re.escape, reversed(long)))) if long else None

    def text(self, text: str) -> str:
        """A text without secrets."""
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        text = without_password(text)
        text = _BEARER.sub(rf"\1 {HIDDEN}", text)
        return _GIVEN.sub(rf"\g<name>{HIDDEN}", text) if "=" in text or ":" in text else text

    def value(self, name: str, value: Any, depth: int = 0) -> Any:
        """A field's value as JSON, without secrets; what is no JSON is told as text."""
        if is_secret_name(name):
            return HIDDEN
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            return value if value - value == 0.0 else str(value)
        if depth < 6 and isinstance(value, Mapping):
            return {str(key): self.value(str(key), own, depth + 1) for key, own in value.items()}
        if depth < 6 and isinstance(value, list | tuple | set | frozenset):
            return [self.value("", own, depth + 1) for own in value]
        try:
            return self.text(str(value))
        except Exception as error:  # of somebody's __str__
            return f"<{type(value).__name__}: {type(error).__name__}>"
