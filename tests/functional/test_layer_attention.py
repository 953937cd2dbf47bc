"""Attention: parity with both of torch's definitions, masks, dropout, initial values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_functional import attention, init_attention
from tests.functional.layers import assert_parity, draw
from tests.tolerance import assert_bitwise, assert_close, assert_finite, assert_tree_close

T, S, E = 4, 5, 6
PROJECTIONS = ("query", "key", "value", "out")

KEY_BIAS = draw(0, E)
"""Not among the arrays: a softmax is blind to it, so its gradient is rounding, not a number."""


def arrays_for(seed: int, lead, widths, bias: bool) -> dict[str, np.ndarray]:
    """Inputs, and the projections' parameters by flat names."""
    features, key_features, value_features = widths
    arrays = {
        "q": draw(seed, *lead, T, features),
        "k": draw(seed + 1, *lead, S, key_features),
        "v": draw(seed + 2, *lead, S, value_features),
    }
    for i, (name, width) in enumerate(zip(PROJECTIONS, (*widths, features), strict=True)):
        arrays[f"{name}_weight"] = draw(seed + i, features, width) / np.float32(width**0.5)
        if bias and name != "key":
            arrays[f"{name}_bias"] = draw(seed + i, features)
    return arrays


def nested(flat):
    params: Any = {name: {} for name in PROJECTIONS}
    for path, leaf in flat.items():
        name, entry = path.split("_")
        params[name][entry] = leaf
    if "bias" in params["query"]:
        params["key"]["bias"] = jnp.asarray(KEY_BIAS[: params["key"]["weight"].shape[0]])
    return params


def ours_with(**options):
    def ours(q, k, v, mask=None, **flat):
        chosen = options if mask is None else {**options, "mask": mask}
        found = attention(nested(flat), q, k, v, **chosen)
        return jnp.concatenate(found, -1) if chosen.get("need_weights") else found

    return ours


def torch_mha(widths, heads: int, **options):
    """`torch.nn.MultiheadAttention` as a function of inputs and parameters."""
    features, kdim, vdim = widths

    def theirs(q, k, v, mask=None, **flat):
        module = torch.nn.MultiheadAttention(
            features, heads, bias="out_bias" in flat, kdim=kdim, vdim=vdim, batch_first=True
        )
        params = {"out_proj.weight": flat["out_weight"]}
        projections = [flat[f"{name}_weight"] for name in PROJECTIONS[:3]]
        if kdim == vdim == features:
            params["in_proj_weight"] = torch.cat(projections)
        else:
            for letter, weight in zip("qkv", projections, strict=True):
                params[f"{letter}_proj_weight"] = weight
        if "out_bias" in flat:
            params["out_proj.bias"] = flat["out_bias"]
            middle = torch.tensor(KEY_BIAS[:features])
            params["in_proj_bias"] = torch.cat([flat["query_bias"], middle, flat["value_bias"]])
        chosen = options if mask is None else {**options, "attn_mask": mask}
        y, weights = torch.func.functional_call(module, params, (q, k, v), chosen)
        return y if weights is None else torch.cat([y, weights], -1)

    return theirs


def torch_sdpa(heads: int, **options):
    """The same by way of `scaled_dot_product_attention`, whose masks mean what ours mean."""

    def theirs(q, k, v, mask=None, **flat):
        flat["key_bias"] = torch.tensor(KEY_BIAS)

        def split(x, name):
            y = torch.nn.functional.linear(x, flat[f"{name}_weight"], flat[f"{name}_bias"])
            return y.unflatten(-1, (heads, -1)).transpose(-2, -3)

        chosen = options if mask is None else {**options, "attn_mask": mask}
        y = torch.nn.functional.scaled_dot_product_attention(
            split(q, "query"), split(k, "key"), split(v, "value"), **chosen
        )
        joined = y.transpose(-2, -3).flatten(-2)
        return torch.nn.functional.linear(joined, flat["out_weight"], flat["out_bias"])

    return theirs


def random_mask(seed: int, *shape: int) -> np.ndarray:
    """Some allowed and some not, and at least one allowed in every row."""
    mask = np.random.default_rng(seed).random(shape) < 0.5
    mask[..., 0] = True
    return mask


