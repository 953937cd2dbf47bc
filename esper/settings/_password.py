"""Passwords in addresses, which are not shown."""

import re

HIDDEN = "***"

# All repetitions of what may begin anywhere are bounded: a long text takes a time that is
# proportional to its length, whatever it holds.
_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30}://)(?P<user>[^/?#\s]*)@")
_ASKED = re.compile(
    r"(?P<name>[?&;][^=&;?#\s]{0,60}?(?:password|passwd|secret|token|key|signature|credential)"
    r"[^=&;?#\s]{0,60}=)[^&;#\s]*",
    re.IGNORECASE,
)


def without_password(text: str) -> str:
    """A text in which the passwords of URLs are replaced by stars.

    They stand before the last `@` of a URL's host, which a password may hold itself, and in the
    values of parameters such as `password` and `token`.
    """

    def hidden(found: re.Match[str]) -> str:
        user, colon, _ = found["user"].partition(":")
        # A name alone may be a token: `https://TOKEN@host`.
        kept = f"{user}:{HIDDEN}" if colon else HIDDEN
        return f"{found['scheme']}{kept}@"

    if "://" in text:
        text = _USER.sub(hidden, text)
    return _ASKED.sub(rf"\g<name>{HIDDEN}", text) if "=" in text else text
