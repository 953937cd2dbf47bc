"""Esper grows neural networks while they train.

Importing it costs nothing: torch and jax are imported by the parts that use them.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper._wrap import export_plain, unwrap, wrap

__all__ = ["export_plain", "unwrap", "wrap"]

try:
    __version__ = version("esper-morphogenetic")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from esper import _wrap

        return getattr(_wrap, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