@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    lead=st.sampled_from([(), (1,), (2,)]),
    widths=st.sampled_from([(E, E, E), (E, 3, E), (E, 3, 4), (4, 2, 8)]),
    heads=st.sampled_from([1, 2]),
    bias=st.booleans(),
    kind=st.sampled_from(["none", "boolean", "additive", "causal", "infinite"]),
    need_weights=st.booleans(),
)
def test_output_weights_and_every_gradient_are_those_of_torchs_module(
    seed, lead, widths, heads, bias, kind, need_weights
):
    arrays = arrays_for(seed, lead, widths, bias)
    options, theirs_options = {}, {"need_weights": need_weights}
    if kind == "boolean":
        options["mask"] = jnp.asarray(random_mask(seed, T, S))
        # The module's masks mean the opposite.
        theirs_options["attn_mask"] = ~torch.tensor(random_mask(seed, T, S))
    elif kind == "additive":
        arrays["mask"] = draw(seed, T, S)
    elif kind == "infinite":
        arrays["mask"] = np.where(random_mask(seed, T, S), draw(seed, T, S), -np.float32(np.inf))
    elif kind == "causal":
        options["causal"] = True
        theirs_options["attn_mask"] = torch.ones(T, S).tril() == 0

    ours = ours_with(num_heads=heads, need_weights=need_weights, **options)
    assert_parity(ours, torch_mha(widths, heads, **theirs_options), arrays, seed)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 1000),
    lead=st.sampled_from([(), (2,), (2, 1)]),
    shape=st.sampled_from([(T, S), (1, S), (2, T, S), (2, 1, 1, S), (1, 2, T, 1)]),
    additive=st.booleans(),
)
def test_masks_broadcast_and_mean_what_they_mean_in_torchs_function(seed, lead, shape, additive):
    shape = shape[-len(lead) - 3 :]
    arrays = arrays_for(seed, lead, (E, E, E), True)
    mask = np.random.default_rng(seed).random(shape) < 0.5
    if additive:
        # With rows in which nothing is left, and a gradient for the mask itself.
        arrays["mask"] = np.where(mask, draw(seed, *shape), -np.float32(np.inf))
        assert_parity(ours_with(num_heads=2), torch_sdpa(2), arrays, seed)
    else:
        ours = ours_with(num_heads=2, mask=mask)
        assert_parity(ours, torch_sdpa(2, attn_mask=torch.tensor(mask)), arrays, seed)


@pytest.mark.parametrize("additive", [False, True])
def test_causal_composes_with_a_mask(additive):
    params = init_attention(jax.random.key(0), E, 2)
    x = jnp.asarray(draw(0, 2, T, E))
    allowed = random_mask(3, T, T)
    mask = np.where(allowed, draw(4, T, T), -np.float32(np.inf)) if additive else allowed
    lower = np.tril(np.ones((T, T), np.bool_))
    joined = np.where(lower, mask, -np.float32(np.inf)) if additive else mask & lower
    found = attention(params, x, num_heads=2, mask=mask, causal=True)
    assert_close(found, attention(params, x, num_heads=2, mask=joined))


