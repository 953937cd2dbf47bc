"""Linen modules as networks with sites; nothing about the module changes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from esper_adapters.flax import find_linen_sites, linen_sites
from esper_functional import (
    BLENDS,
    Event,
    EventKind,
    KasminaException,
    SeedIndexError,
    bare,
    execute,
    fold_events,
    forward,
    gather,
    init_seeds,
    plan,
)
from tests.adapters.faces import dense_kernel, nan_kernel
from tests.functional.networks import optimised_hlo
from tests.tolerance import assert_bitwise, assert_close, assert_tree_close

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(5, name="hidden")(x))
        return nn.Dense(2, name="out")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = MLP(name="inner")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(5)(x)


MODULE = MLP()
PARAMS = MODULE.init(jax.random.key(0), X)["params"]
SITES = find_linen_sites(MODULE, {"params": PARAMS}, X)
KERNELS = {0: dense_kernel(), 1: dense_kernel(0, 5, 2)}


def net(params, site, x):
    with linen_sites(site, SITES):
        return MODULE.apply({"params": params}, x)


def grafted(*places):
    """The state in which slot 0 runs at the first layer and 1 at the second."""
    events = []
    for layer, alpha in places:
        events.append(Event(0, layer, 0, EventKind.LOAD, value=float(layer)))
        events.append(Event(0, layer, 0, EventKind.ACTIVATE, value=alpha))
    return fold_events(init_seeds(len(SITES), 2), events)


def run(state, blend="convex", network=net, kernels=KERNELS):
    planned = plan(state, kernels, SITES, blend=blend)
    return planned, gather(state, kernels, planned), partial(forward, network, planned)


def test_sites_are_found_by_type_and_path_in_the_order_in_which_they_run():
    assert SITES == ("hidden", "out")
    block = Block()
    variables = block.init(jax.random.key(0), X)
    find = partial(find_linen_sites, block, variables, X, mutable=["batch_stats"])
    assert find() == ("inner.hidden", "inner.out", "Dense_0")
    assert find(target_layers=["inner.*"]) == ("inner.hidden", "inner.out")
    # What a layer holds has run when it returns, but it was called first.
    assert find(target_layers=[MLP, nn.BatchNorm, "Dense_0"]) == ("inner", "BatchNorm_0", "Dense_0")
    eval_mode = partial(find_linen_sites, block, variables, X, train=False)
    assert eval_mode(target_layers=[nn.BatchNorm]) == ("BatchNorm_0",)
    with pytest.raises(SeedIndexError, match=r"matches 'inner\.hiden'; the nearest are"):
        find(target_layers=["inner.hiden"])
    with pytest.raises(SeedIndexError, match="no layer of type Conv: it is made of"):
        find(target_layers=[nn.Conv])


@pytest.mark.parametrize("blend", BLENDS)
def test_output_and_gradients_are_those_written_by_hand(blend):
    _, live, call = run(grafted((0, 0.4), (1, 0.3)), blend)

    def blended(h, k, a):
        return h + a * k if blend == "residual" else (1 - a) * h + a * k

    def by_hand(params, kernels, x):
        for name, slot, alpha in (("hidden", 0, 0.4), ("out", 1, 0.3)):
            own = params[name]
            k = KERNELS[slot].program.apply(kernels[slot], x)
            x = blended(x @ own["kernel"] + own["bias"], k, alpha)
            x = jnp.tanh(x) if slot == 0 else x
        return jnp.sum(x**2)

    def ours(params, kernels, x):
        import dataclasses

        return jnp.sum(call(params, dataclasses.replace(live, params=kernels), x)[0] ** 2)

    found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(PARAMS, live.params, X)
    expected = jax.value_and_grad(by_hand, argnums=(0, 1, 2))(PARAMS, live.params, X)
    assert_tree_close(found, expected)


def test_dormant_it_compiles_to_the_very_program_of_the_module():
    planned, live, call = run(init_seeds(2, 2))
    assert planned.dormant
    assert live is None
    ours = optimised_hlo(lambda params, x: call(params, None, x)[0], PARAMS, X)
    assert ours == optimised_hlo(lambda params, x: MODULE.apply({"params": params}, x), PARAMS, X)
    assert_bitwise(net(PARAMS, bare, X), MODULE.apply({"params": PARAMS}, X))


def test_the_module_is_not_changed():
    _, live, call = run(grafted((0, 0.4)))
    before = MODULE.apply({"params": PARAMS}, X)
    assert (call(PARAMS, live, X)[0] != before).any()
    assert_bitwise(MODULE.apply({"params": PARAMS}, X), before)
    assert MLP() == MODULE


def test_execute_runs_it_in_both_modes_and_counts_faults():
    kernels = {0: nan_kernel(), 1: KERNELS[1]}
    state = grafted((0, 0.5), (1, 0.3))
    call = partial(execute, net, PARAMS, sites=SITES)
    y, after = call(state, kernels, X)
    assert np.asarray(after.error_count).tolist() == [[1, 0], [0, 0]]
    traced = jax.tree.map(jnp.asarray, state)
    dynamic, also = jax.jit(lambda state: call(state, kernels, X))(traced)
    assert_close(dynamic, y)
    assert np.asarray(also.error_count).tolist() == [[1, 0], [0, 0]]


def test_it_trains_with_running_statistics():
    block = Block()
    variables = block.init(jax.random.key(0), X)
    sites = ("inner.hidden", "BatchNorm_0", "Dense_0")

    def network(variables, site, x):
        with linen_sites(site, sites):
            return block.apply(variables, x, mutable=["batch_stats"])

    events = [
        Event(0, row, 0, kind, value=value)
        for row in range(2)
        for kind, value in ((EventKind.LOAD, float(row)), (EventKind.ACTIVATE, 0.4))
    ]
    state = fold_events(init_seeds(3, 1), events)
    kernels = {0: dense_kernel(), 1: dense_kernel(0, 2, 2)}
    planned = plan(state, kernels, sites)
    live = gather(state, kernels, planned)

    def loss(params, statistics):
        given = {"params": params, "batch_stats": statistics}
        (y, after), _ = forward(network, planned, given, live, X)
        return jnp.mean((y - 1) ** 2), after["batch_stats"]

    @jax.jit
    def step(params, statistics):
        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params, statistics)
        return value, jax.tree.map(lambda p, g: p - 0.2 * g, params, grads), after

    params, statistics = variables["params"], variables["batch_stats"]
    losses = []
    for _ in range(15):
        value, params, statistics = step(params, statistics)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    assert np.asarray(statistics["BatchNorm_0"]["mean"]).any()
    # The kernels of a batch norm take its input, and its statistics do not see them.
    dormant = plan(init_seeds(3, 1), {}, sites)
    given = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
    only_norm = fold_events(init_seeds(3, 1), events[2:])
    own = plan(only_norm, kernels, sites)
    (_, ours), _ = forward(network, own, given, gather(only_norm, kernels, own), X)
    (_, theirs), _ = forward(network, dormant, given, None, X)
    assert_bitwise(ours["batch_stats"], theirs["batch_stats"])


def test_names_of_the_layers_within_a_site():
    """A module and a layer of it are two sites."""
    block = Block()
    variables = block.init(jax.random.key(0), X)
    sites = ("inner", "inner.out")
    called = []

    def site(name, layer, params, /, *args, **options):
        called.append(name)
        return layer(params, *args, **options)

    with linen_sites(site, sites):
        y = block.apply(variables, X, train=False)
    assert called == ["inner", "inner.out"]
    assert_bitwise(y, block.apply(variables, X, train=False))


def test_remat_within_the_module_is_refused_with_advice():
    class Remat(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.remat(nn.Dense)(5, name="hidden")(x)
            return nn.Dense(2, name="out")(jnp.tanh(x))

    module = Remat()
    params = module.init(jax.random.key(0), X)["params"]
    assert set(find_linen_sites(module, {"params": params}, X)) == {"hidden", "out"}

    def network(params, site, x):
        with linen_sites(site, SITES):
            return module.apply({"params": params}, x)

    _, live, call = run(grafted((0, 0.4)), network=network)
    with pytest.raises(KasminaException, match="'hidden' .* inside .*jax.checkpoint.* whole of"):
        call(params, live, X)
    _, live, call = run(grafted((1, 0.4)), network=network)
    y, _ = call(params, live, X)
    whole = jax.checkpoint(lambda params, x: call(params, live, x)[0])
    assert_close(whole(params, X), y)
    found = jax.grad(lambda p: jnp.sum(whole(p, X) ** 2))(params)
    assert_tree_close(found, jax.grad(lambda p: jnp.sum(call(p, live, X)[0] ** 2))(params))
