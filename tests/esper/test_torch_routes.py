"""One artifact by three routes in torch: its TorchScript, its blueprint, its StableHLO by jax."""

import copy
import pickle
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import esper
from esper.artifacts import read_artifact, rewrite_artifact
from esper.contracts import KernelSignature
from esper.errors import ArtifactError, InputError
from esper.execution import load_jax_kernel, load_torch_kernel
from esper.tezzeret import load_blueprint, torch_kernel_from_blueprint
from esper.urza import Library
from esper_adapters.pytorch import KasminaLayer, kernel_from_jax, wrap
from esper_functional import (
    BLENDS,
    DerivativeError,
    KasminaException,
    KernelMismatchError,
    kernel_from_function,
)
from tests.adapters.kernels import BLUEPRINTS, artifact, random_params
from tests.tolerance import assert_close

ROUTES = ("torchscript", "native", "bridge")


def without_torchscript(whole):
    return rewrite_artifact(whole, torchscript=None)


def grown(route: str, blueprint: str = "gated", blend: str = "convex") -> KasminaLayer:
    torch.manual_seed(0)
    layer = KasminaLayer(3, 5, blend=blend)
    source = artifact(blueprint)
    kernel = load_torch_kernel(source, route=route)
    values = random_params(source, 7)
    params = {name: values[name] for name in kernel.params}
    layer.load_kernel_sync(0, type(kernel)(**{**vars(kernel), "params": params}), alpha=0.4)
    return layer


def batch(*lead: int) -> torch.Tensor:
    return torch.tensor(
        np.random.default_rng(3).normal(size=(*(lead or (6,)), 3)), dtype=torch.float32
    )


@pytest.mark.parametrize("lead", [(6,), (), (2, 4)])
@pytest.mark.parametrize("blueprint", BLUEPRINTS)
def test_the_routes_agree_in_output_and_gradients(blueprint, lead):
    found = {}
    for route in ROUTES:
        layer, x = grown(route, blueprint), batch(*lead).requires_grad_()
        layer(x).square().sum().backward()
        kernel = layer.kernel(0)
        by_name = dict(zip(kernel.param_names, kernel.parameters(), strict=True))
        grads = {name: p.grad for name, p in by_name.items()}
        found[route] = (layer(x).detach(), x.grad, layer.weight.grad, grads)
    for route in ("native", "bridge"):
        for ours, theirs in zip(found[route][:3], found["torchscript"][:3], strict=True):
            assert_close(ours, theirs)
        for name, gradient in found["torchscript"][3].items():
            assert_close(found[route][3][name], gradient)


@pytest.mark.parametrize("route", ROUTES)
def test_the_stats_say_which_route_ran(route, tmp_path):
    library = Library(tmp_path)
    kernel_id = library.put(artifact())
    model = esper.wrap(nn.Sequential(nn.Linear(3, 5)), library=library, route=route)
    assert model.load_kernel_sync("0", 2, kernel_id)
    assert model.get_model_stats()["kernels_by_route"] == {route: 1}
    stats = model.get_layer_stats("0")["kernels"][2]
    assert (stats["route"], stats["kernel_id"]) == (route, kernel_id)


def test_an_artifact_that_has_stablehlo_alone_runs_over_the_bridge(tmp_path):
    bare = without_torchscript(artifact())
    assert read_artifact(bare.data).torchscript is None
    assert load_torch_kernel(bare).route == "bridge"
    with pytest.raises(ArtifactError, match="holds no TorchScript: load it by the route 'bridge'"):
        load_torch_kernel(bare, route="torchscript")
    library = Library(tmp_path)
    kernel_id = library.put(bare)
    model = esper.wrap(nn.Sequential(nn.Linear(3, 5)), library=library)
    model.load_kernel_sync("0", 0, kernel_id, alpha=1.0)
    kernel = load_jax_kernel(artifact())
    x = batch()
    assert_close(model(x).detach(), kernel.program.apply(kernel.params, jnp.asarray(x.numpy())))


