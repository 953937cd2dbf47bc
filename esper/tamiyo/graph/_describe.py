"""A kernel by what it costs and what it is made of, and not by a number of its own.

So a policy can judge a kernel that it never met, and two variants of one blueprint are one to it.
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from esper.tamiyo.graph._cost_columns import cost_columns
from esper.tamiyo.graph._features import BOUND

if TYPE_CHECKING:
    from esper.tamiyo import Cost
    from esper.tezzeret import BlueprintIR
    from esper.urza import KernelRecord

KERNEL_FEATURES = (
    "parameters", "relative_parameters", "relative_flops", "born_zero", "born_identity",
    "confidence", "linear", "nonlinear", "norm", "mixes", "gates", "adds", "layers", "known",
)  # fmt: skip
"""By name, in order: the binary logarithm of one and the parameters, over 4; parameters and FLOPs
over the host's, as logarithms of one and the ratio; how it is born, two flags; its blueprint's
confidence; linear maps over 4; flags of what its graph has; trained layers on the longest path,
over 4; whether its graph is known."""

OPERATIONS = 7
"""Those that come of the graph: from "linear" to "layers"."""


def describe_operations(blueprint: "BlueprintIR") -> Float[np.ndarray, " operations"]:
    """What a blueprint's graph is made of, f32 `[OPERATIONS]`."""
    # Whoever has a blueprint has this already; others need no compiler.
    from esper.tezzeret import summarize_blueprint

    found = summarize_blueprint(blueprint)
    flags = (found.nonlinear, found.norms, found.mixing, found.gates, found.adds)
    return np.array(
        [found.linear / 4.0, *(float(count > 0) for count in flags), found.layers / 4.0],
        np.float32,
    )


def describe_costs(
    parameters: float,
    flops: float,
    host_parameters: float,
    host_flops: float,
    *,
    birth: str,
    confidence: float,
    operations: Float[np.ndarray, " operations"] | None = None,
) -> Float[np.ndarray, " kernel"]:
    """The description of a kernel by counts alone; see `KERNEL_FEATURES`.

    Args:
        parameters: of the kernel, from 0.
        flops: of one example, forward, from 0.
        host_parameters: of the bare host; fewer than 1 count as 1.
        host_flops: of the bare host; fewer than 1 count as 1.
        birth: "zero", "identity" or "free".
        confidence: in [0, 1].
        operations: of its graph, see `describe_operations`; None where that is not known.

    Returns:
        f32 `[KERNEL]`, finite, in [-BOUND, BOUND]; equal for equal arguments, to the last bit.
    """
    known = operations is not None
    numbers = [
        *cost_columns(parameters, flops, host_parameters, host_flops, np).tolist(),
        float(birth == "zero"),
        float(birth == "identity"),
        confidence,
        *(operations.tolist() if known else [0.0] * OPERATIONS),
        float(known),
    ]
    return np.clip(np.array(numbers, np.float32), -BOUND, BOUND)


def describe_kernel(
    record: "KernelRecord", host: "Cost", blueprint: "BlueprintIR | None"
) -> Float[np.ndarray, " kernel"]:
    """The description of a kernel of the library.

    Args:
        host: cost of the bare host that it is for.
        blueprint: that it was compiled from; None where that is not known, as for a user's own.

    Returns:
        f32 `[KERNEL]`, as `describe_costs` gives it.
    """
    return describe_costs(
        record.parameter_count,
        record.flops,
        host.parameters,
        host.flops,
        birth=record.birth,
        confidence=record.confidence,
        operations=None if blueprint is None else describe_operations(blueprint),
    )
