"""Kernels on side streams: another time, the same numbers. Without a GPU, one stream for all."""

import copy
import pickle

import pytest
import torch
from torch import nn

from esper_adapters.pytorch import (
    AsyncKasminaConv2dLayer,
    GradientSynchronizer,
    KasminaConv2dLayer,
    StreamManager,
    kernel_from_function,
    kernel_from_module,
)
from esper_functional import BLENDS, KasminaException

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device"))]  # fmt: skip


def conv(seed: int):
    torch.manual_seed(seed)
    return kernel_from_module(nn.Conv2d(3, 4, 3, padding=1), example_rank=3)


def roots():
    return kernel_from_function(
        lambda scale, x: torch.sqrt(x[:, :1]).repeat(1, 4, 1, 1) * scale,
        {"scale": torch.ones(1)},
        example_rank=3,
    )


def make(kind, device="cpu", **options):
    torch.manual_seed(0)
    layer = kind(3, 4, 3, padding=1, layer_name="conv", num_seeds=3, **options).to(device)
    layer.load_kernel_sync(0, conv(1), alpha=0.2)
    layer.load_kernel_sync(1, roots(), alpha=0.3)
    layer.load_kernel_sync(2, conv(2), alpha=0.4)
    return layer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("blend", BLENDS)
def test_output_gradients_counts_and_seeds_are_those_of_the_synchronous_layer(
    blend, isolate, device
):
    found = []
    for kind in (KasminaConv2dLayer, AsyncKasminaConv2dLayer):
        layer = make(kind, device, blend=blend, isolate=isolate)
        torch.manual_seed(5)
        outputs = []
        for sign in (1.0, -1.0, 1.0):
            x = (torch.rand(2, 3, 6, 6, device=device) * sign).requires_grad_()
            y = layer(x)
            y.square().sum().backward()
            outputs += [y.detach(), x.grad]
        grads = [p.grad for p in layer.parameters()]
        found.append([*outputs, *grads, torch.tensor(layer.error_counts())])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_dormant_it_is_a_convolution():
    layer = AsyncKasminaConv2dLayer(3, 4, 3)
    bare = nn.Conv2d(3, 4, 3)
    bare.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(layer(x), bare(x))
    assert layer.stream_manager.get_stats()["total_usage"] == 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_it_is_copied_and_pickled_without_its_streams(again):
    layer, x = make(AsyncKasminaConv2dLayer), torch.rand(2, 3, 6, 6)
    # A function of this test cannot be pickled.
    layer.unload_kernel_sync(1)
    y = layer(x)
    twin = again(layer)
    assert type(twin) is AsyncKasminaConv2dLayer
    assert twin.stream_manager is not layer.stream_manager
    assert torch.equal(twin(x), y)


def test_the_stats_count_what_was_launched_and_joined():
    layer = make(AsyncKasminaConv2dLayer)
    for _ in range(2):
        layer(torch.rand(2, 3, 6, 6))
    stats = layer.stream_manager.get_stats()
    assert stats == {
        "num_streams": 3,
        "stream_usage": [2, 2, 2],
        "total_usage": 6,
        "devices": ["cpu"],
    }
    layer.gradient_sync.synchronize_pending(layer.stream_manager)
    assert layer.gradient_sync.get_stats() == {"joined": 6, "sync_count": 1}


def test_streams_are_shared_in_turn():
    manager = StreamManager(2)
    assert manager.get_stream(0) is manager.get_stream(2)
    assert manager.get_stream(0) is not manager.get_stream(1)
    manager.synchronize_all()
    assert GradientSynchronizer().join([]) == []
    with pytest.raises(KasminaException, match="num_streams must be at least 1: 0"):
        StreamManager(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_step_waits_for_no_device():
    layer = make(AsyncKasminaConv2dLayer, "cuda")
    x = torch.rand(2, 3, 6, 6, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
