"""Wrapped modules under the transformations of jax and of their frameworks."""

import copy
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper_functional import DerivativeError, Kernel
from tests.adapters.faces import (
    EQUINOX,
    FLAX,
    X,
    affine_kernel,
    at,
    dense_kernel,
    each_face,
    gradients,
    loss,
    trained,
)
from tests.adapters.kernels import jax_kernel
from tests.tolerance import assert_close, assert_tree_close


def grafted(face, **options):
    model = face.wrap(**options).load_kernel("layers.0", 0, dense_kernel(), alpha=0.4)
    return model.load_kernel("layers.0", 1, affine_kernel(), alpha=0.2)


def of_artifact(face):
    return face.wrap().load_kernel("layers.0", 2, jax_kernel(), alpha=0.5)


MODELS = {"functions": grafted, "artifact": of_artifact}
each_model = pytest.mark.parametrize("make", list(MODELS.values()), ids=list(MODELS))


@each_face
@each_model
def test_jit_vmap_map_scan_and_checkpoint_give_the_loops_outputs(face, make):
    module = make(face).module
    loop = jnp.stack([module(x) for x in X])
    assert_close(face.over(module, X), loop)
    assert_close(jax.jit(lambda x: face.over(module, x))(X), loop)
    assert_close(jax.vmap(module)(X), loop)
    assert_close(jax.lax.map(module, X), loop)
    assert_close(jax.vmap(jax.vmap(module))(X.reshape(2, 2, 3)).reshape(4, 2), loop)
    assert_close(jax.checkpoint(lambda x: face.over(module, x))(X), loop)
    _, ys = jax.lax.scan(lambda carry, x: (carry, module(x)), None, X)
    assert_close(ys, loop)


@each_face
@each_model
def test_gradients_under_them_are_the_plain_ones(face, make):
    params, rebuild = face.split(make(face).module)

    def plain(p, x):
        return loss(face, rebuild(p), x)

    expected = jax.jit(jax.grad(plain))(params, X)
    assert_tree_close(jax.jit(jax.grad(jax.checkpoint(plain)))(params, X), expected)

    def accumulated(p):
        def add(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(one)(p, x)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, p), X)[0]

    def one(p, x):
        return jnp.sum(rebuild(p)(x) ** 2)

    each = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0)))(params, X)
    loop = [jax.jit(jax.grad(one))(params, x) for x in X]
    assert_tree_close(each, jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop))
    summed = jax.tree.map(lambda g: jnp.sum(g, axis=0), each)
    assert_tree_close(jax.jit(accumulated)(params), summed)


@each_face
def test_a_population_of_kernels_is_the_loop_over_them(face):
    params, rebuild = face.split(grafted(face).module)
    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), params)

    def run(p):
        return loss(face, rebuild(p), X)

    loop = [jax.value_and_grad(run)(jax.tree.map(lambda p, i=i: p[i], many)) for i in range(3)]
    values, grads = jax.jit(jax.vmap(jax.value_and_grad(run)))(many)
    assert_close(values, jnp.stack([value for value, _ in loop]))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[g for _, g in loop])
    assert_tree_close(grads, stacked)


def test_the_filtered_transformations_of_equinox():
    module = grafted(EQUINOX).module
    y = EQUINOX.over(module, X)
    assert_close(eqx.filter_jit(EQUINOX.over)(module, X), y)
    assert_close(eqx.filter_vmap(module)(X), y)

    @eqx.filter_jit
    @eqx.filter_grad
    def of(module, wrapper):
        return jnp.sum(jax.vmap(wrapper(module))(X) ** 2)

    plain, remat = of(module, lambda m: m), of(module, eqx.filter_checkpoint)
    own = [eqx.filter(g, eqx.is_inexact_array) for g in (remat, plain)]
    assert_tree_close(*own)
    # No gradient reaches what the seeds decide.
    layer = at(plain, "layers.0")
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(layer.esper_blending))


def test_the_lifted_transformations_of_flax():
    module = grafted(FLAX).module
    y = module(X)
    assert_close(nnx.jit(lambda m, x: m(x))(module, X), y)
    assert_close(nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(module, X), y)
    assert_close(nnx.remat(lambda m, x: m(x))(module, X), y)
    _, ys = nnx.scan(lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0))(module, X)
    assert_close(ys, y)

    def of(wrapper, module):
        return jnp.sum(wrapper(lambda m, x: m(x))(module, X) ** 2)

    plain = nnx.jit(nnx.grad(partial(of, lambda f: f)))(module)
    remat = nnx.jit(nnx.grad(partial(of, nnx.remat)))(module)
    assert_tree_close(nnx.to_pure_dict(remat), nnx.to_pure_dict(plain))


