"""The functional core of Esper: numpy and jax, no effects.

What a seed is, is data: `SeedState`, an immutable pytree that only pure
functions change, one recorded `Event` at a time. What runs, is a static `Plan`
read off that data.
"""

from esper_functional._arrays import (
    Array,
)
from esper_functional._blend import (
    BLENDS,
    Blend,
    BlendWeights,
    blend_weights,
    check_blend,
    mix,
)
from esper_functional._containment import (
    run_contained,
)
from esper_functional._errors import (
    BlendError,
    KasminaException,
    KernelIdError,
    KernelMismatchError,
    SeedIndexError,
    SeedLifecycleError,
)
from esper_functional._events import (
    Event,
    EventKind,
    apply_event,
    fault_events,
    fold_events,
)
from esper_functional._execute import (
    Network,
    Observed,
    Site,
    bare,
    count_faults,
    execute,
    forward,
    forward_batch,
    run,
    run_site,
)
from esper_functional._health import (
    activation_variance,
    dead_ratio,
    health_score,
    mean_abs_correlation,
)
from esper_functional._kernel import (
    Kernel,
    Program,
    check_kernel,
    count_params,
    kernel_from_function,
)
from esper_functional._layers import (
    LinearParams,
    init_linear,
    linear,
)
from esper_functional._lifecycle import (
    FAILURES_TO_RECOVERY,
    LEGAL,
    MOVES,
    Move,
    SeedLifecycleState,
    legal_moves,
    lifecycle_diagram,
)
from esper_functional._plan import (
    Live,
    Plan,
    Run,
    Weights,
    absorb,
    gather,
    gather_weights,
    plan,
    running_seeds,
)
from esper_functional._state import (
    NO_SLOT,
    SeedState,
    init_seeds,
    kernel_id_words,
    running,
    state_digest,
)
from esper_functional._tolerance import (
    TOLERANCES,
    Difference,
    Tolerance,
    difference,
)
from esper_functional._transition import (
    EMA_FACTOR,
    Outcome,
    advance,
    observe_health,
    record_error,
    record_errors,
    record_success,
    set_alpha,
    start_ramp,
    transition,
)

__all__ = [
    "BLENDS",
    "EMA_FACTOR",
    "FAILURES_TO_RECOVERY",
    "LEGAL",
    "MOVES",
    "NO_SLOT",
    "TOLERANCES",
    "Array",
    "Blend",
    "BlendError",
    "BlendWeights",
    "Difference",
    "Event",
    "EventKind",
    "KasminaException",
    "Kernel",
    "KernelIdError",
    "KernelMismatchError",
    "LinearParams",
    "Live",
    "Move",
    "Network",
    "Observed",
    "Outcome",
    "Plan",
    "Program",
    "Run",
    "SeedIndexError",
    "SeedLifecycleError",
    "SeedLifecycleState",
    "SeedState",
    "Site",
    "Tolerance",
    "Weights",
    "absorb",
    "activation_variance",
    "advance",
    "apply_event",
    "bare",
    "blend_weights",
    "check_blend",
    "check_kernel",
    "count_faults",
    "count_params",
    "dead_ratio",
    "difference",
    "execute",
    "fault_events",
    "fold_events",
    "forward",
    "forward_batch",
    "gather",
    "gather_weights",
    "health_score",
    "init_linear",
    "init_seeds",
    "kernel_from_function",
    "kernel_id_words",
    "legal_moves",
    "lifecycle_diagram",
    "linear",
    "mean_abs_correlation",
    "mix",
    "observe_health",
    "plan",
    "record_error",
    "record_errors",
    "record_success",
    "run",
    "run_contained",
    "run_site",
    "running",
    "running_seeds",
    "set_alpha",
    "start_ramp",
    "state_digest",
    "transition",
]
