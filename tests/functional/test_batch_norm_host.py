"""A batch normalisation as a host: its running statistics are the bare layer's, bit by bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    Event,
    EventKind,
    KernelMismatchError,
    bare,
    batch_norm,
    count_faults,
    fold_events,
    forward,
    forward_dynamic,
    gather,
    init_batch_norm,
    init_seeds,
    kernel_from_function,
    make_bank,
    plan,
    record_faults,
    shadow_dynamic,
    shadow_forward,
)
from tests.functional.lives import STORIES
from tests.tolerance import assert_bitwise, assert_close, assert_finite

FEATURES, STEPS, SITES = 3, 4, ("norm",)
PARAMS, STATS = init_batch_norm(FEATURES)
XS = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, (STEPS, 6, FEATURES)), jnp.float32)


def scaled(params, x):
    return x * params["scale"]


KERNELS = {
    0: kernel_from_function(scaled, {"scale": jnp.linspace(0.5, 2.0, FEATURES)}),
    1: kernel_from_function(scaled, {"scale": jnp.full(FEATURES, jnp.nan)}),
}
SEEDS = {
    "dormant": [],
    "active": [("active", 0)],
    "at alpha 1": [("active at 1", 0)],
    "incubating": [("incubating", 0)],
    "incubating beside active": [("incubating", 0), ("active", 0)],
    "fossil": [("fossil", 0)],
    "NaN": [("active", 1)],
    "NaN incubating": [("incubating", 1)],
    "NaN beside active": [("active", 1), ("active", 0)],
}


def state_of(stories):
    """One layer whose seeds have lived through some of the stories, with kernels in slots."""
    events = [
        Event(i, 0, seed, kind, value=float(slot) if kind is EventKind.LOAD else value, span=8)
        for seed, (story, slot) in enumerate(stories)
        for i, (kind, value) in enumerate(STORIES[story])
    ]
    return fold_events(init_seeds(1, 2), sorted(events, key=lambda event: event.step))


def net(params, site, given):
    x, stats = given
    return site("norm", batch_norm, params, x, stats, train=True)


def trained(step, carried):
    """After some steps of descent: parameters, statistics and what the mode carries."""
    params, stats = PARAMS, STATS
    step = jax.jit(step)
    for x in XS:
        params, stats, carried = step(params, stats, carried, x)
    return params, stats, carried


def descend(function, params):
    grads, rest = jax.grad(function, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), *rest


def bare_step(params, stats, carried, x):
    def loss(params):
        y, new = net(params, bare, (x, stats))
        return jnp.sum(y**2), (new, carried)

    return descend(loss, params)


def planned_step(own):
    def step(params, stats, live, x):
        def loss(params):
            (y, new), seen = forward(net, own, params, live, (x, stats))
            shadows, dim = shadow_forward(net, own, params, live, (x, stats))
            total = jnp.sum(y**2) + sum(jnp.sum(shadow**2) for shadow, _ in shadows)
            return total, (new, count_faults(live, seen.faults, dim.faults))

        return descend(loss, params)

    return step


def dynamic_step(bank):
    def step(params, stats, state, x):
        def loss(params):
            given = (x, stats)
            (y, new), faults = forward_dynamic(net, params, state, bank, given, sites=SITES)
            (shadow, _), dim = shadow_dynamic(net, params, state, bank, given, (0, 0), sites=SITES)
            own = state.incubating[0, 0]
            total = jnp.sum(y**2) + jnp.where(own, jnp.sum(shadow**2), 0.0)
            return total, (new, record_faults(state, faults, dim, step=1))

        return descend(loss, params)

    return step


PLAIN = trained(bare_step, None)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("mode", ["planned", "dynamic"])
def test_each_step_updates_them_once_by_the_host_alone(mode, seeds):
    state = state_of(SEEDS[seeds])
    if mode == "planned":
        own = plan(state, KERNELS, SITES)
        params, stats, carried = trained(planned_step(own), gather(state, KERNELS, own))
        errors = [] if carried is None else carried.errors.tolist()
    else:
        params, stats, carried = trained(dynamic_step(make_bank(KERNELS)), state)
        errors = [n for n in carried.error_count[0].tolist() if n]
    assert_bitwise(stats, PLAIN[1])
    assert int(stats.count) == STEPS
    assert_finite(params)
    assert (3 in errors) == ("NaN" in seeds)


@pytest.mark.parametrize("seeds", ["dormant", "incubating", "NaN incubating"])
def test_where_nothing_is_blended_the_parameters_too_are_the_bare_ones(seeds):
    state = state_of(SEEDS[seeds])
    own = plan(state, KERNELS, SITES)
    params, _, _ = trained(planned_step(own), gather(state, KERNELS, own))
    assert_close(params["weight"], PLAIN[0]["weight"])
    assert_close(params["bias"], PLAIN[0]["bias"])


def test_in_evaluation_they_stay_and_kernels_see_the_layers_input():
    state = state_of([("active at 1", 0)])
    own = plan(state, KERNELS, SITES)
    stats = dataclasses.replace(STATS, mean=jnp.arange(3.0), count=jnp.int32(4))

    def evaluated(params, site, x):
        return site("norm", batch_norm, params, x, stats, train=False)

    (y, after), _ = forward(evaluated, own, PARAMS, gather(state, KERNELS, own), XS[0])
    assert_bitwise(after, stats)
    assert_close(y, XS[0] * KERNELS[0].params["scale"])


def test_images_too():
    """Kernels of images take `[channels, height, width]`."""
    params, stats = init_batch_norm(2)
    images = jnp.asarray(np.random.default_rng(3).normal(size=(4, 2, 3, 3)), jnp.float32)

    def halve(params, x):
        return x * params["half"]

    kernels = {0: kernel_from_function(halve, {"half": jnp.float32(0.5)}, example_rank=3)}
    state = state_of([("active", 0)])
    own = plan(state, kernels, SITES)
    (y, after), _ = forward(net, own, params, gather(state, kernels, own), (images, stats))
    h, plain = net(params, bare, (images, stats))
    assert_bitwise(after, plain)
    assert_close(y, 0.4 * h + 0.3 * images)
    flat = {0: kernel_from_function(halve, {"half": jnp.float32(0.5)}, example_rank=5)}
    own = plan(state, flat, SITES)
    with pytest.raises(
        KernelMismatchError, match=r"rank 5, and site 'norm' gives it float32\[4, 2"
    ):
        forward(net, own, params, gather(state, flat, own), (images, stats))
