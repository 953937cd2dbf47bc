"""Models of any architecture: called, compared, and given kernels that fit their layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from esper_adapters.pytorch import SeededLayer, TorchKernel, kernel_from_module, wrap
from tests.adapters.architectures import ARCHITECTURES, Architecture, every_layer, tensors

THIRD_PARTY_WARNINGS = [
    # transformers 5 has two names for it, and 5.0 only the older.
    pytest.mark.filterwarnings(
        "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
    ),
    # What torch's own encoder uses in evaluation, without being asked to.
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in proto:UserWarning"),
]


def made(name: str) -> tuple[Architecture, nn.Module]:
    torch.manual_seed(0)
    return ARCHITECTURES[name], ARCHITECTURES[name].build()


def targets_of(name: str, target: str) -> Any:
    return every_layer if target == "every layer" else ARCHITECTURES[name].targets[target]


def seeded(name: str, target: str, *, copied: bool = True) -> tuple[Any, nn.Module, Any]:
    """An architecture, a host of it, and the host wrapped."""
    own, host = made(name)
    options = {"target_layers": targets_of(name, target), "seeds_per_layer": 2, "copy": copied}
    return own, host, wrap(host, **options)


def called(own: Architecture, model: nn.Module) -> Any:
    """What the model returns for the one batch; every call draws the same random numbers."""
    torch.manual_seed(1)
    return model(**own.options())


def seen(own: Architecture, model: nn.Module) -> list[Tensor]:
    """What the model returns in evaluation."""
    model.eval()
    with torch.no_grad():
        return tensors(called(own, model))


def learnt(own: Architecture, model: nn.Module, training: bool) -> list[Tensor | None]:
    """All tensors that the model returns, its parameters' gradients and its buffers."""
    model.train(training)
    model.zero_grad(set_to_none=True)
    output = called(own, model)
    own.loss(output).backward()
    grads = [p.grad for p in model.parameters()]
    return [*tensors(output), *grads, *model.buffers()]


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()


def assert_same_bits(actual: list[Any], expected: list[Any]) -> None:
    ours, theirs = len(actual), len(expected)
    assert ours == theirs
    assert any(t is not None for t in expected)
    wrong = [
        i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if not same_bits(a, b)
    ]
    assert not wrong, f"tensors {wrong} of {theirs} differ"


# ---------------------------------------------------------------- kernels


def examples(own: Architecture, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """What the seeded layers that are called take and return, one for each class of them."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def note(layer: Any, args: Any, options: Any, result: Any) -> None:
        x = args[0] if args else options[next(iter(options))]
        h = result[0] if isinstance(result, tuple) else result
        found.setdefault(layer.layer_name, (x.detach(), h.detach()))

    layers = model.kasmina_layers.values()
    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    model.eval()
    called(own, model)  # with gradients, so that no fused path passes layers by
    for hook in hooks:
        hook.remove()
    firsts = {type(model.get_submodule(path)): path for path in reversed(found)}
    return {path: found[path] for path in firsts.values()}


def kernel_for(layer: Any, x: Tensor, h: Tensor) -> TorchKernel:
    """A small kernel of a layer's kind that takes x and returns what has the shape of h."""
    torch.manual_seed(2)
    if not x.is_floating_point():
        bags = h.dim() == x.dim()
        table = (nn.EmbeddingBag if bags else nn.Embedding)(layer.num_embeddings, h.shape[-1])
        return kernel_from_module(table, example_rank=int(bags))
    if x.dim() != h.dim():
        whole = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), h.shape[-1]))
        return kernel_from_module(whole, example_rank=x.dim() - 1)
    if isinstance(layer, _ConvNd):
        return kernel_from_module(like_convolution(layer), example_rank=x.dim() - 1)
    norm_of_channels = isinstance(layer, _NormBase | nn.GroupNorm) and x.dim() > 2
    if norm_of_channels or x.shape[:-1] != h.shape[:-1]:
        return kernel_from_module(between_images(x, h), example_rank=x.dim() - 1)
    small = nn.Sequential(nn.Linear(x.shape[-1], 4), nn.Tanh(), nn.Linear(4, h.shape[-1]))
    return kernel_from_module(small)


def between_images(x: Tensor, h: Tensor) -> nn.Module:
    """A convolution from channels and sizes to others, whose stride is its size."""
    stride = tuple(a // b for a, b in zip(x.shape[2:], h.shape[2:], strict=True))
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(stride)]
    return kind(x.shape[1], h.shape[1], stride, stride)


def like_convolution(layer: Any) -> nn.Module:
    """A convolution of a layer's geometry, in one group."""
    kind = getattr(nn, f"Conv{'Transpose' if layer.transposed else ''}{len(layer.kernel_size)}d")
    return kind(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        dilation=layer.dilation,
    )


def grafted(own: Architecture, model: Any, alpha: float = 0.3) -> SeededLayer:
    """The first layer of the model that is called, with a kernel in its first seed."""
    path, (x, h) = next(iter(examples(own, model).items()))
    return graft(model, path, x, h, alpha)


def graft(model: Any, path: str, x: Tensor, h: Tensor, alpha: float = 0.3) -> SeededLayer:
    """The layer at a path, with a kernel in its first seed."""
    layer = model.kasmina_layers[path]
    # By the class: a layer that is the model itself has the model's methods.
    SeededLayer.load_kernel_sync(layer, 0, kernel_for(layer, x, h), alpha=alpha)
    return layer