@each_face
def test_a_recurrent_layer_may_carry_kernels(face):
    """The same layer at every step of a scan within the network."""
    model = face.wrap(recurrent(face), target_layers=["cell"])
    model = model.load_kernel("cell", 0, dense_kernel(0, 3, 3), alpha=0.4)
    w, b = face.weights(at(model.host, "cell"))
    k = dense_kernel(0, 3, 3)

    def by_hand(xs):
        h = jnp.zeros_like(xs[0])
        for x in xs:
            z = h + x
            h = jnp.tanh(0.6 * (z @ w + b) + 0.4 * k.program.apply(k.params, z))
        return h

    assert_close(jax.jit(lambda xs: model.module(xs))(X), by_hand(X))
    found = jax.grad(lambda x: jnp.sum(model.module(x) ** 2))(X)
    assert_close(found, jax.grad(lambda x: jnp.sum(by_hand(x) ** 2))(X))


def recurrent(face):
    def run(self, xs):
        def step(h, x):
            return jnp.tanh(self.cell(h + x)), None

        return jax.lax.scan(step, jnp.zeros_like(xs[0]), xs)[0]

    if face is EQUINOX:

        class Recurrent(eqx.Module):
            cell: eqx.Module
            __call__ = run

        return Recurrent(face.linear(3, 3))

    class Recurrent(nnx.Module):
        def __init__(self):
            self.cell = face.linear(3, 3)

        __call__ = run

    return Recurrent()


@each_face
def test_a_module_first_asked_for_within_a_trace_does_not_keep_it(face):
    model, fresh = grafted(face), grafted(face)
    y = jax.jit(lambda x: face.over(model.module, x))(X)
    assert_close(face.over(model.module, X), y)
    assert model.module is model.module
    jax.vmap(lambda x: fresh.module(x))(X)
    after = model.with_module(trained(face, model.module)).fossilize("layers.0", 0)
    assert np.isfinite(face.over(after.module, X)).all()
    assert copy.deepcopy(model).module is not model.module


@each_face
def test_a_model_may_be_wrapped_and_grafted_within_a_trace(face):
    """As a search over kernels does, or one who wants shapes alone."""

    def total(params, x):
        kernel = Kernel(dense_kernel().program, params)
        model = face.wrap().load_kernel("layers.0", 0, kernel, alpha=0.4)
        assert model.module is model.module
        return jnp.sum(face.over(model.module, x) ** 2)

    params = dense_kernel().params
    found = jax.jit(jax.grad(total))(params, X)
    assert_tree_close(found, jax.grad(total)(params, X))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(found))
    assert jax.eval_shape(total, params, X).shape == ()


@each_face
def test_contained_kernels_are_differentiated_once_and_others_as_often_as_you_like(face):
    def run(model, x):
        return jnp.sum(model.module(x) ** 2)

    contained, free = grafted(face), grafted(face, contain=False)
    assert_close(face.over(free.module, X), face.over(contained.module, X))
    _, to_params, to_x = gradients(face, contained.module)
    _, free_to_params, free_to_x = gradients(face, free.module)
    assert_close(free_to_x, to_x)
    for read in (face.weights, face.kernels):
        assert_tree_close(read(at(free_to_params, "layers.0")), read(at(to_params, "layers.0")))
    with pytest.raises(DerivativeError, match="contain=False"):
        jax.jvp(partial(run, contained), (X[0],), (X[1],))
    with pytest.raises(DerivativeError, match="contain=False"):
        jax.hessian(partial(run, contained))(X[0])
    _, tangent = jax.jvp(partial(run, free), (X[0],), (X[1],))
    assert_close(tangent, jnp.vdot(jax.grad(partial(run, contained))(X[0]), X[1]))
    w, b = face.weights(at(free.host, "layers.0"))
    v, c = face.weights(at(free.host, "layers.1"))
    one, two = dense_kernel(), affine_kernel()

    def by_hand(x):
        k = 0.4 * one.program.apply(one.params, x) + 0.2 * two.program.apply(two.params, x)
        return jnp.sum((jnp.tanh(0.4 * (x @ w + b) + k) @ v + c) ** 2)

    assert_close(jax.hessian(partial(run, free))(X[0]), jax.hessian(by_hand)(X[0]))
