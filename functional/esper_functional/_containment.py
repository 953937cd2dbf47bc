"""Running a kernel so that it cannot poison its host.

A kernel's output that is not finite is caught per example and replaced where it
is blended; its gradients are caught here, because a select in the forward pass
alone still multiplies zero by NaN on the way back:

- to the input: zero for every example whose output or whose own gradient is
  not finite;
- to the parameters: zero for the whole step if any example's output was not
  finite (their gradient is a sum over examples, and cannot be split).

A mapped axis is folded into the batch, so that programs without batching rules
(deserialised ones) run under `jax.vmap` at the price of one call, with exact
parameter gradients. Where parameters themselves are mapped, programs without
batching rules are run in a loop. Forward-mode differentiation is not supported.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from esper_functional._kernel import Params, Program


def _examples_finite(x: jax.Array, rank: int) -> jax.Array:
    """Which examples are finite: `[batch, 1, ...]`, broadcasts against x."""
    return jnp.all(jnp.isfinite(x), axis=tuple(range(x.ndim - rank, x.ndim)), keepdims=True)


def _fold(x: jax.Array) -> jax.Array:
    return x.reshape((x.shape[0] * x.shape[1], *x.shape[2:]))


def _unfold(x: jax.Array, size: int) -> jax.Array:
    return x.reshape((size, x.shape[0] // size, *x.shape[1:]))


def _mapped(tree: Any) -> bool:
    return any(jax.tree.leaves(tree))


def _over_mapped_params(
    program: Program, call: Callable[..., Any], in_batched: Any, args: tuple[Any, ...]
) -> Any:
    """Run `call` with every argument mapped: by vmap if the program can, else in a loop."""
    size = next(
        leaf.shape[0]
        for leaf, hit in zip(jax.tree.leaves(args), jax.tree.leaves(in_batched), strict=True)
        if hit
    )
    full = jax.tree.map(
        lambda leaf, hit: leaf if hit else jnp.broadcast_to(leaf, (size, *leaf.shape)),
        args,
        tuple(in_batched),
    )
    if program.batches:
        return jax.vmap(call)(*full)
    return jax.lax.map(lambda one: call(*one), full)


@cache
def _contained(program: Program) -> Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]:
    rank = program.example_rank

    def run_batch(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        k = program.apply(params, x)
        return k, _examples_finite(k, k.ndim - 1)

    def pull_back_batch(
        params: Params, x: jax.Array, finite: jax.Array, cotangent: jax.Array
    ) -> tuple[Params, jax.Array]:
        # The forward pass is traced again here instead of kept: XLA merges the
        # two, and a folded batch needs no residuals of unknown layout.
        _, pull_back = jax.vjp(program.apply, params, x)
        d_params, d_x = pull_back(jnp.where(finite, cotangent, jnp.zeros_like(cotangent)))
        clean = jnp.all(finite)
        d_params = jax.tree.map(lambda d: jnp.where(clean, d, jnp.zeros_like(d)), d_params)
        row = finite.reshape(finite.shape[:1] + (1,) * rank)
        return d_params, jnp.where(row & _examples_finite(d_x, rank), d_x, jnp.zeros_like(d_x))

    @custom_vmap
    def forward(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return run_batch(params, x)

    @forward.def_vmap
    def _forward_rule(size: int, in_batched: Any, params: Params, x: jax.Array) -> Any:
        if _mapped(in_batched[0]):
            return _over_mapped_params(program, run_batch, in_batched, (params, x)), (True, True)
        k, finite = forward(params, _fold(x))
        return (_unfold(k, size), _unfold(finite, size)), (True, True)

    @custom_vmap
    def backward(
        params: Params, x: jax.Array, finite: jax.Array, cotangent: jax.Array
    ) -> tuple[Params, jax.Array]:
        return pull_back_batch(params, x, finite, cotangent)

    @backward.def_vmap
    def _backward_rule(
        size: int,
        in_batched: Any,
        params: Params,
        x: jax.Array,
        finite: jax.Array,
        cotangent: jax.Array,
    ) -> Any:
        if _mapped(in_batched[0]):
            args = (params, x, finite, cotangent)
            out = _over_mapped_params(program, pull_back_batch, in_batched, args)
            return out, jax.tree.map(lambda _: True, out)
        rows = [
            _fold(a if hit else jnp.broadcast_to(a, (size, *a.shape)))
            for a, hit in zip((x, finite, cotangent), in_batched[1:], strict=True)
        ]
        d_params, d_x = backward(params, *rows)
        # Already summed over the mapped axis, and marked as not mapped: jax then
        # takes it as the cotangent of the parameters, which are not mapped either.
        return (d_params, _unfold(d_x, size)), (jax.tree.map(lambda _: False, d_params), True)

    @jax.custom_vjp
    def call(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return forward(params, x)

    def call_forward(params: Params, x: jax.Array) -> Any:
        k, finite = forward(params, x)
        return (k, finite), (params, x, finite)

    def call_backward(residuals: Any, cotangents: Any) -> tuple[Params, jax.Array]:
        return backward(*residuals, cotangents[0])

    call.defvjp(call_forward, call_backward)
    return call


def run_contained(program: Program, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Run a kernel on `[*batch, *example]`.

    Returns:
        Its output as it is, and a bool per example that broadcasts against it:
        whether the output is finite.
    """
    lead = x.shape[: x.ndim - program.example_rank]
    flat = x.reshape((-1, *x.shape[len(lead) :]))
    k, finite = _contained(program)(params, flat)
    return k.reshape(lead + k.shape[1:]), finite.reshape(lead + finite.shape[1:])
