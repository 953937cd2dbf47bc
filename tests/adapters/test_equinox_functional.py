"""The flat form of an Equinox model computes what its module does."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_adapters.equinox import SeededModel, to_functional, trainable, wrap
from esper_functional import BLENDS, bare, forward, run
from tests.adapters.kernels import artifact, jax_kernel
from tests.functional.networks import optimised_hlo
from tests.tolerance import assert_bitwise, assert_close, assert_tree_close

X = jax.random.normal(jax.random.key(7), (4, 3))


class Residual(eqx.Module):
    """A host with a layer inside a list, one used twice, and one without seeds of its own."""

    inner: list[eqx.nn.Linear]
    norm: eqx.nn.LayerNorm
    out: eqx.nn.Linear
    gain: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, x, *, key=None):
        h = jnp.tanh(self.inner[0](x))
        h = h + self.inner[1](jax.nn.relu(self.inner[1](h)))
        return self.out(self.norm(h)) * self.gain


def host() -> Residual:
    keys = jax.random.split(jax.random.key(0), 3)
    return Residual(
        inner=[eqx.nn.Linear(3, 5, key=keys[0]), eqx.nn.Linear(5, 5, key=keys[1])],
        norm=eqx.nn.LayerNorm(5),
        out=eqx.nn.Linear(5, 2, use_bias=False, key=keys[2]),
        gain=jnp.asarray(1.5),
        name="residual",
    )


def grafted(blend: str = "convex") -> SeededModel:
    model = wrap(host(), blend=blend, seeds_per_layer=2)
    model = model.load_kernel("inner.0", 0, jax_kernel(0), alpha=0.25)
    model = model.load_kernel("inner.0", 1, jax_kernel(1), alpha=0.5)
    square = jax_kernel(2, artifact("bottleneck", 5, 5))
    return model.load_kernel("inner.1", 0, square, alpha=0.5)


def test_sites_are_the_paths_of_the_layers():
    assert wrap(host()).sites == ("inner.0", "inner.1", "out")


def test_parameters_combine_back_to_the_host():
    flat = to_functional(wrap(host()))
    rebuilt = flat.combine(flat.params)
    assert jax.tree.structure(rebuilt) == jax.tree.structure(host())
    assert_bitwise(rebuilt, host())


@pytest.mark.parametrize("blend", BLENDS)
def test_forward_under_vmap_equals_the_module(blend):
    model = grafted(blend)
    flat, plan, live = to_functional(model), model.plan, model.live
    mapped = jax.vmap(lambda x: forward(flat.net, plan, flat.params, live, x)[0])(X)
    assert_close(mapped, jax.vmap(model.module)(X))
    assert_close(mapped, jnp.stack([model(x) for x in X]))


def test_gradients_equal_the_modules():
    model = grafted()
    flat, plan, live = to_functional(model), model.plan, model.live
    assert live is not None

    def ours(params, kernels):
        own = type(live)(live.host_weights, live.weights, live.errors, kernels)
        return jnp.sum(jax.vmap(lambda x: forward(flat.net, plan, params, own, x)[0])(X) ** 2)

    params, static = eqx.partition(model.module, trainable(model.module))

    def theirs(params):
        return jnp.sum(jax.vmap(eqx.combine(params, static))(X) ** 2)

    to_host, to_kernels = jax.jit(jax.grad(ours, argnums=(0, 1)))(flat.params, live.params)
    found = jax.jit(jax.grad(theirs))(params)
    assert_tree_close(to_kernels, found.inner[0].kernels + found.inner[1].kernels)
    assert_tree_close(to_host.inner[0], found.inner[0].host)
    assert_tree_close((to_host.inner[1], to_host.out), (found.inner[1].host, found.out))
    assert_close(to_host.gain, found.gain)
    assert all(np.asarray(g).any() for g in jax.tree.leaves((to_host, to_kernels)))


def test_a_dormant_flat_network_compiles_to_the_very_program_of_the_host():
    model = wrap(host())
    flat, plan, live = to_functional(model), model.plan, model.live
    ours = optimised_hlo(
        lambda params, x: jax.vmap(lambda x: forward(flat.net, plan, params, live, x)[0])(x),
        flat.params,
        X,
    )
    theirs = optimised_hlo(lambda params, x: jax.vmap(flat.combine(params))(x), flat.params, X)
    assert ours == theirs


def test_the_bare_site_runs_the_host():
    flat = to_functional(grafted())
    assert_bitwise(jax.vmap(lambda x: flat.net(flat.params, bare, x))(X), jax.vmap(host())(X))


def test_faults_are_counted_over_steps():
    nan = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), jax_kernel())
    model = wrap(host()).load_kernel("inner.0", 0, nan, alpha=0.5)
    flat, plan, live = to_functional(model), model.plan, model.live

    def step(live):
        return run(flat.net, plan, flat.params, live, X[0])[1]

    counts = []
    for _ in range(4):
        live = step(live)
        counts += live.errors.tolist()
    assert counts == [1, 2, 3, 3]


def test_the_static_parts_of_the_host_are_kept():
    flat = to_functional(grafted())
    assert flat.combine(flat.params).name == "residual"
    doubled = jax.tree.map(lambda p: 2 * p, flat.params)
    assert_bitwise(flat.combine(doubled).out.weight, 2 * host().out.weight)