def test_causal_outputs_depend_on_no_later_input():
    params = init_attention(jax.random.key(0), E, 2)
    x = jnp.asarray(draw(0, T, E))
    by_input = jax.jacobian(lambda x: attention(params, x, num_heads=2, causal=True))(x)
    reached = np.abs(by_input).max(axis=(1, 3)) > 0
    np.testing.assert_array_equal(reached, np.tril(np.ones((T, T), np.bool_)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("additive", [False, True])
def test_a_row_that_may_attend_to_nothing_gives_the_bias_and_finite_gradients(dtype, additive):
    params = init_attention(jax.random.key(0), E, 2, dtype=dtype)
    params["out"]["bias"] = jnp.asarray(draw(1, E), dtype)
    x = jnp.asarray(draw(0, T, E), dtype)
    allowed = random_mask(3, T, T)
    allowed[1] = False
    mask = jnp.where(allowed, 0.0, -jnp.inf).astype(dtype) if additive else jnp.asarray(allowed)

    def both(params, x):
        return attention(params, x, num_heads=2, mask=mask, need_weights=True)

    (y, weights), pull_back = jax.vjp(both, params, x)
    assert_bitwise(y[1], params["out"]["bias"])
    assert not np.asarray(weights[1]).any()
    rest = np.delete(np.asarray(weights, np.float32), 1, axis=0)
    np.testing.assert_allclose(rest.sum(-1), 1.0, atol=float(jnp.finfo(dtype).eps) * T)
    gradients = pull_back((jnp.ones_like(y), jnp.ones_like(weights)))
    assert_finite(jax.tree.map(lambda g: g.astype(jnp.float32), gradients))


def test_keys_default_to_the_query_and_values_to_the_keys():
    params = init_attention(jax.random.key(0), E, 2)
    x, memory = jnp.asarray(draw(0, T, E)), jnp.asarray(draw(1, S, E))
    assert_bitwise(attention(params, x, num_heads=2), attention(params, x, x, x, num_heads=2))
    from_memory = attention(params, x, memory, num_heads=2)
    assert_bitwise(from_memory, attention(params, x, memory, memory, num_heads=2))


def test_a_bias_of_the_keys_changes_nothing():
    params = init_attention(jax.random.key(0), E, 2)
    x = jnp.asarray(draw(0, T, E))
    moved: Any = {**params, "key": {**params["key"], "bias": jnp.asarray(KEY_BIAS)}}
    assert_close(attention(moved, x, num_heads=2), attention(params, x, num_heads=2))


def test_a_permutation_of_the_sources_changes_nothing():
    params = init_attention(jax.random.key(0), E, 2)
    x, memory = jnp.asarray(draw(0, T, E)), jnp.asarray(draw(1, S, E))
    mask, order = random_mask(0, T, S), np.array([3, 0, 4, 1, 2])
    there = attention(params, x, memory, num_heads=2, mask=mask)
    assert_close(attention(params, x, memory[order], num_heads=2, mask=mask[:, order]), there)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_softmax_of_half_precision_is_taken_in_float32(dtype):
    # 1,000 equal weights: a sum in bfloat16 would stop at 256.
    params = init_attention(jax.random.key(0), 2, 1, dtype=dtype)
    x = jnp.ones((1000, 2), dtype)
    _, weights = attention(params, x, num_heads=1, need_weights=True)
    assert weights.dtype == dtype
    assert_bitwise(weights, jnp.full_like(weights, 0.001))


def test_one_key_drops_alike_and_another_otherwise():
    params = init_attention(jax.random.key(0), E, 2)
    x = jnp.asarray(draw(0, 2, T, E))

    def dropped(seed, x=x):
        return attention(params, x, num_heads=2, dropout=0.5, dropout_key=jax.random.key(seed))

    assert_bitwise(dropped(1), dropped(1))
    assert not np.array_equal(dropped(1), dropped(2))
    twice = dropped(1, jnp.stack([x[0], x[0]]))
    assert not np.array_equal(twice[0], twice[1])


def test_dropout_keeps_the_expectation_and_reports_the_weights_it_used():
    params = init_attention(jax.random.key(0), E, 1)
    x = jnp.asarray(draw(0, T, E))
    plain, weights = attention(params, x, num_heads=1, need_weights=True)

    @jax.jit
    @jax.vmap
    def dropped(key):
        return attention(params, x, num_heads=1, dropout=0.25, dropout_key=key, need_weights=True)

    ys, used = dropped(jax.random.split(jax.random.key(3), 4000))
    kept = np.asarray(used) > 0
    assert kept.mean() == pytest.approx(0.75, abs=0.01)
    np.testing.assert_allclose(
        used[kept], np.broadcast_to(weights, used.shape)[kept] / 0.75, rtol=1e-5
    )
    # Four standard errors of the mean of 4,000 samples.
    assert (np.abs(np.mean(used, 0) - weights) <= 4 * np.std(used, 0) / 4000**0.5).all()
    assert (np.abs(np.mean(ys, 0) - plain) <= 4 * np.std(ys, 0) / 4000**0.5).all()


def test_no_dropout_needs_no_key_and_ignores_one():
    params: Any = init_attention(jax.random.key(0), E, 2)
    x = jnp.asarray(draw(0, T, E))
    plain = attention(params, x, num_heads=2)
    key = jax.random.key(0)
    assert_bitwise(attention(params, x, num_heads=2, dropout=0.0, dropout_key=key), plain)
    everything = attention(params, x, num_heads=2, dropout=1, dropout_key=key)
    assert_bitwise(everything, jnp.broadcast_to(params["out"]["bias"], everything.shape))


@pytest.mark.parametrize(("key_features", "value_features"), [(None, None), (64, 64), (32, 96)])
def test_initial_values_spread_as_torchs(key_features, value_features):
    ours: Any = init_attention(
        jax.random.key(0), 64, 4, key_features=key_features, value_features=value_features
    )
    module = torch.nn.MultiheadAttention(64, 4, kdim=key_features, vdim=value_features)
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    weights = [*weights, module.out_proj.weight]
    for name, weight in zip(PROJECTIONS, weights, strict=True):
        own = np.asarray(ours[name]["weight"])
        assert own.shape == tuple(weight.shape)
        assert np.abs(own).max() == pytest.approx(weight.abs().max().item(), rel=0.02)
        assert own.std() == pytest.approx(weight.std().item(), rel=0.05)
        assert not np.asarray(ours[name]["bias"]).any()


def test_without_biases_there_is_no_entry_and_the_weights_are_the_same():
    key = jax.random.key(0)
    whole, bare = init_attention(key, E, 2), init_attention(key, E, 2, bias=False)
    assert all(list(bare[name]) == ["weight"] for name in PROJECTIONS)
    assert_tree_close(bare, {name: {"weight": whole[name]["weight"]} for name in PROJECTIONS})
