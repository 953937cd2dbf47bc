"""Folding: what remains gives what was there, or it is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_functional import (
    BLENDS,
    FoldError,
    affine_form,
    blend_weights,
    fold_linear,
    kernel_from_function,
    mix,
)
from tests.tolerance import assert_close

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(6, 3)).astype(np.float32)


def affine(params, x):
    return x @ params["a"].T + params["c"]


def affine_kernel(seed):
    random = np.random.default_rng(seed)
    params = {"a": random.normal(size=(4, 3)), "c": random.normal(size=4)}
    return kernel_from_function(affine, {n: jnp.asarray(p, jnp.float32) for n, p in params.items()})


KERNELS = [affine_kernel(seed) for seed in range(3)]
WEIGHT = RANDOM.normal(size=(4, 3)).astype(np.float32)
BIAS = RANDOM.normal(size=4).astype(np.float32)


def blended(blend, weight, bias, kernels, alphas):
    alpha = np.asarray(alphas, np.float32)
    host, own = blend_weights(blend, alpha, np.ones(alpha.shape, np.bool_))
    outputs = [np.asarray(k.program.apply(k.params, X)) for k in kernels]
    finite = [np.isfinite(k) for k in outputs]
    return mix(blend, X @ weight.T + bias, outputs, finite, host, list(own), np.where)


def test_the_affine_form_is_the_kernels():
    found = affine_form(KERNELS[0], 3)
    assert_close(found.matrix.astype(np.float32), KERNELS[0].params["a"])
    assert_close(found.offset.astype(np.float32), KERNELS[0].params["c"])


@given(
    st.sampled_from(BLENDS),
    st.lists(st.integers(0, 33), min_size=1, max_size=3),
    st.integers(0, 2),
)
def test_what_remains_gives_what_was_there(blend, hundredths, place):
    alphas = np.asarray(hundredths, np.float32) / np.float32(100)
    place = 0 if blend == "sequential" else place % len(alphas)
    kernels = KERNELS[: len(alphas)]
    own = affine_form(kernels[place], 3)
    weight, bias = fold_linear(WEIGHT, BIAS, own, blend, alphas, place)
    rest = [k for i, k in enumerate(kernels) if i != place]
    left = np.delete(alphas, place)
    assert_close(
        blended(blend, weight, bias, rest, left), blended(blend, WEIGHT, BIAS, kernels, alphas)
    )


@pytest.mark.parametrize(
    "apply", [lambda p, x: jnp.tanh(affine(p, x)), lambda p, x: jax.nn.relu(affine(p, x))]
)
def test_what_is_not_affine_is_refused(apply):
    kernel = kernel_from_function(apply, KERNELS[0].params)
    with pytest.raises(FoldError, match=r"is not affine.*differs.*\(allowed"):
        affine_form(kernel, 3)


def test_a_kernel_of_images_is_refused():
    kernel = kernel_from_function(lambda p, x: x, {}, example_rank=3)
    with pytest.raises(FoldError, match="examples of rank 3.*only kernels of vectors"):
        affine_form(kernel, 3)


@pytest.mark.parametrize(
    ("blend", "alphas", "place", "message"),
    [
        ("convex", [0.7, 0.6], 0, r"sum to 1\.3, and above 1"),
        ("convex", [0.0, 1.0], 0, "leaves nothing to fold into"),
        ("sequential", [0.5, 0.5], 1, "only the first kernel in seed order"),
    ],
)
def test_what_would_change_the_output_is_refused(blend, alphas, place, message):
    own = affine_form(KERNELS[0], 3)
    with pytest.raises(FoldError, match=message):
        fold_linear(WEIGHT, BIAS, own, blend, np.asarray(alphas, np.float32), place)


def test_a_constant_needs_a_bias():
    own, alphas = affine_form(KERNELS[0], 3), np.asarray([0.5], np.float32)
    with pytest.raises(FoldError, match="adds a constant and its host has no bias"):
        fold_linear(WEIGHT, None, own, "convex", alphas, 0)
    plain = own._replace(offset=np.zeros(4))
    assert fold_linear(WEIGHT, None, plain, "convex", alphas, 0)[1] is None
