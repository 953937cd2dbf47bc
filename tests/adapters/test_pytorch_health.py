"""Health in torch: what the core measures, on sampled steps, with one transfer."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper_adapters.pytorch import kernel_from_module, measure_outputs, wrap
from esper_functional import EventKind, fold_events, measure_health, state_digest
from tests.adapters.kernels import artifact, nan_kernel, torch_kernel
from tests.tolerance import assert_close


@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(1, 1), (7, 1), (6, 4), (2, 3, 5)]),
    dead=st.integers(0, 2),
    bad=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_the_statistics_are_the_cores(seed, shape, dead, bad, scale):
    k = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * np.float32(scale)
    k[..., :dead] = 1.25
    if bad:
        k.reshape(-1)[0] = np.nan
    (theirs,) = measure_health([jnp.asarray(k)])
    ours = measure_outputs(torch.tensor(k)).numpy()
    if bad:
        assert np.isnan(ours[0])
        assert np.isnan(np.asarray(theirs)[0])
        return
    for a, b in zip(ours, np.asarray(theirs), strict=True):
        assert_close(a, b)


def test_features_of_images_are_their_channels():
    k = np.random.default_rng(0).normal(size=(3, 4, 5, 2)).astype(np.float32)
    (theirs,) = measure_health([jnp.asarray(k)], feature_axis=-3)
    assert_close(measure_outputs(torch.tensor(k), feature_axis=-3).numpy(), np.asarray(theirs))


def make():
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)), seeds_per_layer=2)
    model.load_kernel_sync("0", 1, torch_kernel(), alpha=0.2)
    model.load_kernel_sync("2", 0, torch_kernel(1, artifact("gated", 5, 3)), alpha=0.0)
    return model


def test_a_sample_becomes_events_and_averages():
    model, heard, x = make(), [], torch.randn(8, 3)
    model.seed_table.listeners.append(heard.append)
    start = model.seeds
    with model.health_sample() as sample:
        model(x)
    assert model(x) is not None
    events = model.observe_health(sample, step=10)
    assert [(e.kind, e.layer, e.seed, e.step) for e in events] == [
        (EventKind.HEALTH, 0, 1, 10),
        (EventKind.HEALTH, 1, 0, 10),
    ]
    assert heard == events
    outputs = model[0].capture(x)[0]
    (expected,) = measure_health([jnp.asarray(outputs.numpy())])
    assert_close(model.seeds.health[0, 1], np.asarray(expected)[0])
    assert_close(model.seed_table.statistics.variance[0, 1], np.asarray(expected)[1])
    assert np.isnan(model.seeds.health[0, 0])
    assert state_digest(fold_events(start, events)) == state_digest(model.seeds)
    with model.health_sample() as sample:
        model(2 * x)
    model.observe_health(sample)
    outputs = model[0].capture(2 * x)[0]
    (second,) = measure_health([jnp.asarray(outputs.numpy())])
    average = 0.9 * np.asarray(expected)[1] + 0.1 * np.asarray(second)[1]
    assert_close(model.seed_table.statistics.variance[0, 1], np.float32(average))


def test_measuring_changes_no_output_and_no_gradient():
    model, x = make(), torch.randn(8, 3)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with model.health_sample():
        model(x).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    assert not any(m._forward_hooks for m in model.modules())


def test_kernels_that_incubate_are_measured_in_their_shadows():
    model, x = make(), torch.randn(8, 3)
    model.incubate("2", 0)
    with model.health_sample() as sample:
        model(x)
    assert set(sample.measured) == {(0, 1)}
    with model.health_sample() as sample:
        model(x)
        model.shadow_forward(x)
    assert set(sample.measured) == {(0, 1), (1, 0)}


def test_what_is_not_finite_or_not_called_or_not_wanted_is_passed_over():
    model = wrap(nn.Sequential(nn.Linear(3, 5)))
    model.load_kernel_sync("0", 0, nan_kernel(), alpha=0.2)
    with model.health_sample() as sample:
        model(torch.randn(4, 3))
    assert model.observe_health(sample) == []
    assert np.isnan(model.seeds.health).all()
    model = make()
    model.kasmina_layers["0"].telemetry_enabled = False
    with model.health_sample() as sample:
        model(torch.randn(4, 3))
    assert [(e.layer, e.seed) for e in model.observe_health(sample)] == [(1, 0)]
    with model.health_sample() as sample:
        pass
    assert model.observe_health(sample) == []


def test_a_convolutions_kernels_are_measured_by_channel():
    model = wrap(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), target_layers=[nn.Conv2d])
    torch.manual_seed(0)
    model.load_kernel_sync("0", 0, kernel_from_module(nn.Conv2d(3, 4, 1), example_rank=3))
    x = torch.randn(2, 3, 5, 5)
    with model.health_sample() as sample:
        model(x)
    expected = measure_outputs(model[0].capture(x)[0], feature_axis=-3)
    assert torch.equal(sample.measured[0, 0], expected)


def test_a_step_that_is_over_is_refused():
    model = make()
    model.advance(5)
    with model.health_sample() as sample:
        model(torch.randn(4, 3))
    with pytest.raises(Exception, match="step 3 is over"):
        model.observe_health(sample, step=3)
