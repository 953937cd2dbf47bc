"""Optimiser surgery for optax: parameters come, go and freeze; incumbents do not notice."""

from esper_adapters.optax._carry import HasInit, carry
from esper_adapters.optax._errors import OptimizerSurgeryError
from esper_adapters.optax._freeze import FrozenNode, freeze
from esper_adapters.optax._per_group import per_group

__all__ = [
    "FrozenNode",
    "HasInit",
    "OptimizerSurgeryError",
    "carry",
    "freeze",
    "per_group",
]
