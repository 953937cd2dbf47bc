"""PyTorch modules with seeds: the semantics of the core, registered, movable, trainable."""

import logging
import os

import torch

# One card for both frameworks: jax takes three quarters of it at its first use
# unless told otherwise, so this must be said before jax is imported.
if torch.cuda.is_available() and "XLA_PYTHON_CLIENT_PREALLOCATE" not in os.environ:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    logging.getLogger("esper").warning(
        "torch is in the process: jax will not preallocate device memory; set"
        " XLA_PYTHON_CLIENT_PREALLOCATE yourself to decide otherwise"
    )

from esper_adapters.pytorch._boundaries import absorb_faults, advance_layers
from esper_adapters.pytorch._bridge import kernel_from_jax
from esper_adapters.pytorch._distributed import share_events
from esper_adapters.pytorch._family import (
    KasminaAttentionLayer,
    KasminaBatchNormLayer,
    KasminaConv2dLayer,
    KasminaLayer,
    KasminaLayerNormLayer,
)
from esper_adapters.pytorch._functional import TorchFunctional, from_functional, to_functional
from esper_adapters.pytorch._grafted import GraftedKernel
from esper_adapters.pytorch._health import HealthSample, measure_outputs
from esper_adapters.pytorch._kernel import (
    TorchKernel,
    kernel_from_function,
    kernel_from_module,
)
from esper_adapters.pytorch._layer import SeededLayer
from esper_adapters.pytorch._layout import KasminaStateLayout
from esper_adapters.pytorch._model import MorphableModel
from esper_adapters.pytorch._optim import carry_optimizer
from esper_adapters.pytorch._plain import export_plain
from esper_adapters.pytorch._replicas import replicate_kernels
from esper_adapters.pytorch._streams import (
    AsyncKasminaConv2dLayer,
    GradientSynchronizer,
    StreamManager,
)
from esper_adapters.pytorch._table import SeedTable
from esper_adapters.pytorch._wrap import unwrap, wrap

__all__ = [
    "AsyncKasminaConv2dLayer",
    "GradientSynchronizer",
    "GraftedKernel",
    "HealthSample",
    "KasminaAttentionLayer",
    "KasminaBatchNormLayer",
    "KasminaConv2dLayer",
    "KasminaLayer",
    "KasminaLayerNormLayer",
    "KasminaStateLayout",
    "MorphableModel",
    "SeedTable",
    "SeededLayer",
    "StreamManager",
    "TorchFunctional",
    "TorchKernel",
    "absorb_faults",
    "advance_layers",
    "carry_optimizer",
    "export_plain",
    "from_functional",
    "kernel_from_function",
    "kernel_from_jax",
    "kernel_from_module",
    "measure_outputs",
    "replicate_kernels",
    "share_events",
    "to_functional",
    "unwrap",
    "wrap",
]
