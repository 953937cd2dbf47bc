"""The part of a kernel's description that depends on its host: what it costs beside it."""

from typing import Any

COSTS = 3
"""Numbers at the beginning of a description."""


def cost_columns(
    parameters: Any, flops: Any, host_parameters: Any, host_flops: Any, xp: Any
) -> Any:
    """f32 `[..., COSTS]`: parameters by themselves, then parameters and FLOPs over the host's.

    Args:
        parameters: of the kernel, counted.
        flops: of a forward pass of one example, counted, as those of the host.
        xp: numpy or jax.numpy.
    """
    counts = [xp.asarray(own).astype(xp.float32) for own in (parameters, flops)]
    hosts = [xp.asarray(own).astype(xp.float32) for own in (host_parameters, host_flops)]
    return xp.stack(
        [
            xp.log2(1.0 + counts[0]) / 4.0,
            xp.log1p(counts[0] / xp.maximum(hosts[0], 1.0)),
            xp.log1p(counts[1] / xp.maximum(hosts[1], 1.0)),
        ],
        axis=-1,
    )
