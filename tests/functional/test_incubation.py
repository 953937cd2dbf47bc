"""Incubation: a kernel trains in a shadow of the forward pass before it is blended."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    BLENDS,
    EventKind,
    SeedLifecycleState,
    bare,
    forward,
    linear,
    shadow_dynamic,
    shadow_forward,
    shadow_forward_batch,
)
from tests.functional.lives import KERNELS, bank, low_rank, planned, scattered, state_of
from tests.functional.networks import SITES, batch, dense, host_params, mlp
from tests.tolerance import assert_bitwise, assert_close, assert_finite, assert_tree_close

S, K = SeedLifecycleState, EventKind
PARAMS, X, BANK = host_params(), batch(), bank()
ONE = state_of((0, 0, "incubating", 0))
BESIDE = state_of((0, 0, "incubating", 0), (0, 1, "active", 1), (1, 0, "active", 4))
TWO = state_of((0, 0, "incubating", 0), (0, 1, "incubating", 1), (1, 0, "incubating", 4))
WHERE = np.array([[True, False], [False, False]])


def loss(y):
    return jnp.sum(y * jnp.arange(1.0, 1.0 + y.size).reshape(y.shape))


def total(own, live, params, kernels, x):
    """The loss that a training step takes: the network's and those of its shadows."""
    chosen = dataclasses.replace(live, params=kernels)
    y, _ = forward(mlp, own, params, chosen, x)
    shadows, _ = shadow_forward(mlp, own, params, chosen, x)
    return loss(y) + sum(loss(shadow) for shadow in shadows)


@partial(jax.jit, static_argnums=0)
def gradients(own, live, params, x):
    return jax.grad(partial(total, own, live), argnums=(0, 1, 2))(params, live.params, x)


def test_a_forward_pass_of_incubating_kernels_alone_is_the_hosts_bit_by_bit():
    own, live = planned(TWO)
    assert not own.dormant
    assert own.incubating == (0, 1, 2)
    run = jax.jit(lambda p, live, x: forward(mlp, own, p, live, x)[0])
    assert_bitwise(run(PARAMS, live, X), jax.jit(partial(mlp, site=bare))(PARAMS, x=X))


def test_its_gradient_is_that_at_alpha_one_with_the_host_stopped():
    own, live = planned(ONE)
    to_host, (to_kernel,), to_input = gradients(own, live, PARAMS, X)

    def by_hand(kernel):
        """Under convex at alpha 1, the kernel in the hidden layer's stead."""
        return loss(linear(PARAMS["out"], jax.nn.relu(dense(kernel, X))))

    assert_tree_close(to_kernel, jax.grad(by_hand)(KERNELS[0].params))
    plain = jax.grad(lambda p, x: loss(mlp(p, bare, x)), argnums=(0, 1))
    assert_bitwise((to_host, to_input), jax.jit(plain)(PARAMS, X))


@pytest.mark.parametrize("blend", BLENDS)
def test_beside_others_it_is_at_one_and_they_are_at_their_alphas_and_stopped(blend):
    own, live = planned(BESIDE, blend=blend)
    to_host, to_kernels, to_input = gradients(own, live, PARAMS, X)

    def blended(h, pairs):
        if blend == "convex":
            s = sum(a for a, _ in pairs)
            return h * (1 - min(s, 1)) + sum(a * k for a, k in pairs) / max(s, 1)
        for a, k in pairs:
            h = h + a * k if blend == "residual" else (1 - a) * h + a * k
        return h

    def by_hand(kernel):
        h = linear(PARAMS["hidden"], X)
        pairs = [(1.0, dense(kernel, X)), (0.6, low_rank(KERNELS[1].params, X))]
        h = jax.nn.relu(blended(h, pairs))
        y = linear(PARAMS["out"], h)
        return loss(blended(y, [(0.6, dense(KERNELS[4].params, h))]))

    assert_tree_close(to_kernels[0], jax.grad(by_hand)(KERNELS[0].params))
    # All else is as if the seed were waiting at alpha 0, without a shadow.
    waiting = state_of((0, 0, "active at 0", 0), (0, 1, "active", 1), (1, 0, "active", 4))
    at_zero = gradients(*planned(waiting, blend=blend), PARAMS, X)
    assert_tree_close((to_host, to_input), (at_zero[0], at_zero[2]))
    assert_tree_close(to_kernels[1:], at_zero[1][1:])
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(at_zero[1][0]))


