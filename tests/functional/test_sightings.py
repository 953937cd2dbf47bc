"""What sites see comes out of the network's own maps and, by `lift`, of other transformations."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    Event,
    EventKind,
    bare,
    execute,
    fold_events,
    forward,
    forward_batch,
    forward_dynamic,
    gather,
    init_seeds,
    kernel_from_function,
    lift,
    linear,
    make_bank,
    plan,
    run,
    shadow_forward,
)
from tests.functional.networks import (
    SITES,
    batch,
    dense_kernel,
    filled,
    grafted_state,
    host_params,
)
from tests.tolerance import assert_bitwise, assert_close, assert_finite, assert_tree_close

PARAMS, X = host_params(), batch(size=4)


def root(params, x):
    """NaN for each example with a negative sum, and only for those."""
    return jnp.sqrt(jnp.sum(x, axis=-1, keepdims=True)) * params["w"]


ROOT = kernel_from_function(root, {"w": jnp.linspace(0.5, 2.0, 4)})
GOOD, BAD = dense_kernel(0), filled(dense_kernel(0), np.nan)
KERNELS = {0: GOOD, 1: ROOT, 2: dense_kernel(5, "out"), 3: BAD}
STATE = grafted_state((0, 0, 0, 0.4), (0, 1, 1, 0.3), (1, 0, 2, 0.5))
FAILING = grafted_state((0, 0, 0, 0.4), (0, 1, 3, 0.3), (1, 0, 2, 0.5))


def plain(params, site, x):
    h = jax.nn.relu(site("hidden", linear, params["hidden"], x))
    return site("out", linear, params["out"], h)


def per_position(params, site, x):
    """Maps each layer by itself, as Equinox networks do."""
    hidden = jax.vmap(lambda x: site("hidden", linear, params["hidden"], x))
    out = jax.vmap(lambda x: site("out", linear, params["out"], x))
    return out(jax.nn.relu(hidden(x)))


def per_position_twice(params, site, x):
    hidden = jax.vmap(jax.vmap(lambda x: site("hidden", linear, params["hidden"], x)))
    out = jax.vmap(jax.vmap(lambda x: site("out", linear, params["out"], x)))
    return out(jax.nn.relu(hidden(x[:, None])))[:, 0]


def whole_mapped(params, site, x):
    return jax.vmap(lambda x: plain(params, site, x))(x)


NETWORKS = [per_position, per_position_twice]


def planned(state=STATE, kernels=None, **options):
    kernels = KERNELS if kernels is None else kernels
    own = plan(state, kernels, SITES, **options)
    return own, gather(state, kernels, own)


@pytest.mark.parametrize("net", [*NETWORKS, whole_mapped])
@pytest.mark.parametrize("state", [STATE, FAILING], ids=["some rows fail", "all fail"])
def test_a_map_within_the_network_changes_neither_outputs_nor_faults(net, state):
    own, live = planned(state)
    y, seen = jax.jit(partial(forward, net, own))(PARAMS, live, X)
    expected, told = jax.jit(partial(forward, plain, own))(PARAMS, live, X)
    assert_close(y, expected)
    assert [fault.shape for fault in seen.faults] == [()] * 3
    assert_bitwise(seen.faults, told.faults)
    assert [bool(fault) for fault in told.faults] == [False, True, False]


@pytest.mark.parametrize("net", NETWORKS)
def test_one_element_of_the_map_is_enough(net):
    own, live = planned()
    good = jnp.abs(X)
    faults = jax.jit(lambda x: forward(net, own, PARAMS, live, x)[1].faults)
    assert [bool(f) for f in faults(good)] == [False] * 3
    assert [bool(f) for f in faults(good.at[2].set(-good[2]))] == [False, True, False]


@pytest.mark.parametrize("net", NETWORKS)
def test_gradients_are_those_without_the_map(net):
    def total(net, params, kernels, x):
        own, live = planned()
        y, _ = forward(net, own, params, dataclasses.replace(live, params=kernels), x)
        return jnp.sum(y**2)

    kernels = planned()[1].params
    x = jnp.abs(X)
    found = jax.jit(jax.grad(partial(total, net), argnums=(0, 1, 2)))(PARAMS, kernels, x)
    expected = jax.jit(jax.grad(partial(total, plain), argnums=(0, 1, 2)))(PARAMS, kernels, x)
    assert_tree_close(found, expected)


@pytest.mark.parametrize("net", NETWORKS)
def test_a_population_outside_keeps_a_note_for_each_member(net):
    own, live = planned()
    members = jnp.stack([jnp.abs(X), X, -jnp.abs(X)])
    y, seen = jax.jit(jax.vmap(partial(forward, net, own, PARAMS, live)))(members)
    call = jax.jit(partial(forward, net, own, PARAMS, live))
    loop = [call(x) for x in members]
    assert_close(y, jnp.stack([own for own, _ in loop]))
    for i, faults in enumerate(seen.faults):
        assert faults.shape == (3,)
        assert faults.tolist() == [bool(told.faults[i]) for _, told in loop]
    assert seen.faults[1].tolist() == [False, True, True]


@pytest.mark.parametrize("net", NETWORKS)
def test_a_population_of_parameters_or_of_kernels_too(net):
    own, live = planned()
    hosts = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS)
    _, seen = jax.jit(jax.vmap(lambda p: forward(net, own, p, live, X)))(hosts)
    assert [faults.tolist() for faults in seen.faults] == [[False] * 2, [True] * 2, [False] * 2]

    def of_member(scale):
        params = jax.tree.map(lambda p: p * scale, live.params[0])
        chosen = dataclasses.replace(live, params=(params, *live.params[1:]))
        return forward(net, own, PARAMS, chosen, jnp.abs(X))[1].faults

    faults = jax.jit(jax.vmap(of_member))(jnp.asarray([1.0, np.nan, 0.0]))
    assert [own.tolist() for own in faults] == [[False, True, False], [False] * 3, [False] * 3]


@pytest.mark.parametrize("net", NETWORKS)
def test_two_maps_outside_and_steps_of_a_scan(net):
    own, live = planned()
    grid = jnp.stack([jnp.stack([jnp.abs(X), -jnp.abs(X)]), jnp.stack([-jnp.abs(X), jnp.abs(X)])])
    twice = jax.vmap(jax.vmap(lambda x: forward(net, own, PARAMS, live, x)[1].faults[1]))
    assert jax.jit(twice)(grid).tolist() == [[False, True], [True, False]]

    def step(live, x):
        _, live = run(net, own, PARAMS, live, x)
        return live, live.errors

    _, errors = jax.lax.scan(step, jax.tree.map(jnp.asarray, live), grid.reshape(4, 4, 3))
    assert errors[:, 1].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("net", NETWORKS)
def test_forward_batch_is_any_of_its_examples(net):
    own, live = planned()
    xs = jnp.stack([jnp.abs(X), -jnp.abs(X)])
    ys, seen = jax.jit(partial(forward_batch, net, own))(PARAMS, live, xs)
    assert [bool(f) for f in seen.faults] == [False, True, False]
    call = jax.jit(partial(forward, plain, own))
    assert_close(ys, jnp.stack([call(PARAMS, live, x)[0] for x in xs]))


@pytest.mark.parametrize(
    ("net", "lead"), [(plain, (4,)), (per_position, (4,)), (per_position_twice, (4, 1))]
)
def test_captured_outputs_have_a_leading_axis_for_each_map_within(net, lead):
    own, live = planned()
    _, seen = forward(net, own, PARAMS, live, X, capture=True)
    assert [k.shape for k in seen.outputs] == [(*lead, 4), (*lead, 4), (*lead, 2)]
    expected = GOOD.program.apply(GOOD.params, X).reshape((*lead, 4))
    assert_close(seen.outputs[0], expected)
    members = jnp.stack([X, 2 * X])
    _, many = jax.vmap(lambda x: forward(net, own, PARAMS, live, x, capture=True))(members)
    assert many.outputs[0].shape == (2, *lead, 4)
    assert_close(many.outputs[0][0], expected)


@pytest.mark.parametrize("net", NETWORKS)
def test_dynamic_mode_notes_the_same(net):
    bank = make_bank(KERNELS)
    call = partial(forward_dynamic, net, PARAMS, sites=SITES)
    y, faults = jax.jit(lambda x: call(STATE, bank, x))(X)
    own, live = planned()
    expected, told = forward(net, own, PARAMS, live, X)
    assert_close(y, expected)
    assert np.asarray(faults)[0, :2].tolist() == [bool(told.faults[0]), bool(told.faults[1])]
    members = jnp.stack([jnp.abs(X), X])
    _, many = jax.jit(jax.vmap(lambda x: call(STATE, bank, x)))(members)
    assert np.asarray(many).shape == (2, *STATE.shape)
    assert np.asarray(many)[:, 0, 1].tolist() == [False, True]


@pytest.mark.parametrize("net", NETWORKS)
def test_a_population_of_states_in_dynamic_mode(net):
    bank = make_bank(KERNELS)
    states = jax.tree.map(lambda *a: jnp.stack(a), STATE, init_seeds(2, 3), FAILING)

    def of_member(state):
        return execute(net, PARAMS, state, bank, X, sites=SITES)

    ys, after = jax.jit(jax.vmap(of_member))(states)
    assert after.error_count[:, 0, 1].tolist() == [1, 0, 1]
    assert_close(ys[1], plain(PARAMS, bare, X))
    own, live = planned()
    assert_close(ys[0], forward(net, own, PARAMS, live, X)[0])


def closing_over(transform):
    """A network whose first layer alone is lifted through a transformation."""

    def net(params, site, x):
        def first(site, params, x):
            return jax.nn.relu(site("hidden", linear, params, x))

        h = lift(site, transform, first)(params["hidden"], x)
        return site("out", linear, params["out"], h)

    return net


def lifted_whole(params, site, x):
    return lift(site, jax.checkpoint, lambda site, params, x: plain(params, site, x))(params, x)


def lifted_twice(params, site, x):
    def outer(site, params, x):
        return lift(site, jax.jit, lambda site, params, x: plain(params, site, x))(params, x)

    return lift(site, jax.checkpoint, outer)(params, x)


def lifted_per_position(params, site, x):
    def one(site, params, x):
        return whole_mapped(params, site, x)

    return lift(site, partial(jax.checkpoint, prevent_cse=False), one)(params, x)


LIFTED = [
    closing_over(jax.checkpoint),
    closing_over(partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)),
    lifted_whole,
    lifted_twice,
    lifted_per_position,
]


@pytest.mark.parametrize("net", LIFTED)
@pytest.mark.parametrize("state", [STATE, FAILING], ids=["some rows fail", "all fail"])
def test_lifted_it_runs_and_notes_faults(net, state):
    own, live = planned(state)
    expected, told = jax.jit(partial(forward, plain, own))(PARAMS, live, X)
    y, seen = jax.jit(partial(forward, net, own))(PARAMS, live, X)
    assert_close(y, expected)
    assert_bitwise(seen.faults, told.faults)
    call = partial(forward_dynamic, net, PARAMS, state, make_bank(KERNELS), sites=SITES)
    y, faults = jax.jit(call)(X)
    assert_close(y, expected)
    assert np.asarray(faults)[0, 1]
    assert np.asarray(faults).sum() == 1
    members = jnp.stack([jnp.abs(X), X])
    many = jax.jit(jax.vmap(lambda x: forward(net, own, PARAMS, live, x)[1].faults[1]))(members)
    assert many.tolist() == [state is FAILING, True]


@pytest.mark.parametrize("net", LIFTED)
def test_gradients_through_what_is_lifted(net):
    own, live = planned(FAILING)

    def total(net, params, x):
        return jnp.sum(forward(net, own, params, live, x)[0] ** 2)

    found = jax.jit(jax.grad(partial(total, net), argnums=(0, 1)))(PARAMS, X)
    assert_finite(found)
    expected = jax.jit(jax.grad(partial(total, plain), argnums=(0, 1)))(PARAMS, X)
    assert_tree_close(found, expected)


def test_a_layer_both_in_and_out_of_what_is_lifted_fails_once():
    def net(params, site, x):
        first = site("hidden", linear, params["hidden"], jnp.abs(x))

        def again(site, params, x):
            return site("hidden", linear, params, x)

        return first + lift(site, jax.checkpoint, again)(params["hidden"], x)

    own, live = planned(grafted_state((0, 1, 1, 0.3)))
    _, live = run(net, own, PARAMS, live, X)
    assert live.errors.tolist() == [1]


@pytest.mark.parametrize("net", LIFTED)
def test_shadows_of_what_is_lifted(net):
    events = [
        Event(0, 0, 0, EventKind.LOAD, value=3.0),
        Event(0, 0, 0, EventKind.ACTIVATE, value=0.0),
        Event(0, 0, 0, EventKind.INCUBATE),
    ]
    own, live = planned(fold_events(init_seeds(2, 3), events))
    (shown,), seen = shadow_forward(net, own, PARAMS, live, X)
    (expected,), told = shadow_forward(plain, own, PARAMS, live, X)
    assert_close(shown, expected)
    assert bool(seen.faults[0])
    assert_bitwise(seen.faults, told.faults)
