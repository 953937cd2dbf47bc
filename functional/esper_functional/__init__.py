"""The functional core of Esper: numpy and jax, no effects.

What a seed is, is data: `SeedState`, an immutable pytree that only pure
functions change, one recorded `Event` at a time. What runs, is a static `Plan`
read off that data.

Importing it costs nothing: jax is imported with the first of its names that is used, but for
`KasminaException`, the root of all errors, which those name too that compute nothing.
"""

from typing import TYPE_CHECKING, Any

from esper_functional._errors import KasminaException as KasminaException

if TYPE_CHECKING:
    from esper_functional._api import *  # noqa: F403
    from esper_functional._api import __all__ as __all__


def __getattr__(name: str) -> Any:
    if name == "__all__" or not name.startswith("_"):
        from esper_functional import _api

        if name == "__all__" or name in _api.__all__:
            return getattr(_api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
