"""Which kernels fit which layers: told when they are loaded, and the layer is as it was."""

import pytest
import torch
from torch import nn

from esper_adapters.pytorch import (
    KasminaAttentionLayer,
    KasminaConv2dLayer,
    KasminaLayer,
    KasminaLayerNormLayer,
    TorchKernel,
    kernel_from_function,
    kernel_from_module,
)
from esper_functional import KernelMismatchError, state_digest


def of(module: nn.Module, rank: int = 1) -> TorchKernel:
    return kernel_from_module(module, example_rank=rank)


class Buffered(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(5, device=device))
        self.lift = nn.Linear(3, 5)

    def forward(self, x):
        return self.lift(x) + self.shift


def shaped(inputs, outputs, rank=3) -> TorchKernel:
    return TorchKernel("ab" * 32, lambda x: x, {}, rank, inputs, outputs, "float32")


REFUSED = {
    "too narrow an output": (
        lambda: KasminaLayer(3, 5),
        lambda: of(nn.Linear(3, 4)),
        r"for zeros of float32\[2, 3\] it should return float32\[2, 5\], and it returned .*2, 4\]",
    ),
    "another input": (
        lambda: KasminaLayer(3, 5),
        lambda: of(nn.Linear(4, 5)),
        r"it should return float32\[2, 5\], and it raised RuntimeError: mat1 and mat2 shapes",
    ),
    "parameters of another dtype": (
        lambda: KasminaLayer(3, 5, dtype=torch.bfloat16),
        lambda: of(nn.Linear(3, 5)),
        "expected 3->5 bfloat16, found any->any float32",
    ),
    "an output of another dtype": (
        lambda: KasminaLayer(3, 5),
        lambda: kernel_from_function(lambda x: x.sum(-1, keepdim=True).repeat(1, 5).double(), {}),
        r"and it returned float64\[2, 5\]",
    ),
    "buffers elsewhere": (
        lambda: KasminaLayer(3, 5),
        lambda: of(Buffered("meta")),
        "the layer is on cpu, and buffers of the kernel's module on meta. Move the module there",
    ),
    "a batch that is mixed up": (
        lambda: KasminaLayer(3, 5),
        lambda: kernel_from_function(lambda w, x: (x @ w).sum(0), {"w": torch.ones(3, 5)}),
        r"and it returned float32\[5\]",
    ),
    "attention, features": (
        lambda: KasminaAttentionLayer(4, 2, batch_first=True),
        lambda: of(nn.Linear(4, 3), 2),
        r"for zeros of float32\[2, 2, 4\] it should return float32\[2, 2, 4\], and it returned",
    ),
    "a norm's features": (
        lambda: KasminaLayerNormLayer(4),
        lambda: of(nn.Linear(4, 3)),
        r"it should return float32\[2, 4\]",
    ),
    "channels of an image": (
        lambda: KasminaConv2dLayer(3, 4, 3),
        lambda: shaped((3, 8, 8), (5, 6, 6)),
        "expected 3xanyxany->4xanyxany float32, found 3x8x8->5x6x6 float32",
    ),
    "rank": (
        lambda: KasminaConv2dLayer(3, 4, 3),
        lambda: shaped((3,), (4,), 1),
        "expected 3xanyxany->4xanyxany float32, found 3->4 float32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_when_it_is_loaded(case):
    make, kernel, message = REFUSED[case]
    layer = make()
    before, keys = state_digest(layer.seeds), list(layer.state_dict())
    heard = []
    layer.seed_table.listeners.append(heard.append)
    given = kernel()
    drawn = torch.get_rng_state()
    with pytest.raises(KernelMismatchError, match=message):
        layer.load_kernel_sync(0, given, alpha=0.5)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (state_digest(layer.seeds), list(layer.state_dict()), heard) == (before, keys, [])


FITS = {
    "linear": (lambda: KasminaLayer(3, 5), lambda: of(nn.Linear(3, 5)), (2, 3)),
    "buffers in place": (lambda: KasminaLayer(3, 5), lambda: of(Buffered("cpu")), (2, 3)),
    "sequences on a linear layer": (
        lambda: KasminaLayer(4, 4),
        lambda: of(nn.TransformerEncoderLayer(4, 2, 8, 0.5, batch_first=True), 2),
        (2, 3, 4),
    ),
    "an image of some size": (
        lambda: KasminaConv2dLayer(3, 4, 3, padding=1),
        lambda: of(nn.Conv2d(3, 4, 1), 3),
        (2, 3, 5, 5),
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_what_fits_is_loaded_and_draws_no_random_numbers(case):
    make, kernel, shape = FITS[case]
    layer, given = make(), kernel()
    state = torch.get_rng_state()
    layer.load_kernel_sync(0, given, alpha=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer(torch.randn(*shape)).shape[0] == 2


def test_a_layer_on_meta_tells_shapes_and_runs_nothing():
    layer = KasminaLayer(3, 5, device="meta")
    layer.load_kernel_sync(0, of(nn.Linear(3, 5)), alpha=0.5)
    assert layer.kernel(0).weight.device.type == "meta"
    assert layer(torch.randn(2, 3, device="meta")).shape == (2, 5)
