"""Equinox models with seeds, by pure surgery."""

from esper_adapters.equinox._functional import FunctionalModel, to_functional
from esper_adapters.equinox._layer import GraftedLinear
from esper_adapters.equinox._model import Resolved, SeededModel, trainable, unwrap, wrap

__all__ = [
    "FunctionalModel",
    "GraftedLinear",
    "Resolved",
    "SeededModel",
    "to_functional",
    "trainable",
    "unwrap",
    "wrap",
]
