"""Functions of jax that stand in for public functions of torch, while torch2jax follows a module.

Each computes what torch does, in the same precision: in bfloat16, norms, softmax, means and
activations are computed in float32 and rounded once. They are called with arrays and with torch's
arguments in torch's order.
"""

from collections.abc import Callable
from typing import Any

from esper.tezzeret._replacements._contraction import CONTRACTIONS
from esper.tezzeret._replacements._norm import NORMS
from esper.tezzeret._replacements._pointwise import POINTWISE
from esper.tezzeret._replacements._pool import POOLS
from esper.tezzeret._replacements._shape import SHAPES

REPLACEMENTS: dict[str, Callable[..., Any]] = {
    **POINTWISE,
    **CONTRACTIONS,
    **NORMS,
    **POOLS,
    **SHAPES,
}
"""By the public function's name below `torch`."""

__all__ = ["REPLACEMENTS"]
