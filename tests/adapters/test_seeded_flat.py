"""The flat form: a network over explicit parameters, with compiled programs kept by its plan."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper_functional import (
    KasminaException,
    absorb,
    bare,
    execute,
    forward,
    forward_batch,
    reweigh,
    run,
)
from tests.adapters.faces import (
    EQUINOX,
    FLAX,
    X,
    arrays,
    dense_kernel,
    each_face,
    gradients,
    nan_kernel,
    trained,
)
from tests.adapters.hosts import HOSTS
from tests.functional.networks import compilations, optimised_hlo
from tests.tolerance import assert_bitwise, assert_close


def grafted(face, alpha=0.4, **options):
    return face.wrap(**options).load_kernel("layers.0", 1, dense_kernel(), alpha=alpha)


def runner(face):
    return forward_batch if face is EQUINOX else forward


@each_face
def test_parameters_combine_back_to_the_host(face):
    model = grafted(face)
    flat = face.api.to_functional(model)
    rebuilt = flat.combine(flat.params)
    assert model.surgery.structure(rebuilt) == model.surgery.structure(face.mlp())
    assert_bitwise(arrays(rebuilt), arrays(face.mlp()))
    doubled = flat.combine(jax.tree.map(lambda p: 2 * p, flat.params))
    assert_bitwise(arrays(doubled), [2 * leaf for leaf in arrays(face.mlp())])


@each_face
def test_a_dormant_flat_network_compiles_to_the_very_program_of_the_host(face):
    model = face.wrap()
    flat = face.api.to_functional(model)
    ours = optimised_hlo(
        lambda params, x: runner(face)(flat.net, model.plan, params, None, x)[0], flat.params, X
    )
    theirs = optimised_hlo(lambda params, x: face.over(flat.combine(params), x), flat.params, X)
    assert ours == theirs


@each_face
def test_the_bare_site_runs_the_host(face):
    flat = face.api.to_functional(grafted(face))

    def net(x):
        return flat.net(flat.params, bare, x)

    assert_bitwise(jax.vmap(net)(X) if face is EQUINOX else net(X), face.over(face.mlp(), X))


@each_face
def test_a_ramp_compiles_one_program(face):
    model = grafted(face, alpha=0.0).ramp_seed_alpha("layers.0", 1, 1.0, 8, step=0)
    flat, plan, live = face.api.to_functional(model), model.plan, model.live
    step = jax.jit(partial(runner(face), flat.net), static_argnums=0)
    step(plan, flat.params, live, X)
    expected = [(i, np.asarray(face.over(model.advance(i).module, X))) for i in range(1, 9)]
    with compilations() as compiled:
        outputs = []
        for i, _ in expected:
            live = reweigh(live, model.advance(i).seeds, plan)
            outputs.append(step(plan, flat.params, live, X)[0])
    assert compiled() == 0
    for (_, theirs), ours in zip(expected, outputs, strict=True):
        assert_close(ours, theirs)


@each_face
def test_two_models_of_one_structure_have_one_plan(face):
    first, second = (grafted(face, alpha=a) for a in (0.2, 0.7))
    assert first.plan == second.plan
    assert hash(first.plan) == hash(second.plan)
    assert first.load_kernel("layers.0", 0, dense_kernel()).plan != first.plan


@each_face
def test_faults_are_counted_over_steps_and_absorbed(face):
    model = face.wrap().load_kernel("layers.0", 0, nan_kernel(), alpha=0.5)
    flat, plan, live = face.api.to_functional(model), model.plan, model.live
    counts = []
    for _ in range(4):
        _, live = run(flat.net, plan, flat.params, live, X[0])
        counts += live.errors.tolist()
    assert counts == [1, 2, 3, 3]
    assert absorb(model.seeds, live, step=4).fallback[0, 0]


@each_face
def test_execute_takes_the_flat_form_in_both_modes(face):
    model = grafted(face)
    flat = face.api.to_functional(model)
    call = partial(execute, flat.net, flat.params, sites=model.sites)
    y = model(X[0])
    planned, _ = call(model.seeds, model.kernels, X[0])
    assert_close(planned, y)
    seeds = jax.tree.map(jnp.asarray, model.seeds)
    table = [model.kernels.get(slot, dense_kernel()) for slot in range(2)]
    dynamic, after = jax.jit(lambda seeds: call(seeds, table, X[0]))(seeds)
    assert_close(dynamic, y)
    assert not np.asarray(after.error_count).any()


class EquinoxPair(eqx.Module):
    left: eqx.Module
    right: eqx.Module

    def __call__(self, a, b, *, scale=1.0):
        return self.left(a) * scale, self.right(b)


class FlaxPair(nnx.Module):
    def __init__(self, left, right):
        self.left, self.right = left, right

    def __call__(self, a, b, *, scale=1.0):
        return self.left(a) * scale, self.right(b)


@each_face
def test_models_of_several_arguments_take_a_tuple(face):
    kind = EquinoxPair if face is EQUINOX else FlaxPair
    model = face.wrap(kind(face.linear(3, 5), face.linear(5, 2)), example=(X[0], jnp.ones(5)))
    assert model.sites == ("left", "right")
    model = model.load_kernel("left", 0, dense_kernel(), alpha=0.4)
    flat = face.api.to_functional(model)
    given = (X[0], jnp.arange(5.0))
    y, _ = forward(flat.net, model.plan, flat.params, model.live, given)
    ours = model(*given)
    assert len(y) == 2
    for a, b in zip(y, ours, strict=True):
        assert_close(a, b)
    xs = (X, jnp.ones((4, 5)))
    gap = model.compare_with_original(*xs)
    assert gap["max_abs"] > 0
    assert model.observe(*xs).seeds.error_count[0, 0] == 0


@each_face
def test_the_flat_form_starts_from_what_was_trained(face):
    model = grafted(face)
    module = trained(face, model.module)
    after = model.with_module(module)
    flat = face.api.to_functional(after)
    y, _ = runner(face)(flat.net, after.plan, flat.params, after.live, X)
    assert_close(y, face.over(module, X))


def test_running_statistics_and_random_streams_are_threaded_through_rest():
    host = HOSTS["flax statistics"]().module
    model = FLAX.wrap(host).load_kernel("layers.0", 0, dense_kernel(), alpha=0.3)
    flat, plan, live = FLAX.api.to_functional(model), model.plan, model.live
    assert flat.rest is not None
    step = jax.jit(lambda rest: forward(flat.net, plan, flat.params, live, (rest, X)))
    module, rest = nnx.clone(model.module), flat.rest
    for _ in range(3):
        expected = module(X)
        (y, rest), _ = step(rest)
        assert_close(y, expected)
    after = flat.combine(flat.params, rest)
    ours, theirs = after.layers[1], module.layers[1]
    assert_close(ours.mean[...], theirs.mean[...])
    assert_close(ours.var[...], theirs.var[...])
    assert after.layers[2].rngs.count[...] == module.layers[2].rngs.count[...] == 3
    assert_bitwise(arrays(flat.combine(flat.params)), arrays(host))


def test_a_model_with_a_state_of_equinox_takes_it_as_an_argument():
    layer, state = eqx.nn.make_with_state(
        lambda: eqx.nn.Sequential([eqx.nn.BatchNorm(3, axis_name="batch", mode="batch")])
    )()
    model = EQUINOX.wrap(layer, target_layers=[eqx.nn.BatchNorm])
    model = model.load_kernel("layers.0", 0, dense_kernel(0, 3, 3), alpha=0.4)
    flat = EQUINOX.api.to_functional(model)

    def over(call):
        own = jax.tree.map(jnp.asarray, state)
        return jax.vmap(lambda x: call(x, own), axis_name="batch", out_axes=(0, None))(X)

    def flat_call(x, own):
        return forward(flat.net, model.plan, flat.params, model.live, (x, own))[0]

    (y, after), (expected, theirs) = over(flat_call), over(model.module)
    assert_close(y, expected)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(theirs), strict=True):
        assert_close(a, b)
    (_, bare_after) = over(layer)
    for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(bare_after), strict=True):
        assert_bitwise(a, b)


def test_maps_within_an_equinox_network_note_faults():
    host = HOSTS["equinox sequence"]()
    model = EQUINOX.wrap(host.module, target_layers=["linear", "norm"])
    nan = nan_kernel(6, 6)
    model = model.load_kernel("linear", 0, nan, alpha=0.5).load_kernel(
        "norm", 1, dense_kernel(0, 6, 6)
    )
    flat = EQUINOX.api.to_functional(model)
    y, seen = jax.jit(partial(forward, flat.net, model.plan))(flat.params, model.live, host.x[0])
    assert [fault.shape for fault in seen.faults] == [(), ()]
    faults = dict(zip(["norm", "linear"], map(bool, seen.faults), strict=True))
    assert faults == {"norm": False, "linear": True}
    assert_close(y, model.module(host.x[0]))
    observed = model.observe(host.x)
    assert observed.seeds.error_count[model.sites.index("linear"), 0] == 1


def inner(face, wrapper):
    """A host with a transformation of its own around its first layer."""

    def run_layers(self, x):
        return self.last(wrapper(lambda first, x: jnp.tanh(first(x)))(self.first, x))

    if face is EQUINOX:

        class Host(eqx.Module):
            first: eqx.Module
            last: eqx.Module
            __call__ = run_layers

        return Host(face.linear(3, 5), face.linear(5, 2))

    class Host(nnx.Module):
        def __init__(self):
            self.first, self.last = face.linear(3, 5), face.linear(5, 2)

        __call__ = run_layers

    return Host()


def closed(transform):
    """A transformation of functions of arrays, for one of a layer and an array."""
    return lambda function: lambda layer, x: transform(lambda x: function(layer, x))(x)


INNER = [
    pytest.param(EQUINOX, closed(jax.checkpoint), id="equinox-jax.checkpoint"),
    pytest.param(EQUINOX, closed(jax.jit), id="equinox-jax.jit"),
    pytest.param(EQUINOX, eqx.filter_checkpoint, id="equinox-filter_checkpoint"),
    pytest.param(EQUINOX, eqx.filter_jit, id="equinox-filter_jit"),
    pytest.param(FLAX, closed(jax.checkpoint), id="flax-jax.checkpoint"),
    pytest.param(FLAX, nnx.remat, id="flax-remat"),
    pytest.param(FLAX, nnx.jit, id="flax-jit"),
]


@pytest.mark.parametrize(("face", "wrapper"), INNER)
def test_transformations_within_the_network(face, wrapper):
    host = inner(face, wrapper)
    model = face.wrap(host).load_kernel("first", 0, dense_kernel(), alpha=0.4)
    expected = face.over(
        face.wrap(inner(face, lambda f: f))
        .load_kernel("first", 0, dense_kernel(), alpha=0.4)
        .module,
        X,
    )
    # The module runs, gradients and all.
    assert_close(face.over(model.module, X), expected)
    assert np.isfinite(gradients(face, model.module)[2]).all()
    # The flat form cannot take faults out of there, and says what to do.
    flat = face.api.to_functional(model)
    message = "site 'first' with running kernels was called inside .* through lift"
    with pytest.raises(KasminaException, match=message):
        runner(face)(flat.net, model.plan, flat.params, model.live, X)
    # Dormant there, or in another layer, it runs.
    bare_plan = model.unload_kernel("first", 0).plan
    y, _ = runner(face)(flat.net, bare_plan, flat.params, None, X)
    assert_close(y, face.over(host, X))
    other = model.unload_kernel("first", 0).load_kernel("last", 0, dense_kernel(0, 5, 2))
    y, _ = runner(face)(flat.net, other.plan, flat.params, other.live, X)
    assert_close(y, face.over(other.module, X))
