"""The three blends: exact limits, an independent reference, and values that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_functional import (
    BLENDS,
    Affine,
    BlendError,
    blend_weights,
    check_blend,
    fold_linear,
    mix,
)
from tests.tolerance import assert_bitwise, assert_close

SEEDS = 3
alphas = st.lists(st.floats(0.0, 1.0, width=32), min_size=SEEDS, max_size=SEEDS)
masks = st.lists(st.booleans(), min_size=SEEDS, max_size=SEEDS)


def outputs(seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    random = np.random.default_rng(seed)
    h, *ks = random.normal(size=(SEEDS + 1, 4, 5)).astype(np.float32)
    return h, ks


def blended(blend: str, alpha: list[float], h, ks, runs=None, finite=None):
    """The layer's output by way of `blend_weights` and `mix`, in numpy."""
    runs = [True] * len(alpha) if runs is None else runs
    host, kernels = blend_weights(blend, np.array([alpha], np.float32), np.array([runs], np.bool_))
    finite = [np.isfinite(k).all(-1, keepdims=True) for k in ks] if finite is None else finite
    chosen = [i for i, on in enumerate(runs) if on]
    return mix(
        blend,
        h,
        [ks[i] for i in chosen],
        [finite[i] for i in chosen],
        host[0],
        [kernels[0, i] for i in chosen],
        np.where,
    )


def reference(blend: str, alpha: list[float], h, ks, runs) -> np.ndarray:
    """The design's formulas, word for word, in double precision."""
    h, ks = h.astype(np.float64), [k.astype(np.float64) for k in ks]
    pairs = [(a, k) for a, k, on in zip(alpha, ks, runs, strict=True) if on]
    s = sum(a for a, _ in pairs)
    if blend == "convex":
        y = h * (1 - min(s, 1)) + sum((a * k / max(s, 1) for a, k in pairs), np.zeros_like(h))
    elif blend == "residual":
        y = h + sum((a * k for a, k in pairs), np.zeros_like(h))
    else:
        y = h
        for a, k in pairs:
            y = (1 - a) * y + a * k
    return y.astype(np.float32)


@pytest.mark.parametrize("blend", BLENDS)
@given(alphas, masks, st.integers(0, 100))
def test_it_is_the_formula(blend, alpha, runs, seed):
    h, ks = outputs(seed)
    assert_close(blended(blend, alpha, h, ks, runs), reference(blend, alpha, h, ks, runs))


@pytest.mark.parametrize("blend", BLENDS)
def test_all_alphas_zero_give_the_host_exactly(blend):
    h, ks = outputs()
    assert_bitwise(blended(blend, [0.0] * SEEDS, h, ks), h)
    assert_bitwise(blended(blend, [1.0] * SEEDS, h, ks, runs=[False] * SEEDS), h)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_one_seed_at_alpha_one_gives_its_kernel_exactly_under_convex(seed):
    h, ks = outputs()
    alpha = [float(i == seed) for i in range(SEEDS)]
    np.testing.assert_array_equal(blended("convex", alpha, h, ks), ks[seed])


def test_the_last_seed_at_alpha_one_wins_under_sequential():
    h, ks = outputs()
    np.testing.assert_array_equal(blended("sequential", [0.3, 0.9, 1.0], h, ks), ks[-1])


@given(alphas, st.permutations(range(SEEDS)))
def test_convex_does_not_depend_on_the_order(alpha, order):
    h, ks = outputs()
    swapped = blended("convex", [alpha[i] for i in order], h, [ks[i] for i in order])
    assert_close(swapped, blended("convex", alpha, h, ks))


def test_sequential_does():
    h, ks = outputs()
    alpha = [0.5, 0.25, 0.75]
    there = blended("sequential", alpha, h, ks)
    back = blended("sequential", alpha[::-1], h, ks[::-1])
    assert np.abs(there - back).max() > 0.1


@given(alphas, masks)
def test_convex_weights_are_shares_of_one(alpha, runs):
    host, kernels = blend_weights(
        "convex", np.array([alpha], np.float32), np.array([runs], np.bool_)
    )
    assert_close(host + kernels.sum(-1, dtype=np.float32), np.ones(1, np.float32))
    assert (host >= 0).all()
    assert (kernels >= 0).all()
    assert not kernels[~np.array([runs])].any()


