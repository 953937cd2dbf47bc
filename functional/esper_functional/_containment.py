"""Running a kernel so that it cannot poison its host.

A kernel's output that is not finite is caught per example and replaced where it
is blended; its gradients are caught here, because a select in the forward pass
alone still multiplies zero by NaN on the way back:

- to the input: zero for every example whose output or whose own gradient is
  not finite;
- to the parameters: zero for a whole call if any of its examples' outputs was
  not finite (their gradient is a sum over examples, and cannot be split); and
  each number of it that is not finite itself.

Under `jax.vmap` a mapped axis is folded into the batch, so that programs
without batching rules (deserialised ones) run at the price of one call. The
gradient of the parameters is then needed for each mapped element by itself,
because nothing tells a gradient inside the map from one outside of it; it comes
from the program's mappable form, or from a loop where it has none. A caller who
does know that the map is inside the gradient (`forward_batch`) asks for the sum
over the mapped axis, which costs no more than a plain batch.

Contained kernels can be differentiated once, in reverse mode; a plan made with
`contain=False` runs them as they are, with every derivative there is.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from esper_functional._kernel import Params, Program
from esper_functional._reverse_only import once, reverse_only

Apply = Callable[[Params, jax.Array], jax.Array]


def _examples_finite(x: jax.Array, rank: int) -> jax.Array:
    """Which examples are finite: `[batch, 1, ...]`, broadcasts against x."""
    lead = x.shape[: x.ndim - rank]
    flat = x.reshape((*lead, math.prod(x.shape[len(lead) :])))
    # Zero times what is not finite is NaN. A product with zeros reads x once and writes one
    # number an example; isfinite and all() cost three passes more, up to 40 % of a small step.
    zeros = jnp.zeros(flat.shape[-1:], x.dtype)
    total = jnp.matmul(flat, zeros, precision=jax.lax.Precision.HIGHEST)
    return (total == 0).reshape((*lead, *(1,) * rank))


def _finite(d: jax.Array) -> jax.Array | bool:
    """Which numbers of a gradient are finite; those of integers have no numbers."""
    return jnp.isfinite(d) if jnp.issubdtype(d.dtype, jnp.inexact) else True


def _fold(x: jax.Array) -> jax.Array:
    return x.reshape((x.shape[0] * x.shape[1], *x.shape[2:]))


def _unfold(x: jax.Array, size: int) -> jax.Array:
    return x.reshape((size, x.shape[0] // size, *x.shape[1:]))


def _all_mapped(size: int, in_batched: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with every leaf mapped."""
    return jax.tree.map(
        lambda leaf, hit: leaf if hit else jnp.broadcast_to(leaf, (size, *leaf.shape)),
        args,
        tuple(in_batched),
    )


def _axes(in_batched: Any) -> Any:
    """The `in_axes` of `jax.vmap` for what is mapped."""
    return jax.tree.map(lambda hit: 0 if hit else None, tuple(in_batched))


def _pull_back(
    apply: Apply,
    rank: int,
    params: Params,
    x: jax.Array,
    finite: jax.Array,
    cotangent: jax.Array,
) -> tuple[Params, jax.Array]:
    """The contained gradients of one batch."""
    # The forward pass is traced again here instead of kept: XLA merges the two,
    # and a folded batch needs no residuals of unknown layout.
    _, pull_back = jax.vjp(apply, params, x)
    d_params, d_x = pull_back(jnp.where(finite, cotangent, jnp.zeros_like(cotangent)))
    clean = jnp.all(finite)
    # Number by number, which costs no pass of its own: whether any is not finite would.
    d_params = jax.tree.map(lambda d: jnp.where(clean & _finite(d), d, jnp.zeros_like(d)), d_params)
    row = finite.reshape(finite.shape[:1] + (1,) * rank)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        row = row & _examples_finite(d_x, rank)
    return d_params, jnp.where(row, d_x, jnp.zeros_like(d_x))


