"""What holds for every host layer: under jit, vmap, scan, remat and export."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import esper_functional as ef
from tests.functional.layers import CASES, draw, jitted, made, with_gradients
from tests.tolerance import assert_bitwise, assert_close, assert_finite, assert_tree_close

BATCHED = [name for name, case in CASES.items() if case.batched and "dropout" not in name]
every_case = pytest.mark.parametrize("name", CASES)
every_batched_case = pytest.mark.parametrize("name", BATCHED)


@every_case
def test_jit_is_eager(name):
    case, params, x, cotangent = made(name)
    eager = with_gradients(case.apply, params, x, cotangent)
    assert_tree_close(jitted(case.apply, params, x, cotangent), eager)
    assert_finite(eager)


@every_case
def test_vmap_over_parameters_and_inputs_is_a_loop(name):
    case = CASES[name]
    keys = jax.random.split(jax.random.key(1), 3)
    params = jax.vmap(lambda key: case.init(key, jnp.float32))(keys)
    x = jnp.asarray(draw(2, 3, *case.shape))
    cotangent = jnp.asarray(draw(3, *jax.eval_shape(jax.vmap(case.apply), params, x).shape))
    mapped = jax.jit(jax.vmap(partial(with_gradients, case.apply)))(params, x, cotangent)
    for i in range(3):
        own = jax.tree.map(lambda leaf: leaf[i], params)  # noqa: B023
        looped = jitted(case.apply, own, x[i], cotangent[i])
        assert_tree_close(jax.tree.map(lambda leaf: leaf[i], mapped), looped)  # noqa: B023


@every_batched_case
def test_leading_axes_are_vmap(name):
    case, params, x, cotangent = made(name, 2, 3)
    mapped = jax.vmap(jax.vmap(case.apply, (None, 0)), (None, 0))
    found = jitted(case.apply, params, x, cotangent)
    assert_tree_close(found, jitted(mapped, params, x, cotangent))


@every_batched_case
def test_an_empty_batch_is_an_empty_batch(name):
    case, params, _, _ = made(name)
    one = jax.eval_shape(case.apply, params, jnp.zeros(case.shape))
    assert case.apply(params, jnp.zeros((0, *case.shape))).shape == (0, *one.shape)


@pytest.mark.parametrize("name", ["attention, masked", "layer_norm", "batch_norm, training"])
def test_scan_over_stacked_parameters_with_remat_is_a_loop(name):
    case = CASES[name]
    keys = jax.random.split(jax.random.key(1), 3)
    params = jax.vmap(lambda key: case.init(key, jnp.float32))(keys)
    x, cotangent = (jnp.asarray(draw(seed, *case.shape)) for seed in (2, 3))

    def scanned(params, x):
        step = jax.checkpoint(lambda h, own: (case.apply(own, h), None))
        return jax.lax.scan(step, x, params)[0]

    def looped(params, x):
        for i in range(3):
            x = case.apply(jax.tree.map(lambda leaf: leaf[i], params), x)  # noqa: B023
        return x

    found = jitted(scanned, params, x, cotangent)
    assert_tree_close(found, jitted(looped, params, x, cotangent))


@every_batched_case
def test_one_program_is_exported_for_every_batch(name):
    case, params, x, _ = made(name, 4)
    (batch,) = export.symbolic_shape("batch")
    abstract = jax.ShapeDtypeStruct((batch, *case.shape), jnp.float32)
    program = export.export(jax.jit(case.apply))(params, abstract)
    assert_close(program.call(params, x), case.apply(params, x))


def bare_linear(params, x):
    return x @ params["weight"].T + params["bias"]


def bare_conv2d(params, x):
    y = jax.lax.conv_general_dilated(
        x,
        params["weight"],
        (1, 1),
        ((0, 0), (0, 0)),
        rhs_dilation=(1, 1),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )
    return y + params["bias"][:, None, None]


def bare_layer_norm(params, x):
    centred = x - jnp.mean(x, axis=(-1,), keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=(-1,), keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * params["weight"] + params["bias"]


@pytest.mark.parametrize(
    ("layer", "bare", "params", "shape"),
    [
        (ef.linear, bare_linear, ef.init_linear(jax.random.key(0), 4, 3), (2, 4)),
        (ef.conv2d, bare_conv2d, ef.init_conv2d(jax.random.key(0), 2, 3, 3), (2, 2, 5, 5)),
        (ef.layer_norm, bare_layer_norm, ef.init_layer_norm(4), (2, 4)),
    ],
)
def test_the_checks_add_nothing_to_the_program(layer, bare, params, shape):
    x = jnp.zeros(shape)
    assert str(jax.make_jaxpr(layer)(params, x)) == str(jax.make_jaxpr(bare)(params, x))


def test_parameters_differ_by_key_and_nothing_else():
    first, again, other = (ef.init_attention(jax.random.key(i), 8, 2) for i in (0, 0, 1))
    assert_bitwise(first, again)
    for name in first:
        assert not np.array_equal(first[name]["weight"], other[name]["weight"])
