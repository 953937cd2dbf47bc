"""The flat form of a model: a network over explicit parameters, for hot loops."""

from collections.abc import Callable
from typing import Any, NamedTuple

from esper_functional import Network


class FunctionalModel(NamedTuple):
    """A model as the core takes it, for `plan`, `forward` and plain `jax.jit`."""

    net: Network
    """`net(params, site, x)`; where there is `rest`, `net(params, site, (rest, x))` gives
    `(y, rest)`. Keep it: compiled programs are kept by this very object."""
    params: Any
    """What trains: a pytree of the host's parameters."""
    combine: Callable[..., Any]
    """From parameters (and `rest`) back to the host."""
    rest: Any = None
    """The model's other state, such as running statistics; None where it has none."""


def call_layer(layer: Any, *args: Any, **options: Any) -> Any:
    """A layer of a module as the core knows layers: its parameters come first."""
    return layer(*args, **options)
