"""What each operation does, in the few words by which architectures are compared."""

from collections.abc import Mapping
from typing import NamedTuple


class Traits(NamedTuple):
    """Of one operation."""

    linear: int = 0
    """Linear maps over features in it."""
    nonlinear: bool = False
    """Whether it bends what it takes, element by element or by a softmax."""
    norm: bool = False
    """Whether it standardises."""
    mixes: bool = False
    """Whether an output position depends on several input positions. A linear layer does so where
    positions are what it acts on, and a convolution where its window is wider than one."""
    gates: bool = False
    """Whether it multiplies what comes by two ways."""
    adds: bool = False
    """Whether it adds what comes by two ways."""
    layers: int = 0
    """Maps with trained parameters, one after the other."""


_BENDS = Traits(nonlinear=True)
_NORM = Traits(norm=True, layers=1)
_POOL = Traits(mixes=True)
_MAP = Traits(linear=1, layers=1)

TRAITS: Mapping[str, Traits] = {
    **dict.fromkeys(
        ("relu", "elu", "gelu", "gelu_tanh", "silu", "sigmoid", "softplus", "tanh", "softmax"),
        _BENDS,
    ),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "batch_norm"), _NORM),
    **dict.fromkeys(("max_pool", "avg_pool", "mean"), _POOL),
    **dict.fromkeys(("linear", "conv1d", "conv2d"), _MAP),
    **dict.fromkeys(("add", "residual"), Traits(adds=True)),
    **dict.fromkeys(("concat", "dropout", "reshape", "scale", "transpose"), Traits()),
    "attention": Traits(nonlinear=True, mixes=True),
    "layer_scale": Traits(layers=1),
    "multiply": Traits(gates=True),
    "squeeze_excite": Traits(linear=2, nonlinear=True, mixes=True, gates=True, layers=2),
}
"""By the name that blueprints use."""
