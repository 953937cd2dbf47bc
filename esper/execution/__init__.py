"""Kernels at work: layers that carry seeds, and loading artifacts into them."""

from typing import TYPE_CHECKING, Any

from esper.errors import KernelCompilationError, KernelExecutionError
from esper.execution._executor import RealKernelExecutor
from esper.execution._load import Route, load_jax_kernel, load_torch_kernel
from esper.execution._measure import KernelMeasurement
from esper.recovery import ErrorRecoveryManager, ErrorType, HealthMonitor
from esper_functional import SeedLifecycleError, SeedLifecycleState

if TYPE_CHECKING:
    from esper.cache import EnhancedKernelCache, KernelCache
    from esper.execution._compile_counter import count_compilations
    from esper.execution._programs import PlannedPrograms
    from esper_adapters.pytorch import (
        AsyncKasminaConv2dLayer,
        GradientSynchronizer,
        KasminaAttentionLayer,
        KasminaBatchNormLayer,
        KasminaConv2dLayer,
        KasminaLayer,
        KasminaLayerNormLayer,
        KasminaStateLayout,
        StreamManager,
    )

__all__ = [
    "AsyncKasminaConv2dLayer",
    "EnhancedKernelCache",
    "ErrorRecoveryManager",
    "ErrorType",
    "GradientSynchronizer",
    "HealthMonitor",
    "KasminaAttentionLayer",
    "KasminaBatchNormLayer",
    "KasminaConv2dLayer",
    "KasminaLayer",
    "KasminaLayerNormLayer",
    "KasminaStateLayout",
    "KernelCache",
    "KernelCompilationError",
    "KernelExecutionError",
    "KernelMeasurement",
    "PlannedPrograms",
    "RealKernelExecutor",
    "Route",
    "SeedLifecycleError",
    "SeedLifecycleState",
    "StreamManager",
    "count_compilations",
    "load_jax_kernel",
    "load_torch_kernel",
]


def __getattr__(name: str) -> Any:
    if name == "PlannedPrograms":
        from esper.execution._programs import PlannedPrograms

        return PlannedPrograms
    if name == "count_compilations":
        from esper.execution._compile_counter import count_compilations

        return count_compilations
    if name in ("EnhancedKernelCache", "KernelCache"):
        from esper.cache import KernelCache

        return KernelCache
    if name in __all__:
        # torch is imported by those who ask for what is of torch: the rest of the list.
        from esper_adapters import pytorch

        return getattr(pytorch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
