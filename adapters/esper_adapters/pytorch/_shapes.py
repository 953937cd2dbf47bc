"""What a layer says of its examples before it is called."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from esper_adapters.pytorch._kernel import LayerShapes
from esper_adapters.pytorch._tensors import device_of, dtype_of


def layer_shapes(layer: nn.Module) -> LayerShapes:
    """The shapes of one example where a layer's own attributes say them."""
    dtype, device = dtype_of(layer), device_of(layer)
    for kind, known in _SHAPES.items():
        if isinstance(layer, kind):
            return LayerShapes(*known(layer), dtype, device)
    return LayerShapes(dtype=dtype, device=device)


def channels_first(layer: nn.Module) -> bool:
    """Whether an example's features are its first axis, and not its last."""
    return isinstance(layer, _ConvNd | _BatchNorm)


def _channels(inputs: str, outputs: str, axes: int) -> Callable[[Any], tuple[Any, Any]]:
    rest = (None,) * axes
    return lambda layer: ((getattr(layer, inputs), *rest), (getattr(layer, outputs), *rest))


_SHAPES: dict[type, Callable[[Any], tuple[Any, Any]]] = {
    nn.Linear: lambda layer: ((layer.in_features,), (layer.out_features,)),
    nn.MultiheadAttention: lambda layer: ((layer.embed_dim,), (layer.embed_dim,)),
    nn.LayerNorm: lambda layer: (
        (layer.normalized_shape[-1:],) * 2 if len(layer.normalized_shape) == 1 else (None, None)
    ),
    nn.Embedding: lambda layer: (None, (layer.embedding_dim,)),
    nn.Conv1d: _channels("in_channels", "out_channels", 1),
    nn.Conv2d: _channels("in_channels", "out_channels", 2),
    nn.Conv3d: _channels("in_channels", "out_channels", 3),
}
"""By class: the shapes of one example that goes in, and of what comes out."""