def test_a_blueprint_becomes_a_kernel_of_torch_without_an_artifact():
    signature = KernelSignature(input_shape=(3,), output_shape=(5,))
    blueprint = load_blueprint("bottleneck")
    kernel = torch_kernel_from_blueprint(blueprint, signature, sizes={"width": 4})
    twin = artifact("bottleneck")
    for name, value in twin.params.items():
        np.testing.assert_array_equal(kernel.params[name], value)
    layer = KasminaLayer(3, 5)
    layer.load_kernel_sync(0, kernel, alpha=0.4)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(batch()), layer(batch()))
    assert again.kernel(0).program.function is layer.kernel(0).program.function


@pytest.mark.parametrize("blend", BLENDS)
def test_what_torch_changes_after_a_call_the_bridge_has_read_before(blend):
    """In place, at once: jax runs on its own threads and might still be reading."""
    torch.manual_seed(0)
    wide = kernel_from_function(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w": jnp.ones((512, 2048)) / 512}
    )
    layer = KasminaLayer(512, 512, blend=blend)
    layer.load_kernel_sync(0, kernel_from_jax(wide), alpha=0.5)
    source = torch.randn(256, 512)
    expected = layer(source.clone()).detach()
    for _ in range(10):
        x = source.clone().requires_grad_()
        y = layer(x)
        with torch.no_grad():
            x.mul_(0.0)
            assert torch.equal(y, expected)
    x = source.clone().requires_grad_()
    layer(x).sum().backward()
    first = [p.grad.clone() for p in layer.kernel(0).parameters()]
    with torch.no_grad():
        for p in layer.kernel(0).parameters():
            p.zero_()
    assert all(g.any() and torch.isfinite(g).all() for g in first)


def test_a_program_of_jax_trains_in_torch_in_bfloat16():
    kernel = kernel_from_function(
        lambda p, x: x @ p["w"], {"w": jnp.full((3, 5), 0.5, jnp.bfloat16)}
    )
    layer = KasminaLayer(3, 5, dtype=torch.bfloat16)
    layer.load_kernel_sync(0, kernel_from_jax(kernel), alpha=1.0)
    x = batch().bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x @ torch.full((3, 5), 0.5, dtype=torch.bfloat16))
    y.sum().backward()
    assert layer.kernel(0).w.grad.dtype == torch.bfloat16


def test_what_the_bridge_cannot_carry_is_refused():
    kernel = kernel_from_function(lambda p, x: x * p["w"], {"w": jnp.ones(3)})
    double = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64))
    model = wrap(double)
    with pytest.raises(KernelMismatchError, match=r"expected 3->3 float64, found"):
        model.load_kernel_sync("0", 0, kernel_from_jax(kernel), alpha=0.5)
    layer = KasminaLayer(3, 3)
    layer.load_kernel_sync(0, kernel_from_jax(kernel), alpha=0.5)
    assert torch.equal(copy.deepcopy(layer)(batch()), layer(batch()))
    with pytest.raises(KasminaException, match="cannot be pickled: save the model's state_dict"):
        pickle.dumps(layer)
    x = batch().requires_grad_()
    with pytest.raises(DerivativeError, match="has one derivative: leave out create_graph=True"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    from esper_adapters.pytorch._bridge import to_jax

    with pytest.raises(KasminaException, match=r"torch.int64 has no counterpart in jax"):
        to_jax(torch.arange(3))


def test_an_unknown_route_is_refused_with_those_there_are():
    unknown: Any = "nativ"
    with pytest.raises(InputError, match="unknown route 'nativ': expected one of torchscript, nat"):
        unhooked(load_torch_kernel)(artifact(), route=unknown)


def unhooked(function):
    """Without the hook that checks types in tests, which users do not have."""
    return getattr(function, "__wrapped__", function)
