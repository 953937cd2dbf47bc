"""Batch normalisation: parity with torch over many steps, its statistics, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_functional import BatchStats, LayerShapeError, batch_norm, init_batch_norm
from tests.functional.layers import draw, unhooked
from tests.tolerance import assert_bitwise, assert_close, assert_finite, assert_tree_close

FEATURES = 3
momenta = st.sampled_from([None, 0.1, 0.0, 1.0, 1, 0.37])
spatial = st.sampled_from([(), (4,), (2, 3)])


def torch_norm(seed: int, rank: int, momentum, eps: float):
    """`torch.nn.BatchNorm1d` or `BatchNorm2d` with parameters that are not 1 and 0."""
    kind = torch.nn.BatchNorm2d if rank == 2 else torch.nn.BatchNorm1d
    module = kind(FEATURES, momentum=momentum, eps=eps)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.tensor(draw(seed + len(name), FEATURES)))
    return module


def params_of(module):
    return {name: jnp.asarray(p.detach().numpy()) for name, p in module.named_parameters()}


def stats_of(module) -> BatchStats:
    # Copies: torch writes into its buffers.
    return BatchStats(
        jnp.array(module.running_mean.numpy(), copy=True),
        jnp.array(module.running_var.numpy(), copy=True),
        jnp.array(int(module.num_batches_tracked), jnp.int32),
    )


def step(module, params, x, stats, cotangent, *, train: bool, momentum, eps):
    """One step of both, each output and gradient compared; ours is the next statistics."""
    module.train(train).zero_grad()
    source = torch.tensor(x, requires_grad=True)
    expected = module(source)
    expected.backward(torch.tensor(cotangent))

    def ours(params, x):
        return batch_norm(params, x, stats, train=train, momentum=momentum, eps=eps)

    @jax.jit
    def both(params, x, cotangent):
        y, pull_back, after = jax.vjp(ours, params, x, has_aux=True)
        return y, pull_back(cotangent), after

    y, (to_params, to_x), after = both(params, x, cotangent)
    assert_close(y, expected.detach())
    assert_close(to_x, source.grad)
    for name, parameter in module.named_parameters():
        assert_close(to_params[name], parameter.grad)
    return after


@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    spatial=spatial,
    momentum=momenta,
    eps=st.sampled_from([1e-5, 1e-2]),
    batches=st.lists(st.integers(3, 5), min_size=1, max_size=3),
)
def test_outputs_gradients_and_statistics_are_torchs_step_by_step(
    seed, spatial, momentum, eps, batches
):
    module = torch_norm(seed, len(spatial), momentum, eps)
    params, (_, stats) = params_of(module), init_batch_norm(FEATURES)
    assert_tree_close(stats, stats_of(module))
    options = {"momentum": momentum, "eps": eps}
    for i, size in enumerate(batches):
        x = 2.0 * draw(seed + i, size, FEATURES, *spatial) + np.float32(0.5)
        cotangent = draw(seed + i + 10, size, FEATURES, *spatial)
        stats = step(module, params, x, stats, cotangent, train=True, **options)
        assert_tree_close(stats, stats_of(module))
    x = draw(seed, 2, FEATURES, *spatial)
    after = step(module, params, x, stats, x, train=False, **options)
    assert_bitwise(after, stats)
    assert_tree_close(after, stats_of(module))


@pytest.mark.parametrize("spatial", [(), (4,)])
def test_in_evaluation_examples_do_not_see_each_other(spatial):
    params, _ = init_batch_norm(FEATURES)
    stats = BatchStats(jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 4.0, 9.0]), jnp.array(7))
    x = jnp.asarray(draw(0, 4, FEATURES, *spatial))
    together, after = batch_norm(params, x, stats, train=False)
    for i in range(4):
        alone, _ = batch_norm(params, x[i : i + 1], stats, train=False)
        assert_close(alone[0], together[i])
    assert all(a is b for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(stats), strict=True))


@settings(max_examples=10)
@given(sizes=st.lists(st.integers(2, 4), min_size=1, max_size=4), seed=st.integers(0, 100))
def test_without_momentum_the_statistics_are_averages_over_the_batches(sizes, seed):
    params, stats = init_batch_norm(FEATURES)
    batches = [draw(seed + i, size, FEATURES) for i, size in enumerate(sizes)]
    for x in batches:
        _, stats = batch_norm(params, jnp.asarray(x), stats, train=True, momentum=None)
    assert_close(stats.mean, np.mean([x.mean(0) for x in batches], axis=0))
    assert_close(stats.var, np.mean([x.var(0, ddof=1) for x in batches], axis=0))
    assert int(stats.count) == len(sizes)


def test_no_gradient_flows_into_the_statistics():
    params, stats = init_batch_norm(FEATURES)

    def total(x):
        _, after = batch_norm(params, x, stats, train=True)
        return jnp.sum(after.mean) + jnp.sum(after.var)

    assert not np.asarray(jax.grad(total)(jnp.asarray(draw(0, 4, FEATURES)))).any()


def test_statistics_are_carried_by_scan():
    params, stats = init_batch_norm(FEATURES)
    batches = jnp.asarray(draw(0, 5, 4, FEATURES))

    def body(stats, x):
        y, after = batch_norm(params, x, stats, train=True)
        return after, y

    scanned, ys = jax.lax.scan(body, stats, batches)
    for i, x in enumerate(batches):
        stats, y = body(stats, x)
        assert_close(ys[i], y)
    assert_tree_close(scanned, stats)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_stay_float32_in_half_precision(dtype, momentum):
    params, stats = init_batch_norm(FEATURES, dtype=dtype)
    x = jnp.asarray(300.0 * draw(0, 8, FEATURES), dtype)
    y, after = batch_norm(params, x, stats, train=True, momentum=momentum)
    assert y.dtype == dtype
    assert_finite(after)
    wide, _ = init_batch_norm(FEATURES)
    _, expected = batch_norm(wide, x.astype(jnp.float32), stats, train=True, momentum=momentum)
    assert_tree_close(after, expected)


def test_it_begins_as_torchs():
    module = torch.nn.BatchNorm1d(FEATURES)
    params, stats = init_batch_norm(FEATURES)
    assert_bitwise(params, params_of(module))
    assert_bitwise(stats, stats_of(module))


@pytest.mark.parametrize("shape", [(1, FEATURES), (1, FEATURES, 1, 1), (0, FEATURES)])
def test_one_value_for_each_feature_is_refused_in_training_as_in_torch(shape):
    params, stats = init_batch_norm(FEATURES)
    with pytest.raises(LayerShapeError, match="more than one value for each.*train=False"):
        batch_norm(params, jnp.zeros(shape), stats, train=True)
    y, _ = batch_norm(params, jnp.zeros(shape), stats, train=False)
    assert y.shape == shape


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.zeros((4, 2)), r"with 3 features at axis 1.*got float32\[4, 2\].*for 2 features"),
        (jnp.zeros(3), r"an input \[batch, features, \*spatial\]; got float32\[3\]"),
        (jnp.zeros((4, 3), jnp.bfloat16), r"got bfloat16\[4, 3\] for the input"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, message, train):
    params, stats = init_batch_norm(FEATURES)
    with unhooked(), pytest.raises(LayerShapeError, match="batch_norm: .*" + message):
        batch_norm(params, x, stats, train=train)


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan")])
def test_a_momentum_outside_its_range_is_refused(momentum):
    params, stats = init_batch_norm(FEATURES)
    with pytest.raises(LayerShapeError, match=r"expected momentum in \[0, 1\]; got"):
        batch_norm(params, jnp.zeros((4, FEATURES)), stats, train=True, momentum=momentum)


def test_statistics_and_parameters_that_do_not_fit_are_refused():
    params, stats = init_batch_norm(FEATURES)
    x = jnp.zeros((4, FEATURES))
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), stats)
    with pytest.raises(LayerShapeError, match=r"statistics float32\[3\].*bfloat16\[3\] for 'mean'"):
        batch_norm(params, x, halved, train=False)
    _, narrow = init_batch_norm(2)
    with pytest.raises(LayerShapeError, match=r"statistics float32\[3\].*got float32\[2\]"):
        batch_norm(params, x, narrow, train=False)
    with pytest.raises(LayerShapeError, match=r"expected 'bias' of shape \[3\].*float32\[1\]"):
        batch_norm({**params, "bias": jnp.zeros(1)}, x, stats, train=False)
    with pytest.raises(LayerShapeError, match=r"expected a weight \[features\].*vmap"):
        batch_norm({**params, "weight": jnp.zeros((2, 3))}, x, stats, train=False)


def test_layers_that_cannot_be_are_refused():
    with pytest.raises(LayerShapeError, match="init_batch_norm: expected features to be an int"):
        init_batch_norm(0)
    with pytest.raises(LayerShapeError, match="init_batch_norm: expected a floating dtype"):
        init_batch_norm(2, dtype=jnp.int32)
