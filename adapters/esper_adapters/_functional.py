"""The flat form of a model: a network over explicit parameters, for hot loops."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from esper_functional import (
    Live,
    Network,
    Plan,
    forward,
    forward_batch,
    shadow_forward,
    shadow_forward_batch,
)

Call = Callable[..., Any]
"""`call(module, *args)`: how a model is run on a batch, where that is not the usual way: with a
key, with a state, under another axis name."""


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


class StaticTree(NamedTuple):
    """What is no array of a tree: hashable."""

    structure: Any
    others: tuple[Any, ...]


_ARRAY = object()
"""Where an array was."""


def split_arrays(tree: Any) -> tuple[list[Any], StaticTree]:
    """The arrays of a tree, and the rest, such as a flag; for `join_arrays`."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    return arrays, StaticTree(structure, tuple(_ARRAY if _is_array(x) else x for x in leaves))


def join_arrays(arrays: Sequence[Any], static: StaticTree) -> Any:
    """The tree again, with other arrays in the old places."""
    rest = iter(arrays)
    leaves = [next(rest) if other is _ARRAY else other for other in static.others]
    return jax.tree.unflatten(static.structure, leaves)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def forward_and_faults(
    net: Network, plan: Plan, params: Any, live: Live | None, x: Any, *, batched: bool = False
) -> tuple[Any, tuple[Any, ...]]:
    """The output, and of each running kernel whether it failed, in its shadow if it incubates.

    Args:
        batched: whether `net` takes one example, and `x` has a leading axis of examples.
    """
    run, shadow = (forward_batch, shadow_forward_batch) if batched else (forward, shadow_forward)
    y, seen = run(net, plan, params, live, x)
    _, hidden = shadow(net, plan, params, live, x)
    pairs = zip(seen.faults, hidden.faults, strict=True)
    return y, tuple(shadow if fault is None else fault for fault, shadow in pairs)


def call_layer(layer: Any, *args: Any, **options: Any) -> Any:
    """A layer of a module as the core knows layers: its parameters come first."""
    return layer(*args, **options)
