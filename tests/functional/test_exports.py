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
    "DEAD_BELOW",
    "EMA_FACTOR",
    "FAILURES_TO_RECOVERY",
    "LEGAL",
    "MOVES",
    "NO_PROGRAM",
    "NO_SLOT",
    "PADDING_MODES",
    "STATISTICS",
    "TOLERANCES",
    "Affine",
    "Array",
    "AttentionParams",
    "Bank",
    "BatchNormParams",
    "BatchStats",
    "Blend",
    "BlendError",
    "BlendWeights",
    "Collecting",
    "Conv2dParams",
    "DerivativeError",
    "Difference",
    "Event",
    "EventKind",
    "FoldError",
    "Grafted",
    "HealthStatistics",
    "HostCall",
    "KasminaException",
    "Kernel",
    "KernelIdError",
    "KernelMismatchError",
    "Layer",
    "LayerNormParams",
    "LayerShapeError",
    "LinearParams",
    "Live",
    "Move",
    "Network",
    "Observed",
    "Outcome",
    "PaddingMode",
    "Params",
    "Plan",
    "Program",
    "RampShape",
    "Run",
    "SeedIndexError",
    "UncalledSiteWarning",
    "SeedLifecycleError",
    "SeedLifecycleState",
    "SeedState",
    "Site",
    "Tolerance",
    "Weights",
    "absorb",
    "activation_variance",
    "advance",
    "affine_form",
    "affine_of",
    "apply_event",
    "attention",
    "bank_kernels",
    "bare",
    "batch_norm",
    "blend_weights",
    "check_blend",
    "check_kernel",
    "conv2d",
    "count_faults",
    "count_params",
    "dead_ratio",
    "difference",
    "execute",
    "fault_events",
    "fold_events",
    "fold_linear",
    "forward",
    "forward_batch",
    "forward_dynamic",
    "gather",
    "gather_shadows",
    "gather_weights",
    "health_score",
    "host_call",
    "incubate",
    "init_attention",
    "init_batch_norm",
    "init_conv2d",
    "init_layer_norm",
    "init_linear",
    "init_seeds",
    "init_statistics",
    "kernel_from_function",
    "kernel_id_words",
    "layer_norm",
    "legal_moves",
    "lifecycle_diagram",
    "lift",
    "linear",
    "make_bank",
    "mean_abs_correlation",
    "measure_health",
    "mix",
    "observe_health",
    "observe_latency",
    "observe_statistics",
    "plan",
    "put_kernel",
    "record_error",
    "record_errors",
    "record_faults",
    "record_success",
    "release",
    "reweigh",
    "scatter",
    "run",
    "run_contained",
    "run_site",
    "running",
    "running_seeds",
    "seeded",
    "set_alpha",
    "shadow_dynamic",
    "shadow_forward",
    "shadow_forward_batch",
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
    allowed = {
        "collections",
        "dataclasses",
        "difflib",
        "enum",
        "functools",
        "hashlib",
        "math",
        "types",
        "warnings",
    }
    allowed |= {"typing", "numpy", "jax", "jaxtyping", "esper_functional"}
    folder = Path(inspect.getfile(esper_functional)).parent
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots = {(node.module or "").split(".")[0]}
            else:
                continue
            assert roots <= allowed, file.name
