"""Passwords in addresses, which are not shown."""

import re

HIDDEN = "***"

# Neither pattern can match twice over one stretch of text, and what may begin anywhere is bounded:
# a long text takes a time that is proportional to its length, whatever it holds.
_IN_TEXT = re.compile(r"://(?P<rest>\S*)")
_WHOLE = re.compile(r"://(?P<rest>.*)", re.DOTALL)
_NAME = (
    r"(?P<name>[?&;][^=&;?#\s]{0,60}?(?:password|passwd|secret|token|key|signature|credential)"
    r"[^=&;?#\s]{0,60}=)"
)
# Databases' drivers take `#` and `;` as parts of a value.
_ASKED_IN_TEXT = re.compile(_NAME + r"[^&\s]*", re.IGNORECASE)
_ASKED_WHOLE = re.compile(_NAME + r"[^&]*", re.IGNORECASE)


def without_password(text: str, *, whole: bool = False) -> str:
    """A text in which the passwords of URLs are replaced by stars.

    They stand between a URL's first colon and its last `@`, and in the values of parameters such
    as `password` and `token`. Databases' drivers take passwords with `/`, `?`, `#` and `@` as they
    are, so that a URL with a port and an `@` further on loses what is between them.

    Args:
        text: any text.
        whole: the text is one URL, in which a password may hold spaces; in other texts a space
            ends a URL.
    """
    if "://" in text and "@" in text:
        text = (_WHOLE if whole else _IN_TEXT).sub(_hidden, text)
    if "=" in text:
        text = (_ASKED_WHOLE if whole else _ASKED_IN_TEXT).sub(rf"\g<name>{HIDDEN}", text)
    return text


def _hidden(found: re.Match[str]) -> str:
    before, at, after = found["rest"].rpartition("@")
    user, colon, _ = before.partition(":")
    host = re.split(r"[/?#]", found["rest"], maxsplit=1)[0]
    if not at or (not colon and "@" not in host):
        return found[0]
    # A name alone may be a token, as in `https://TOKEN@host`; so may one with an `@` behind it.
    kept = f"{user}:{HIDDEN}" if colon and "@" not in user else HIDDEN
    return f"://{kept}@{after}"
