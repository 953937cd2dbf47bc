"""Host layers as pairs of pure functions: `init_x` makes parameters, `x` applies them."""

from esper_functional._layers._attention import (
    AttentionParams,
    attention,
    init_attention,
)
from esper_functional._layers._batch_norm import (
    BatchNormParams,
    BatchStats,
    batch_norm,
    init_batch_norm,
)
from esper_functional._layers._conv2d import (
    PADDING_MODES,
    Conv2dParams,
    PaddingMode,
    conv2d,
    init_conv2d,
)
from esper_functional._layers._layer_norm import (
    LayerNormParams,
    init_layer_norm,
    layer_norm,
)
from esper_functional._layers._linear import (
    LinearParams,
    init_linear,
    linear,
)

__all__ = [
    "PADDING_MODES",
    "AttentionParams",
    "BatchNormParams",
    "BatchStats",
    "Conv2dParams",
    "LayerNormParams",
    "LinearParams",
    "PaddingMode",
    "attention",
    "batch_norm",
    "conv2d",
    "init_attention",
    "init_batch_norm",
    "init_conv2d",
    "init_layer_norm",
    "init_linear",
    "layer_norm",
    "linear",
]
