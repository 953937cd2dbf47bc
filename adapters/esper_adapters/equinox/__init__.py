"""Equinox models with seeds, by pure surgery."""

from esper_adapters._functional import FunctionalModel
from esper_adapters._plain import export_plain
from esper_adapters._seeded import Resolved, SeededModel, to_functional
from esper_adapters.equinox._kernel import kernel_from_module
from esper_adapters.equinox._layer import GraftedLayer
from esper_adapters.equinox._model import shadows, trainable, unwrap, wrap

__all__ = [
    "FunctionalModel",
    "GraftedLayer",
    "Resolved",
    "SeededModel",
    "export_plain",
    "kernel_from_module",
    "shadows",
    "to_functional",
    "trainable",
    "unwrap",
    "wrap",
]
