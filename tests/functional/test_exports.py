"""The public face of the core, name by name."""

import ast
import inspect
from pathlib import Path

import pytest

import esper_functional

PROMISED = {
    "Kernel",
    "SeedLifecycleState",
    "SeedState",
    "execute",
    "fold_events",
    "init_seeds",
    "observe_health",
    "plan",
    "record_error",
    "record_success",
    "set_alpha",
    "transition",
}
"""What the design lists under the names that users type."""

FULL = [
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


def _order(name: str) -> tuple[int, str]:
    # Constants, then classes, then functions, as ruff sorts `__all__`.
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, name


def test_every_promised_name_is_exported():
    assert set(esper_functional.__all__) >= PROMISED


def test_nothing_is_exported_by_accident():
    assert sorted(esper_functional.__all__) == sorted(FULL)


def test_all_is_sorted_and_without_repetition():
    assert esper_functional.__all__ == sorted(set(esper_functional.__all__), key=_order)


@pytest.mark.parametrize("name", FULL)
def test_every_name_resolves(name):
    assert getattr(esper_functional, name) is not None


@pytest.mark.parametrize(
    "name", [n for n in FULL if inspect.isroutine(getattr(esper_functional, n, None))]
)
def test_every_function_has_a_docstring(name):
    assert inspect.getdoc(getattr(esper_functional, name))


def test_every_module_imports_the_standard_library_numpy_and_jax_alone():
    allowed = {"collections", "dataclasses", "difflib", "enum", "functools", "hashlib", "types"}
    allowed |= {"typing", "numpy", "jax", "jaxtyping", "esper_functional"}
    folder = Path(inspect.getfile(esper_functional)).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots = {(node.module or "").split(".")[0]}
            else:
                continue
            assert roots <= allowed, file.name
