"""Contained kernels under vmap, loops and batches; native programs and deserialised ones.

A deserialised program has no batching rules, so every law is checked for both.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from esper_functional import Program, run_contained
from tests.tolerance import assert_bitwise, assert_close, assert_finite, assert_tree_close

SIZE, IN, OUT = 4, 3, 5
KINDS = ("native", "deserialised")


def apply(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) * jnp.sqrt(params["scale"])


@cache
def program(kind: str) -> Program:
    if kind == "native":
        return Program("native tanh", apply)
    (b,) = export.symbolic_shape("b")
    avals = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params())
    exported = export.export(jax.jit(apply))(avals, jax.ShapeDtypeStruct((b, IN), jnp.float32))
    again = export.deserialize(exported.serialize(vjp_order=1))
    return Program("deserialised tanh", again.call, batches=False)


def params(seed: int = 0):
    random = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(random.normal(size=(IN, OUT)), jnp.float32),
        "b": jnp.asarray(random.normal(size=OUT), jnp.float32),
        "scale": jnp.asarray(random.uniform(0.5, 2.0, OUT), jnp.float32),
    }


def population(size: int = 2):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params(i) for i in range(size)))


def member(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


X = jnp.asarray(np.random.default_rng(9).normal(size=(SIZE, IN)), jnp.float32)
COTANGENT = jnp.asarray(np.random.default_rng(8).normal(size=(SIZE, OUT)), jnp.float32)


def contained(kind):
    return lambda p, x: run_contained(program(kind), p, x)[0]


def weighed(kind):
    """A scalar of one example or of a batch, with a different weight for each output."""
    return lambda p, x, c: jnp.sum(contained(kind)(p, x) * c)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_programs_and_is_finite(kind):
    y, finite = run_contained(program(kind), params(), X)
    assert_close(y, apply(params(), X))
    assert finite.shape == (SIZE, 1)
    assert bool(finite.all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (4,), (2, 2), (1, 4, 1)])
def test_any_leading_axes_are_a_batch(kind, lead):
    x = X.reshape(*lead, IN) if lead else X[0]
    y, finite = run_contained(program(kind), params(), x)
    assert_close(y, apply(params(), x))
    assert finite.shape == (*lead, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_equals_loop_equals_batch(kind):
    f = contained(kind)
    mapped = jax.jit(jax.vmap(f, in_axes=(None, 0)))(params(), X)
    assert_close(mapped, f(params(), X))
    assert_close(mapped, jnp.stack([f(params(), x) for x in X]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_vmap_equal_those_of_loop_batch_and_the_bare_program(kind):
    f = weighed(kind)

    def mapped(p, x):
        return jnp.sum(jax.vmap(f, in_axes=(None, 0, 0))(p, x, COTANGENT))

    def looped(p, x):
        return sum(f(p, x[i], COTANGENT[i]) for i in range(SIZE))

    expected = jax.grad(lambda p, x: jnp.sum(apply(p, x) * COTANGENT), argnums=(0, 1))(params(), X)
    for g in (mapped, looped, lambda p, x: f(p, x, COTANGENT)):
        assert_tree_close(jax.jit(jax.grad(g, argnums=(0, 1)))(params(), X), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_axes", [(0, None), (0, 0)], ids=["shared x", "own x"])
def test_a_population_equals_each_of_its_members(kind, in_axes):
    people, f = population(), contained(kind)
    x = X if in_axes[1] is None else jnp.stack([X, X[::-1]])
    mapped = jax.jit(jax.vmap(f, in_axes=in_axes))(people, x)
    for i in range(2):
        assert_close(mapped[i], f(member(people, i), x if in_axes[1] is None else x[i]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_population_equal_those_of_each_member(kind):
    people, f = population(), weighed(kind)
    gradient = jax.grad(f, argnums=(0, 1))
    mapped = jax.jit(jax.vmap(gradient, in_axes=(0, None, None)))(people, X, COTANGENT)
    for i in range(2):
        assert_tree_close(member(mapped, i), gradient(member(people, i), X, COTANGENT))


@pytest.mark.parametrize("kind", KINDS)
def test_one_mapped_leaf_among_the_parameters_is_enough(kind):
    people = {**params(), "b": population()["b"]}
    axes = {"w": None, "b": 0, "scale": None}
    f = weighed(kind)

    def total(p):
        return jnp.sum(jax.vmap(f, in_axes=(axes, None, None))(p, X, COTANGENT))

    def looped(p):
        return sum(f({**p, "b": p["b"][i]}, X, COTANGENT) for i in range(2))

    assert_tree_close(jax.grad(total)(people), jax.grad(looped)(people))


@pytest.mark.parametrize("kind", KINDS)
def test_a_population_over_a_vmapped_batch(kind):
    people, f = population(), contained(kind)
    nested = jax.vmap(lambda p: jax.vmap(lambda x: f(p, x))(X))(people)
    for i in range(2):
        assert_close(nested[i], f(member(people, i), X))


@pytest.mark.parametrize("kind", KINDS)
def test_a_vmapped_batch_over_a_population(kind):
    people, f = population(), contained(kind)
    nested = jax.vmap(lambda x: jax.vmap(lambda p: f(p, x))(people))(X)
    for i in range(2):
        assert_close(nested[:, i], f(member(people, i), X))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_for_each_example_equals_the_loop(kind):
    gradient = jax.grad(weighed(kind))
    mapped = jax.vmap(gradient, in_axes=(None, 0, 0))(params(), X, COTANGENT)
    for i in range(SIZE):
        assert_tree_close(member(mapped, i), gradient(params(), X[i], COTANGENT[i]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_jacobian_by_the_parameters_is_the_bare_programs(kind):
    expected = jax.jacrev(lambda p: apply(p, X[:1]))(params())
    assert_tree_close(jax.jacrev(lambda p: contained(kind)(p, X[:1]))(params()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_jacobian_by_the_input_is_the_bare_programs(kind):
    expected = jax.jacrev(lambda x: apply(params(), x))(X)
    assert_close(jax.jacrev(lambda x: contained(kind)(params(), x))(X), expected)


def guarded(kind, p, x):
    """The kernel's output where it is finite, else 0, as a blend does it."""
    k, finite = run_contained(program(kind), p, x)
    return jnp.sum(jnp.where(finite, k, 0.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_parameters_that_give_nan_poison_no_gradient(kind, bad):
    broken = {**params(), "scale": jnp.full(OUT, bad, jnp.float32)}
    _, finite = run_contained(program(kind), broken, X)
    assert not bool(finite.any())
    to_params, to_x = jax.grad(lambda p, x: guarded(kind, p, x), argnums=(0, 1))(broken, X)
    assert_bitwise((to_params, to_x), jax.tree.map(jnp.zeros_like, (broken, X)))


@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_example_costs_its_own_input_gradient_and_the_parameters(kind):
    x = X.at[1, 0].set(jnp.nan)
    good = np.array([0, 2, 3])
    _, finite = run_contained(program(kind), params(), x)
    assert finite[:, 0].tolist() == [True, False, True, True]
    gradient = jax.grad(lambda p, x: guarded(kind, p, x), argnums=(0, 1))
    for function in (gradient, jax.jit(gradient)):
        to_params, to_x = function(params(), x)
        assert_finite((to_params, to_x))
        assert not any(np.asarray(g).any() for g in jax.tree.leaves(to_params))
        assert not np.asarray(to_x[1]).any()
        assert_close(to_x[good], gradient(params(), x[good])[1])


@pytest.mark.parametrize("kind", KINDS)
def test_faults_are_seen_under_vmap(kind):
    x = X.at[1, 0].set(jnp.inf).at[1, 1].set(-jnp.inf)
    broken = {**params(), "w": jnp.ones((IN, OUT))}
    _, finite = jax.vmap(lambda x: run_contained(program(kind), broken, x))(x)
    assert finite[:, 0].tolist() == [True, False, True, True]


def rooted(params, x):
    """Finite, with a gradient to w that is not: the root of zero has none."""
    return x[:, :1] * params["g"] + jnp.sqrt(jnp.sum(params["w"] ** 2))


@pytest.mark.parametrize("summed", [False, True])
def test_no_gradient_of_parameters_is_not_finite(summed):
    own = {"g": jnp.ones(OUT), "w": jnp.zeros(3)}

    def loss(own, x):
        k, finite = run_contained(Program("rooted", rooted), own, x, summed=summed)
        return jnp.sum(k * COTANGENT[0]), finite

    (_, finite), grads = jax.value_and_grad(loss, has_aux=True)(own, X)
    assert np.asarray(finite).all()
    assert not np.asarray(grads["w"]).any()
    assert_bitwise(grads["g"], jax.grad(loss, has_aux=True)({**own, "w": jnp.ones(3)}, X)[0]["g"])
    good, _ = jax.grad(loss, has_aux=True)({**own, "w": jnp.ones(3)}, X)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(good))
