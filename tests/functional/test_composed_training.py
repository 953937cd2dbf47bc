"""Training a grafted network: batched passes, and whole loops inside a scan, in both modes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    Event,
    EventKind,
    Kernel,
    absorb,
    apply_event,
    count_faults,
    forward,
    forward_batch,
    forward_dynamic,
    gather,
    make_bank,
    plan,
    record_faults,
    state_digest,
)
from tests.functional.composed import (
    BATCH,
    IN,
    KINDS,
    OUT,
    PARAMS,
    SITES,
    STATE,
    by_hand,
    kernel,
    net,
)
from tests.tolerance import assert_tree_close

GROUPS, STEPS = 2, 4
XS = jnp.asarray(np.random.default_rng(1).normal(size=(GROUPS, BATCH, IN)), jnp.float32)
COTANGENT = jnp.asarray(np.random.default_rng(2).normal(size=(GROUPS, BATCH, OUT)), jnp.float32)
OVER = {
    "vmap": jax.vmap,
    "lax.map": lambda function: partial(jax.lax.map, function),
    "lax.map of checkpoint": lambda function: partial(jax.lax.map, jax.checkpoint(function)),
}


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batched_pass_under_a_transformation_is_the_formula(kind, over):
    """`forward_batch` maps inside; what is around it must not matter."""

    def batched(params, own, xs):
        kernels = [Kernel(kernel(kind).program, own)]
        chosen = plan(STATE, kernels, SITES)
        live = gather(STATE, kernels, chosen)
        return OVER[over](lambda x: forward_batch(net, chosen, params, live, x)[0])(xs)

    def plain(params, own, xs):
        return jnp.stack([by_hand(kind, params, own, x) for x in xs])

    ours, theirs = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) * COTANGENT), argnums=(0, 1, 2)))(
            PARAMS, kernel(kind).params, XS
        )
        for f in (batched, plain)
    )
    assert_tree_close(ours, theirs)


TARGETS = jnp.asarray(np.random.default_rng(4).normal(size=(STEPS, BATCH, OUT)), jnp.float32)
INPUTS = jnp.asarray(np.random.default_rng(5).normal(size=(STEPS, BATCH, IN)), jnp.float32)


def descend(function, params, own):
    """A step of plain descent on a function with something else to return."""
    (_, rest), grads = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)(params, own)
    return jax.tree.map(lambda p, g: p - 0.1 * g, (params, own), grads), rest


def planned_step(kind, carried, given):
    x, target = given
    params, live = carried
    chosen = plan(STATE, [kernel(kind)], SITES)

    def loss(params, own):
        y, seen = forward(net, chosen, params, dataclasses.replace(live, params=own), x)
        return jnp.mean((y - target) ** 2), count_faults(live, seen.faults)

    (params, own), after = descend(loss, params, live.params)
    return (params, dataclasses.replace(after, params=own)), None


def dynamic_step(kind, carried, given):
    x, target = given
    params, bank, state = carried

    def loss(params, rows):
        held = dataclasses.replace(bank, params=rows)
        y, faults = forward_dynamic(net, params, state, held, x, sites=SITES)
        return jnp.mean((y - target) ** 2), record_faults(state, faults, step=1)

    (params, rows), state = descend(loss, params, bank.params)
    return (params, dataclasses.replace(bank, params=rows), state), None


@pytest.mark.parametrize("kind", KINDS)
def test_training_inside_a_scan_is_training_in_a_loop_in_both_modes(kind):
    """From a state that has failed twice, so that counts are carried too."""
    begin = apply_event(STATE, Event(1, 0, 0, EventKind.ERRORS, value=2.0))
    chosen = plan(begin, [kernel(kind)], SITES)
    live = jax.tree.map(jnp.asarray, gather(begin, [kernel(kind)], chosen))
    bank, state = make_bank([kernel(kind)]), jax.tree.map(jnp.asarray, begin)
    ends = []
    for step, start in (
        (partial(planned_step, kind), (PARAMS, live)),
        (partial(dynamic_step, kind), (PARAMS, bank, state)),
    ):
        scanned, _ = jax.jit(partial(jax.lax.scan, step))(start, (INPUTS, TARGETS))
        looped, jitted = start, jax.jit(step)
        for given in zip(INPUTS, TARGETS, strict=True):
            looped, _ = jitted(looped, given)
        assert_tree_close(scanned, looped)
        ends.append(scanned)
    (params, live), (other_params, bank, state) = ends
    assert_tree_close(other_params, params)
    assert_tree_close(jax.tree.map(lambda leaf: leaf[0], bank.params[0]), live.params[0])
    after = absorb(begin, live, step=1)
    assert after.error_count.tolist() == [[0]]
    assert state_digest(state) == state_digest(after)
