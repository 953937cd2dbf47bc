"""Getting what a site saw out of the network around it.

A site notes whether its kernels failed, and its network may call it inside of a
transformation of its own: per position of a sequence, say, by `jax.vmap`. What is
noted there must not be a value of that inner map. A map that the whole forward
pass is under, over a population or a batch, is another matter: there each element
keeps its own note.

The two are told apart by what the forward pass was given (its context): a map that
does not map any of it lies inside.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from esper_functional._errors import KasminaException

Context = tuple[Any, ...]
"""Arrays of jax, or of numpy where an eager map hands them through."""


def context_of(*given: Any) -> Context:
    """The arrays that a forward pass was given."""
    leaves = [leaf for leaf in jax.tree.leaves(given) if isinstance(leaf, jax.Array)]
    return tuple(jax.lax.stop_gradient(leaf) for leaf in leaves)


@custom_vmap
def _noted(seen: jax.Array, context: Context) -> jax.Array:
    return seen


@_noted.def_vmap
def _noted_rule(_: int, in_batched: Any, seen: jax.Array, context: Context) -> Any:
    mapped, outside = in_batched[0], any(in_batched[1])
    if mapped and not outside:
        return _noted(jnp.any(seen, axis=0), context), False
    return _noted(seen, context), mapped


@custom_vmap
def _kept(values: jax.Array, context: Context) -> jax.Array:
    return values


@_kept.def_vmap
def _kept_rule(_: int, in_batched: Any, values: jax.Array, context: Context) -> Any:
    # Inside, the mapped axis stays with the values, as one more axis of the batch.
    return _kept(values, context), in_batched[0] and any(in_batched[1])


def note(seen: jax.Array, context: Context) -> jax.Array:
    """A bool, True where any element of the maps inside of the network says so."""
    return _noted(jax.lax.stop_gradient(seen), context)


def keep(values: jax.Array, context: Context) -> jax.Array:
    """An array, with a leading axis for each map inside of the network."""
    return _kept(jax.lax.stop_gradient(values), context)


@custom_vmap
def _closed(y: Any, context: Context) -> Any:
    return y


@_closed.def_vmap
def _closed_rule(_: int, in_batched: Any, y: Any, context: Context) -> Any:
    if any(jax.tree.leaves(in_batched[0])) and not any(in_batched[1]):
        raise KasminaException(
            "jax.vmap maps a value that the network closes over, and nothing that the forward pass"
            " was given, so it cannot be told from a map within the network: give the value to"
            " forward() as a part of x or params"
        )
    return _closed(y, context), in_batched[0]


def check_closed(y: Any, context: Context) -> None:
    """Refuse a map around the forward pass that maps nothing it was given.

    Args:
        y: what the network returned: all maps inside of it are over.

    Raises:
        KasminaException: naming what to do instead.
    """
    leaves = [leaf for leaf in jax.tree.leaves(y) if isinstance(leaf, jax.Array)]
    _closed([jax.lax.stop_gradient(leaf) for leaf in leaves], context)


def stage() -> Any:
    """What identifies the program that is being traced; None outside of any.

    Maps and derivatives pass a constant on to what is around them, and do not count.
    """
    return getattr(jnp.zeros((), jnp.bool_), "_trace", None)


def check_stage(where: str, outer: Any) -> None:
    """Refuse a site that is called inside a transformation which lets nothing out.

    Args:
        outer: the `stage` of the forward pass.

    Raises:
        KasminaException: naming what to do instead.
    """
    if stage() is not outer:
        # jax itself finds a value that escaped when the whole program has been traced, and
        # cannot know where it came from.
        raise KasminaException(
            f"{where} with running kernels was called inside jax.jit, jax.checkpoint, lax.scan or"
            " another transformation within the network, out of which its fault counts cannot be"
            " taken: apply the transformation to the whole of forward(), or pass that part of the"
            " network through lift(site, jax.checkpoint, part)"
        )


@runtime_checkable
class Collecting(Protocol):
    """A site that notes what it sees, and can do so on behalf of another."""

    def inner(self) -> "Collecting":
        """A site like this one, that has seen nothing yet."""
        ...

    def sightings(self) -> Any:
        """What was seen, as a pytree."""
        ...

    def take(self, sightings: Any) -> None:
        """Add what another saw."""
        ...


def lift(site: Any, transform: Callable[..., Any], part: Callable[..., Any]) -> Callable[..., Any]:
    """A part of a network under a transformation of its own, such as `jax.checkpoint`.

    Args:
        site: the network's site.
        transform: a transformation of functions that leaves results as they are, such as
            `jax.checkpoint`, `jax.jit`, or a `functools.partial` of one.
        part: `part(site, *args)`.

    Returns:
        A function of `*args`.
    """
    if not isinstance(site, Collecting):
        return transform(lambda *args: part(site, *args))

    def lifted(*args: Any) -> Any:
        def collected(*args: Any) -> Any:
            inner = site.inner()
            result = part(inner, *args)
            return result, inner.sightings()

        result, seen = transform(collected)(*args)
        site.take(seen)
        return result

    return lifted
