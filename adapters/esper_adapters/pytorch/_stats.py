"""What is said of a layer's seeds and kernels, in plain data."""

from typing import TYPE_CHECKING, Any

from esper_functional import SeedLifecycleState

if TYPE_CHECKING:
    from esper_adapters.pytorch._layer import SeededLayer


def layer_stats(layer: "SeededLayer") -> dict[str, Any]:
    """The layer's name, its seeds by stage, and of each kernel how it runs and fares."""
    state, row = layer.seeds, layer.row
    kernels = {
        seed: {
            "kernel_id": kernel.kernel_id,
            "route": kernel.route,
            "stage": SeedLifecycleState(int(state.stage[row, seed])).name,
            "alpha": float(state.alpha[row, seed]),
            "incubating": bool(state.incubating[row, seed]),
            "health": float(state.health[row, seed]),
            "latency_us": float(state.latency[row, seed]),
            "errors": int(state.error_count[row, seed]),
            "parameters": sum(p.numel() for p in kernel.parameters()),
        }
        for seed in range(layer.num_seeds)
        if (kernel := layer.kernel(seed)) is not None
    }
    return {
        "layer_name": layer.layer_name,
        "layer_class": type(layer)._esper_base.__name__,
        "state_stats": layer.state_layout.get_stats(),
        "kernels": kernels,
        "cache_stats": layer.seed_table.recent.stats(),
        "telemetry_enabled": layer.telemetry_enabled,
    }
