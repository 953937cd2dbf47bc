"""Kernels that train before they are blended, and kernels that become their host's weights."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from esper_adapters.pytorch import SeededLayer, kernel_from_function, kernel_from_module, wrap
from esper_functional import (
    BLENDS,
    FoldError,
    SeedLifecycleError,
    SeedLifecycleState,
    gather,
    linear,
    plan,
    shadow_forward,
)
from tests.adapters.kernels import jax_kernel, torch_kernel
from tests.tolerance import assert_close

S = SeedLifecycleState
X = torch.tensor(np.random.default_rng(3).normal(size=(4, 3)), dtype=torch.float32)


def make_host() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))


def load(model, name, seed, kernel, alpha=0.0):
    SeededLayer.load_kernel_sync(model.kasmina_layers[name], seed, kernel, alpha=alpha)


def waiting(host=None, **options):
    model = wrap(make_host() if host is None else host, blend="residual", **options)
    load(model, "0", 0, torch_kernel())
    model.incubate("0", 0)
    return model


def host_buffers(model):
    return [buffer for name, buffer in model.named_buffers() if "kernel_" not in name]


def test_the_host_does_not_notice():
    bare, model = make_host(), waiting(copy=True)
    assert model.seeds.incubating[0, 0]
    for step in range(3):
        torch.manual_seed(step)
        ours = model(X)
        shadows = model.shadow_forward(X)
        loss = ours.square().sum() + sum(shadow.square().sum() for shadow in shadows)
        loss.backward()
        after = torch.rand(2)
        torch.manual_seed(step)
        theirs = bare(X)
        theirs.square().sum().backward()
        assert torch.equal(after, torch.rand(2))
        assert torch.equal(ours, theirs)
    host = {n: p for n, p in model.named_parameters() if "kernel_" not in n}
    for (name, p), other in zip(host.items(), bare.parameters(), strict=True):
        assert torch.equal(p.grad, other.grad), name
    for ours, theirs in zip(host_buffers(model), bare.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(p.grad is not None for p in model[0].kernel(0).parameters())


def test_its_gradient_is_that_at_alpha_one_with_the_host_stopped():
    host = make_host().eval()
    model, told = waiting(host), wrap(host, blend="residual")
    load(told, "0", 0, torch_kernel(), alpha=1.0)
    (shadow,) = model.shadow_forward(X)
    told(X).square().sum().backward()
    shadow.square().sum().backward()
    torch.testing.assert_close(shadow, told(X))
    for ours, theirs in zip(
        model[0].kernel(0).parameters(), told[0].kernel(0).parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert model[0].kernel(0) is not None


@pytest.mark.parametrize("blend", BLENDS)
def test_its_shadow_is_the_cores(blend):
    model = wrap(nn.Sequential(nn.Linear(3, 5)), blend=blend)
    load(model, "0", 0, torch_kernel(0), alpha=0.3)
    load(model, "0", 2, torch_kernel(1))
    model.incubate("0", 2)
    (shadow,) = model.shadow_forward(X)

    def net(params, site, x):
        return site("0", linear, params, x)

    kernels = {0: jax_kernel(0), 2: jax_kernel(1)}
    own = plan(model.seeds, kernels, ("0",), blend=blend)
    weight, bias = (jnp.asarray(p.detach().numpy()) for p in (model[0].weight, model[0].bias))
    live = gather(model.seeds, kernels, own)
    (ours,), _ = shadow_forward(net, own, {"weight": weight, "bias": bias}, live, jnp.asarray(X))
    assert_close(shadow.detach(), ours)


def test_two_that_incubate_have_a_shadow_each():
    model = waiting()
    load(model, "3", 1, kernel_from_module(nn.Linear(5, 2)))
    model.incubate("3", 1)
    first, second = model.shadow_forward(X)
    first.sum().backward()
    assert all(p.grad is None for p in model[3].kernel(1).parameters())
    second.sum().backward()
    assert all(p.grad is not None for p in model[3].kernel(1).parameters())
    assert model[3].weight.grad is None


def test_its_faults_are_its_shadows_and_the_third_ends_it():
    model = wrap(make_host())
    nan = kernel_from_function(lambda w, x: x[:, :1] * w, {"w": torch.full((5,), torch.nan)})
    load(model, "0", 0, nan)
    load(model, "0", 1, torch_kernel(), alpha=0.2)
    model.incubate("0", 0)
    for count in (1, 2):
        model(X)
        (shadow,) = model.shadow_forward(X)
        assert shadow.isfinite().all()
        model.absorb(count)
        assert model.seeds.error_count[0].tolist() == [count, 0, 0, 0]
    model(X)
    model.absorb(3)
    assert model.seeds.error_count[0, 0] == 2  # without a shadow nothing was seen of it
    model.shadow_forward(X)
    model.absorb(4)
    assert S(int(model.seeds.stage[0, 0])) is S.ERROR_RECOVERY
    assert model.shadow_forward(X) == ()


def test_setting_alpha_ends_it_and_off_zero_it_is_refused():
    model = waiting()
    model.set_seed_alpha("0", 0, 0.5)
    assert not model.seeds.incubating.any()
    assert model.shadow_forward(X) == ()
    with pytest.raises(SeedLifecycleError, match="incubates while ACTIVE at alpha 0"):
        model.incubate("0", 0)


def affine(seed=1):
    torch.manual_seed(seed)
    return kernel_from_module(nn.Linear(3, 5))


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("fossil", [False, True])
def test_folding_keeps_the_function(blend, fossil):
    model = wrap(make_host().eval(), blend=blend, copy=True)
    load(model, "0", 0, affine(), alpha=0.4)
    load(model, "0", 1, torch_kernel(), alpha=0.3)
    y = model(X).detach()
    if fossil:
        model.fossilize("0", 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.fold("0", 0)
    if blend == "convex":
        # What is left has its share of what is left.
        assert model.seeds.stage[0, 0] == (S.FOSSILIZED if fossil else S.DORMANT)
    torch.testing.assert_close(model(X), y)
    assert model[0].kernel(0) is None
    assert model[0].weight is optimizer.param_groups[0]["params"][0]
    model(X).sum().backward()
    assert model[0].weight.grad is not None


def test_what_cannot_be_folded_is_refused_and_nothing_changes():
    model = wrap(make_host(), target_layers=[nn.Linear, nn.BatchNorm1d], copy=True)
    load(model, "0", 0, torch_kernel(), alpha=0.4)
    load(model, "1", 0, kernel_from_module(nn.Linear(5, 5)), alpha=0.4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FoldError, match="is not affine"):
        model.fold("0", 0)
    with pytest.raises(FoldError, match="layer '1' is not a linear layer"):
        model.fold("1", 0)
    with pytest.raises(SeedLifecycleError, match="is DORMANT and cannot fold"):
        model.fold("0", 1)
    for key, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[key]), key
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    model = wrap(tied)
    load(model, "0", 0, kernel_from_module(nn.Linear(3, 3)), alpha=0.4)
    with pytest.raises(FoldError, match="'0' shares its weights with another layer"):
        model.fold("0", 0)


def test_a_grown_model_is_called_functionally():
    model = wrap(make_host().eval(), blend="residual")
    load(model, "0", 0, torch_kernel(), alpha=0.4)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    doubled = {n: p * 2 if "kernel_0" in n else p for n, p in tensors.items()}
    assert torch.equal(torch.func.functional_call(model, tensors, (X,)), model(X))
    assert not torch.equal(torch.func.functional_call(model, doubled, (X,)), model(X))