@cache
def _contained(program: Program, summed: bool) -> Apply:
    rank = program.example_rank
    mappable = program.mappable

    @custom_vmap
    def forward(params: Params, x: jax.Array) -> jax.Array:
        return program.apply(params, x)

    @forward.def_vmap
    def _forward_rule(size: int, in_batched: Any, params: Params, x: jax.Array) -> Any:
        if program.independent and not any(jax.tree.leaves(in_batched[0])):
            return _unfold(forward(params, _fold(x)), size), True
        if mappable is not None:
            return jax.vmap(mappable, in_axes=_axes(in_batched))(params, x), True
        args = _all_mapped(size, in_batched, (params, x))
        return jax.lax.map(lambda one: forward(*one), args), True

    @custom_vmap
    def backward(
        params: Params, x: jax.Array, finite: jax.Array, cotangent: jax.Array
    ) -> tuple[Params, jax.Array]:
        return _pull_back(program.apply, rank, params, x, finite, cotangent)

    @backward.def_vmap
    def _backward_rule(size: int, in_batched: Any, *args: Any) -> Any:
        if mappable is not None:
            own = mappable
            out = jax.vmap(lambda *one: _pull_back(own, rank, *one), in_axes=_axes(in_batched))(
                *args
            )
        else:
            full = _all_mapped(size, in_batched, args)
            out = jax.lax.map(lambda one: backward(*one), full)
        return out, jax.tree.map(lambda _: True, out)

    @custom_vmap
    def backward_summed(
        params: Params, x: jax.Array, finite: jax.Array, cotangent: jax.Array
    ) -> tuple[Params, jax.Array]:
        return backward(params, x, finite, cotangent)

    @backward_summed.def_vmap
    def _backward_summed_rule(size: int, in_batched: Any, params: Params, *rows: Any) -> Any:
        if not program.independent or any(jax.tree.leaves(in_batched[0])):
            return _backward_rule(size, in_batched, params, *rows)
        folded = [_fold(row) for row in _all_mapped(size, in_batched[1:], rows)]
        # Any map further out is met by the careful rule.
        d_params, d_x = backward(params, *folded)
        # Summed over the mapped axis and marked as not mapped: jax passes that on as
        # the cotangent of parameters that are not mapped either.
        return (d_params, _unfold(d_x, size)), (jax.tree.map(lambda _: False, d_params), True)

    @jax.custom_vjp
    def call(params: Params, x: jax.Array) -> jax.Array:
        return forward(params, x)

    def call_forward(params: Params, x: jax.Array) -> Any:
        # Tangents that arrive in here are those of a derivative around this one.
        params, x = once((params, x))
        k = forward(params, x)
        return k, (params, x, _examples_finite(k, k.ndim - 1))

    def call_backward(residuals: Any, cotangent: jax.Array) -> tuple[Params, jax.Array]:
        return (backward_summed if summed else backward)(*residuals, once(cotangent))

    call.defvjp(call_forward, call_backward)
    return call


def run_contained(
    program: Program,
    params: Params,
    x: jax.Array,
    *,
    summed: bool = False,
    contain: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Run a kernel on `[*batch, *example]`.

    Args:
        contain: whether its gradients are contained. If not, the program runs as it is, and
            can be differentiated as often and in whichever mode it can by itself.
        summed: under one `jax.vmap`, give the parameters' gradient summed over the
            mapped axis. Right only where that map is inside of the gradient; see
            `forward_batch`, which is the one who knows.

    Returns:
        Its output as it is, and a bool per example that broadcasts against it:
        whether the output is finite.
    """
    lead = x.shape[: x.ndim - program.example_rank]
    flat = x.reshape((-1, *x.shape[len(lead) :]))
    if contain:
        params, flat = reverse_only((params, flat))
        k = _contained(program, summed)(params, flat)
    else:
        k = (program.mappable or program.apply)(params, flat)
    # No gradient enters the verdict: jax would differentiate the comparison.
    finite = _examples_finite(jax.lax.stop_gradient(k), k.ndim - 1)
    return k.reshape(lead + k.shape[1:]), finite.reshape(lead + finite.shape[1:])