def test_two_that_incubate_do_not_meet():
    """Each one's gradient is the same whatever the other's parameters are."""
    _, together, _ = gradients(*planned(TWO), PARAMS, X)
    for nth, (place, slot) in enumerate([((0, 0), 0), ((0, 1), 1), ((1, 0), 4)]):
        alone = gradients(*planned(state_of((*place, "incubating", slot))), PARAMS, X)
        assert_tree_close(together[nth], alone[1][0])


def test_one_that_is_nan_disturbs_neither_the_host_nor_the_other():
    own, live = planned(TWO)
    nan = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), live.params[0])
    bad = dataclasses.replace(live, params=(nan, *live.params[1:]))
    ours, clean = gradients(own, bad, PARAMS, X), gradients(own, live, PARAMS, X)
    assert_bitwise((ours[0], ours[1][1:], ours[2]), (clean[0], clean[1][1:], clean[2]))
    assert_finite(ours)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(ours[1][0]))


@pytest.mark.parametrize(
    ("blend", "isolate"), [("convex", False), ("residual", True), ("sequential", False)]
)
def test_shadows_of_both_modes_are_one(blend, isolate):
    options = {"blend": blend, "isolate": isolate}
    state = state_of((0, 0, "incubating", 2), (0, 1, "active", 1), (1, 1, "incubating", 4))
    own, live = planned(state, **options)
    ys, seen = shadow_forward(mlp, own, PARAMS, live, X)

    @jax.jit
    def of_bank(rows, layer, seed):
        held = dataclasses.replace(BANK, params=rows)
        y, faults = shadow_dynamic(
            mlp, PARAMS, state, held, X, (layer, seed), sites=SITES, **options
        )
        return loss(y), (y, faults)

    gradient = jax.grad(of_bank, has_aux=True)
    for nth, (layer, seed) in enumerate([(0, 0), (1, 1)]):
        grads, (y, faults) = gradient(BANK.params, layer, seed)
        assert_close(y, ys[nth])
        assert bool(faults[layer, seed]) == bool(seen.faults[own.incubating[nth]])

        def of_kernels(kernels, nth=nth):
            held = dataclasses.replace(live, params=kernels)
            return loss(shadow_forward(mlp, own, PARAMS, held, X)[0][nth])

        assert_tree_close(grads, scattered(BANK, state, jax.grad(of_kernels)(live.params)))
    assert [None if f is None else bool(f) for f in seen.faults] == [True, None, False]


def test_shadows_of_both_modes_are_one_where_another_seed_runs_the_same_slot():
    state = state_of((0, 0, "incubating", 0), (0, 1, "active", 0))
    own, live = planned(state)

    def of_kernels(kernels):
        held = dataclasses.replace(live, params=kernels)
        return loss(shadow_forward(mlp, own, PARAMS, held, X)[0][0])

    def of_bank(rows):
        held = dataclasses.replace(BANK, params=rows)
        return loss(shadow_dynamic(mlp, PARAMS, state, held, X, (0, 0), sites=SITES)[0])

    ours = jax.jit(jax.grad(of_bank))(BANK.params)
    assert_tree_close(ours, scattered(BANK, state, jax.grad(of_kernels)(live.params)))


def test_no_gradient_of_a_shadow_reaches_host_or_input_in_either_mode():
    own, live = planned(BESIDE)

    def in_plan(params, x):
        return sum(loss(y) for y in shadow_forward(mlp, own, params, live, x)[0])

    def in_program(params, x):
        return loss(shadow_dynamic(mlp, params, BESIDE, BANK, x, (0, 0), sites=SITES)[0])

    for of in (in_plan, in_program):
        for leaf in jax.tree.leaves(jax.jit(jax.grad(of, argnums=(0, 1)))(PARAMS, X)):
            assert not np.asarray(leaf).any()


def test_shadows_of_a_batch_are_mapped_ones():
    own, live = planned(BESIDE)
    ys, seen = shadow_forward_batch(mlp, own, PARAMS, live, X)
    mapped = jax.vmap(lambda x: shadow_forward(mlp, own, PARAMS, live, x)[0])(X)
    assert_tree_close(ys, mapped)
    assert_close(ys[0], shadow_forward(mlp, own, PARAMS, live, X)[0][0])
    assert [None if f is None else f.shape for f in seen.faults] == [(), None, None]


def test_without_incubating_kernels_there_are_no_shadows():
    for state in (state_of(), state_of((0, 0, "active", 0))):
        own, live = planned(state)
        ys, seen = shadow_forward(mlp, own, PARAMS, live, X)
        assert ys == ()
        assert not any(bool(f) for f in seen.faults)
