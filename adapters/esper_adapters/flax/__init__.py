"""Flax models with seeds: NNX by pure surgery, Linen by interception."""

from esper_adapters._functional import FunctionalModel
from esper_adapters._plain import export_plain
from esper_adapters._seeded import Resolved, SeededModel, to_functional
from esper_adapters.flax._kernel import kernel_from_module
from esper_adapters.flax._layer import BlendData, FossilParam, GraftedLayer
from esper_adapters.flax._linen import find_linen_sites, linen_sites
from esper_adapters.flax._model import carry_optimizer, shadows, unwrap, wrap

__all__ = [
    "BlendData",
    "FossilParam",
    "FunctionalModel",
    "GraftedLayer",
    "Resolved",
    "SeededModel",
    "carry_optimizer",
    "export_plain",
    "find_linen_sites",
    "kernel_from_module",
    "linen_sites",
    "shadows",
    "to_functional",
    "unwrap",
    "wrap",
]
