"""Hosts in half precision: outputs and gradients in it, state and weights in float32."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    BLENDS,
    Kernel,
    advance,
    bare,
    count_faults,
    forward,
    forward_dynamic,
    gather,
    kernel_from_function,
    make_bank,
    plan,
    record_faults,
    shadow_dynamic,
    shadow_forward,
)
from tests.functional.lives import ROOT, state_of
from tests.functional.networks import SITES, batch, dense_kernel, filled, host_params, mlp
from tests.tolerance import assert_bitwise, assert_close, assert_finite

MODES = ("planned", "dynamic")
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_mode = pytest.mark.parametrize("mode", MODES)
STATE = state_of((0, 0, "active", 0), (0, 1, "ramping", 1), (1, 1, "fossil", 2))


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def widened(params, x):
    """A kernel that keeps its parameters in float32."""
    return (x.astype(jnp.float32) @ params["w"]).astype(x.dtype)


def kernels(dtype):
    own = {0: dense_kernel(0), 2: dense_kernel(2, "out")}
    table = {slot: Kernel(k.program, cast(k.params, dtype)) for slot, k in own.items()}
    table[1] = kernel_from_function(widened, {"w": dense_kernel(1).params["w"]})
    return table


@partial(jax.jit, static_argnames=("own", "blend", "mode"))
def step(params, given, x, *, own, blend, mode):
    """Output, what is carried on, and gradients of host, kernels and input."""

    def loss(params, trained, x):
        if mode == "planned":
            live = dataclasses.replace(given, params=trained)
            y, seen = forward(mlp, own, params, live, x)
            return jnp.sum(y**2), (y, count_faults(live, seen.faults))
        state, bank = given
        held = dataclasses.replace(bank, params=trained)
        y, faults = forward_dynamic(mlp, params, state, held, x, sites=SITES, blend=blend)
        return jnp.sum(y**2), (y, record_faults(state, faults, step=9))

    trained = given.params if mode == "planned" else given[1].params
    grads, (y, after) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, trained, x)
    return y, after, grads


def stepped(mode, dtype, blend="convex", table=None, state=STATE) -> Any:
    table = table or kernels(dtype)
    params, x = cast(host_params(), dtype), cast(batch(), dtype)
    if mode == "planned":
        own = plan(state, table, SITES, blend=blend)
        given = gather(state, table, own)
    else:
        own, given = None, (state, make_bank(table))
    return params, given, x, step(params, given, x, own=own, blend=blend, mode=mode)


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


@every_dtype
@pytest.mark.parametrize(
    ("mode", "blend"), [*(("planned", blend) for blend in BLENDS), ("dynamic", "convex")]
)
def test_outputs_and_gradients_keep_their_dtypes_and_are_near_those_of_float32(mode, blend, dtype):
    params, given, x, (y, after, grads) = stepped(mode, dtype, blend)
    assert y.dtype == dtype
    trained = given.params if mode == "planned" else given[1].params
    assert dtypes(grads) == dtypes((params, trained, x))
    assert set(dtypes(grads[1])) == {jnp.dtype(dtype), jnp.dtype(jnp.float32)}
    assert_finite((y, grads))
    wide, _, _ = stepped(mode, jnp.float32, blend)[3]
    assert_close(y, wide.astype(dtype))
    # Nothing of what is carried from step to step is rounded.
    carried = (after.host_weights, after.weights, after.errors) if mode == "planned" else after
    before = (given.host_weights, given.weights, given.errors) if mode == "planned" else given[0]
    before = before if mode == "planned" else advance(before, 9)
    assert_bitwise(carried, before)


@every_dtype
def test_weights_follow_alpha_in_float32(dtype):
    """A share that half precision does not have is rounded where it is used, not stored."""
    own = plan(STATE, kernels(dtype), SITES)
    live: Any = gather(STATE, kernels(dtype), own)
    assert live.weights.dtype == live.host_weights.dtype == np.float32
    assert float(live.weights[0]) == np.float32(0.6)
    assert STATE.alpha.dtype == np.float32


@every_dtype
@every_mode
def test_faults_are_contained_and_counted(mode, dtype):
    table = {**kernels(dtype), 0: filled(kernels(dtype)[0], np.nan)}
    table[1] = Kernel(ROOT.program, cast(ROOT.params, dtype))
    _, _, _, (y, after, grads) = stepped(mode, dtype, table=table)
    assert_finite((y, grads[0], grads[2]))
    errors = after.errors if mode == "planned" else after.error_count[0]
    assert errors.tolist()[:2] == [1, 1]


def test_an_output_beyond_the_range_of_half_precision_is_a_fault():
    """float16 ends near 6.5e4; a kernel that overflows there does not in bfloat16."""

    def large(params, x):
        return x @ params["w"] * jnp.asarray(6e4, x.dtype)

    faults = {}
    for name, dtype in DTYPES.items():
        table = kernels(dtype)
        table[0] = kernel_from_function(large, {"w": jnp.full((3, 4), 8.0, dtype)})
        _, _, _, (y, after, _) = stepped("planned", dtype, table=table)
        assert_finite(y)
        faults[name] = after.errors.tolist()[0]
    assert faults == {"bfloat16": 0, "float16": 1}


@every_dtype
def test_dormant_and_incubating_leave_every_bit(dtype):
    params, x = cast(host_params(), dtype), cast(batch(), dtype)
    plain = jax.jit(lambda p, x: mlp(p, bare, x))(params, x)
    for state in (state_of(), state_of((0, 0, "incubating", 0), (1, 1, "incubating", 2))):
        own = plan(state, kernels(dtype), SITES)
        live = gather(state, kernels(dtype), own)
        planned = jax.jit(lambda p, live, x, own=own: forward(mlp, own, p, live, x)[0])
        assert_bitwise(planned(params, live, x), plain)
        y, _ = jax.jit(lambda p, s, b, x: forward_dynamic(mlp, p, s, b, x, sites=SITES))(
            params, state, make_bank(kernels(dtype)), x
        )
        assert_bitwise(y, plain)


@every_dtype
def test_shadows_of_both_modes_agree(dtype):
    params, x = cast(host_params(), dtype), cast(batch(), dtype)
    state = state_of((0, 0, "incubating", 0), (0, 1, "active", 1))
    own = plan(state, kernels(dtype), SITES)
    (ours,), _ = shadow_forward(mlp, own, params, gather(state, kernels(dtype), own), x)
    theirs, _ = jax.jit(lambda p, s, b, x: shadow_dynamic(mlp, p, s, b, x, (0, 0), sites=SITES))(
        params, state, make_bank(kernels(dtype)), x
    )
    assert ours.dtype == theirs.dtype == dtype
    assert_close(ours, theirs)
