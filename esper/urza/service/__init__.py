"""Urza's HTTP service: a library for a whole laboratory.

Importing this needs none of the packages of the extra `serve`; `make_app` and `serve` do.
"""

from typing import TYPE_CHECKING, Any

from esper.urza.service._limits import Limits
from esper.urza.service._serve import ServiceOptions, serve
from esper.urza.service._tokens import Scope, Token, TokenFile, digest_of, token_of

if TYPE_CHECKING:
    from esper.urza.service._app import make_app

__all__ = [
    "Limits",
    "Scope",
    "ServiceOptions",
    "Token",
    "TokenFile",
    "digest_of",
    "make_app",
    "serve",
    "token_of",
]


def __getattr__(name: str) -> Any:
    if name == "make_app":
        from esper.urza.service._app import make_app

        return make_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
