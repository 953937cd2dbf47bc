"""Networks that transform their own layers: what a site saw gets out, in both modes."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from esper_functional import (
    Collecting,
    KasminaException,
    bare,
    forward,
    forward_dynamic,
    gather,
    init_seeds,
    lift,
    linear,
    make_bank,
    plan,
)
from tests.functional.lives import ROOT, stacked, state_of
from tests.functional.networks import SITES, batch, dense_kernel, host_params, mlp, optimised_hlo
from tests.tolerance import assert_bitwise, assert_close, assert_tree_close

PARAMS, X = host_params(), batch()
TABLE = {0: dense_kernel(0), 1: ROOT, 4: dense_kernel(4, "out")}
STATE = state_of((0, 0, "active", 0), (0, 1, "active", 1), (1, 0, "active", 4))
every_mode = pytest.mark.parametrize("mode", ["planned", "dynamic"])
TRANSFORMS = {"checkpoint": jax.checkpoint, "jit": jax.jit}


def run_mode(mode, net, params, x, kernels=None, state=STATE):
    """Output, and whether each running kernel failed."""
    table = TABLE if kernels is None else kernels
    if mode == "planned":
        own = plan(state, table, SITES)
        y, seen = forward(net, own, params, gather(state, table, own), x)
        return y, jnp.stack(seen.faults)
    y, faults = forward_dynamic(net, params, state, make_bank(table), x, sites=SITES)
    return y, jnp.stack([faults[0, 0], faults[0, 1], faults[1, 0]])


def mapped(params, site, x):
    """`mlp`, its first layer example by example."""
    h = jax.vmap(lambda row: site("hidden", linear, params["hidden"], row))(x)
    return site("out", linear, params["out"], jax.nn.relu(h))


def lifted(transform, params, site, x):
    """`mlp`, its first layer under a transformation."""

    def part(site, params, x):
        return jax.nn.relu(site("hidden", linear, params, x))

    h = lift(site, transform, part)(params["hidden"], x)
    return site("out", linear, params["out"], h)


def with_gradients(mode, net):
    def of(params, x):
        y, faults = run_mode(mode, net, params, x)
        return jnp.sum(y**2), (y, faults)

    return jax.jit(lambda params, x: jax.grad(of, argnums=(0, 1), has_aux=True)(params, x))


@every_mode
def test_a_map_inside_is_the_batch(mode):
    """One fault for a kernel, whichever example it was."""
    assert_tree_close(with_gradients(mode, mapped)(PARAMS, X), with_gradients(mode, mlp)(PARAMS, X))
    for x, failed in ((jnp.abs(X), False), (jnp.abs(X).at[3].set(-1.0), True)):
        _, faults = run_mode(mode, mapped, PARAMS, x)
        assert faults.tolist() == [False, failed, False]


@every_mode
def test_a_map_inside_of_a_population_keeps_each_members_faults(mode):
    xs = jnp.stack([jnp.abs(X), jnp.abs(X).at[3].set(-1.0), jnp.abs(X)])
    one = partial(run_mode, mode, mapped, PARAMS)
    ys, faults = jax.jit(jax.vmap(one))(xs)
    assert faults[:, 1].tolist() == [False, True, False]
    for i, x in enumerate(xs):
        assert_close(ys[i], run_mode(mode, mlp, PARAMS, x)[0])


@every_mode
def test_a_population_of_hosts_keeps_each_members_faults(mode):
    """Mapped over the parameters alone."""
    people = stacked([PARAMS, jax.tree.map(lambda p: -p, PARAMS)])
    ys, faults = jax.vmap(lambda params: run_mode(mode, mapped, params, X))(people)
    assert faults.shape == (2, 3)
    assert_close(ys[0], run_mode(mode, mlp, PARAMS, X)[0])


@every_mode
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_lifted_part_is_the_part(name, mode):
    net = partial(lifted, TRANSFORMS[name])
    assert_tree_close(with_gradients(mode, net)(PARAMS, X), with_gradients(mode, mlp)(PARAMS, X))
    _, faults = run_mode(mode, net, PARAMS, X)
    assert faults.tolist() == [False, True, False]


def test_a_lifted_part_may_lift_and_call_a_site_twice():
    def part(site, params, x):
        inner = lift(site, jax.checkpoint, lambda site, p, x: site("hidden", linear, p, x))
        return inner(params, x) + site("hidden", linear, params, -x)

    def net(params, site, x):
        return site("out", linear, params["out"], lift(site, jax.jit, part)(params["hidden"], x))

    def plain(params, site, x):
        return site("out", linear, params["out"], part(site, params["hidden"], x))

    for mode in ("planned", "dynamic"):
        assert_tree_close(
            run_mode(mode, net, PARAMS, jnp.abs(X)), run_mode(mode, plain, PARAMS, jnp.abs(X))
        )


def test_outputs_are_captured_out_of_maps_and_lifted_parts():
    own = plan(STATE, TABLE, SITES)
    live = gather(STATE, TABLE, own)
    _, plain = forward(mlp, own, PARAMS, live, X, capture=True)
    for net in (mapped, *(partial(lifted, t) for t in TRANSFORMS.values())):
        _, seen = forward(net, own, PARAMS, live, X, capture=True)
        assert_tree_close(seen.outputs, plain.outputs)


def test_a_lifted_bare_or_dormant_network_is_the_transformed_one():
    def by_hand(params, x):
        h = jax.checkpoint(lambda p, x: jax.nn.relu(linear(p, x)))(params["hidden"], x)
        return linear(params["out"], h)

    def step(function):
        return jax.grad(lambda params, x: jnp.sum(function(params, x) ** 2))

    net = partial(lifted, jax.checkpoint)
    own = plan(init_seeds(2, 2), {}, SITES)
    plain = optimised_hlo(step(by_hand), PARAMS, X)
    assert optimised_hlo(step(lambda p, x: net(p, bare, x)), PARAMS, X) == plain
    dormant = step(lambda p, x: forward(net, own, p, None, x)[0])
    assert optimised_hlo(dormant, PARAMS, X) == plain


def under(name):
    """`mlp`, its first layer under a transformation that lets nothing out."""

    def net(params, site, x):
        def layer(x):
            return site("hidden", linear, params["hidden"], x)

        if name == "scan":
            _, h = jax.lax.scan(lambda carry, row: (carry, layer(row[None])[0]), 0, x)
        elif name == "cond":
            h = jax.lax.cond(x[0, 0] > 0, layer, lambda x: -layer(x), x)
        else:
            h = TRANSFORMS[name](layer)(x)
        return site("out", linear, params["out"], jax.nn.relu(h))

    return net


UNLIFTED = ["checkpoint", "jit", "scan", "cond"]


@every_mode
@pytest.mark.parametrize("name", UNLIFTED)
def test_other_transformations_inside_are_refused_with_what_to_do(name, mode):
    with pytest.raises(
        KasminaException,
        match=r"site 'hidden' with running kernels was called inside.*lift\(site, jax\.checkpoint",
    ):
        run_mode(mode, under(name), PARAMS, X)


@pytest.mark.parametrize("name", UNLIFTED)
def test_they_are_no_matter_where_nothing_runs_in_the_plan(name):
    own = plan(init_seeds(2, 2), {}, SITES)
    y, _ = forward(under(name), own, PARAMS, None, X)
    assert_close(y, under(name)(PARAMS, bare, X))


def test_a_site_of_ones_own_that_collects_is_lifted():
    """Such as one that counts its calls."""

    class Counting:
        def __init__(self):
            self.calls = jnp.int32(0)

        def __call__(self, name, layer, params, /, *args, **options):
            self.calls = self.calls + 1
            return layer(params, *args, **options)

        def inner(self):
            return Counting()

        def sightings(self):
            return self.calls

        def take(self, sightings):
            self.calls = self.calls + sightings

    site = Counting()
    assert isinstance(site, Collecting)
    assert not isinstance(bare, Collecting)
    y = lifted(jax.checkpoint, PARAMS, site, X)
    assert int(site.calls) == 2
    assert_bitwise(y, lifted(jax.checkpoint, PARAMS, bare, X))
