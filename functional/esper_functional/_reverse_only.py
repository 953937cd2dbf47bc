"""A mark on arrays that may be differentiated once, backwards.

Containing a kernel's faults takes a reverse rule of its own, which jax can neither
run forwards nor differentiate again. Its own messages about that speak of its
machinery; the mark raises one that says what to do, and leaves nothing in a
program that is differentiated as it may be.
"""

from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from esper_functional._errors import DerivativeError


def _refuse(*_: Any, **__: Any) -> Any:
    raise DerivativeError(
        "a grafted kernel whose faults are contained can be differentiated once, in reverse mode:"
        " not by jax.jvp, jax.jacfwd or jax.linearize's own products, and not twice. Use jax.grad,"
        " jax.vjp or jax.jacrev; or pass contain=False to plan(), which allows every derivative and"
        " leaves the gradients of kernels uncontained"
    )


# A linear identity, which exists between linearisation and transposition alone.
_tangent_p = Primitive("esper_reverse_only")
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda t: t)
mlir.register_lowering(_tangent_p, _refuse)
ad.deflinear2(_tangent_p, lambda cotangent, _: [cotangent])
batching.defvectorized(_tangent_p)


@jax.custom_jvp
def _mark(x: jax.Array) -> jax.Array:
    return x


def _mark_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    return x, t if isinstance(t, SymbolicZero) else _tangent_p.bind(t)


_mark.defjvp(_mark_jvp, symbolic_zeros=True)


def reverse_only(tree: Any) -> Any:
    """`tree`, whose derivatives exist in reverse mode alone.

    Raises:
        DerivativeError: when it is differentiated in forward mode.
    """
    return jax.tree.map(_mark, tree)


@jax.custom_jvp
def _once(x: jax.Array) -> jax.Array:
    return x


_once.defjvp(_refuse)


def once(tree: Any) -> Any:
    """`tree`, which cannot be differentiated.

    Raises:
        DerivativeError: when it is.
    """
    return jax.tree.map(_once, tree)