@pytest.mark.parametrize("blend", BLENDS)
@given(alphas, masks)
def test_weights_are_the_same_on_jax_and_for_every_layer_at_once(blend, alpha, runs):
    a, r = np.array([alpha, alpha[::-1]], np.float32), np.array([runs, runs[::-1]])
    ours = blend_weights(blend, a, r)
    theirs = blend_weights(blend, jnp.asarray(a), jnp.asarray(r))
    for left, right in zip(theirs, ours, strict=True):
        assert_close(left, right)
    for row in range(2):
        single = blend_weights(blend, a[row], r[row])
        assert_bitwise(single.kernels, ours.kernels[row])
        assert_bitwise(single.host, ours.host[row])


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_leaves_the_blend_as_it_was_without_it(blend, bad):
    h, ks = outputs()
    ks[1][2, 3] = bad
    alpha = [0.2, 0.5, 0.1]
    y = blended(blend, alpha, h, ks)
    clean = [0, 1, 3]
    assert_close(y[clean], reference(blend, alpha, h, ks, [True] * SEEDS)[clean])
    # In the bad row: h in its place under convex, nothing of it under the others.
    if blend == "convex":
        stand_in = [ks[0], h, ks[2]]
        expected = reference(blend, alpha, h, stand_in, [True] * SEEDS)
    else:
        expected = reference(blend, alpha, h, ks, [True, False, True])
    assert np.isfinite(y).all()
    assert_close(y[2], expected[2])


@pytest.mark.parametrize("blend", BLENDS)
def test_a_seed_at_alpha_zero_cannot_poison(blend):
    h, ks = outputs()
    assert_bitwise(blended(blend, [0.0] * SEEDS, h, [np.full_like(k, np.nan) for k in ks]), h)


@pytest.mark.parametrize("blend", BLENDS)
@given(alphas)
def test_numpy_jax_and_torch_mix_alike(blend, alpha):
    h, ks = outputs()
    ks[0][0, 0] = np.nan
    expected = blended(blend, alpha, h, ks)
    finite = [np.isfinite(k).all(-1, keepdims=True) for k in ks]
    host, kernels = blend_weights(
        blend, np.array([alpha], np.float32), np.ones((1, SEEDS), np.bool_)
    )
    for array, where in ((jnp.asarray, jnp.where), (torch.tensor, torch.where)):
        y = mix(
            blend,
            array(h),
            [array(k) for k in ks],
            [array(ok) for ok in finite],
            array(host[0]),
            [array(w) for w in kernels[0]],
            where,
        )
        assert_close(y, expected)


@pytest.mark.parametrize("blend", BLENDS)
def test_gradients_reach_host_and_kernels_by_their_weights(blend):
    h, ks = outputs()
    alpha = [0.2, 0.5, 0.1]
    host, kernels = blend_weights(
        blend, np.array([alpha], np.float32), np.ones((1, SEEDS), np.bool_)
    )
    ok = [np.ones((4, 1), np.bool_)] * SEEDS

    def total(h, ks):
        return jnp.sum(mix(blend, h, ks, ok, host[0], list(kernels[0]), jnp.where))

    to_host, to_kernels = jax.grad(total, argnums=(0, 1))(
        jnp.asarray(h), list(map(jnp.asarray, ks))
    )
    shares = {
        "convex": (0.2, [0.2, 0.5, 0.1]),
        "residual": (1.0, [0.2, 0.5, 0.1]),
        "sequential": (0.8 * 0.5 * 0.9, [0.2 * 0.5 * 0.9, 0.5 * 0.9, 0.1]),
    }[blend]
    assert_close(to_host, np.full_like(h, shares[0]))
    for found, share in zip(to_kernels, shares[1], strict=True):
        assert_close(found, np.full_like(h, share))


@pytest.mark.parametrize("blend", BLENDS)
def test_known_blends_pass(blend):
    assert check_blend(blend) == blend


def test_an_unknown_blend_is_refused_with_a_suggestion():
    with pytest.raises(
        BlendError,
        match="unknown blend 'convx': expected one of convex, residual, sequential; did you mean"
        " 'convex'",
    ):
        check_blend("convx")
    with pytest.raises(BlendError, match=r"expected one of convex, residual, sequential$"):
        check_blend("zzz")


@pytest.mark.parametrize("name", ["konvex", ""])
def test_no_function_takes_an_unknown_blend(name):
    alpha, runs = np.ones((1, 1), np.float32), np.ones((1, 1), np.bool_)
    h, (k, *_) = outputs()
    own = Affine(np.ones((5, 5)), np.ones(5))
    for refused in (
        lambda: check_blend(name),
        lambda: mix(name, h, [k], [True], 0.5, [0.5], np.where),
        lambda: fold_linear(np.ones((5, 5), np.float32), None, own, name, alpha[0], 0),
        lambda: blend_weights(name, alpha, runs),
    ):
        with pytest.raises(BlendError, match="expected one of convex, residual, sequential"):
            refused()
