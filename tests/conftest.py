"""What every test runs under: strict dtype promotion, fixed seeds, one thread."""

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

# Of a shell that put the tests into the background; what they start is to hear Ctrl-C all the same.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What commands print is asked for: it must not depend on the window, or the wish for colours, of
# whoever runs the tests. Consoles look when they are imported, which is after this.
for _name in (
    *("COLUMNS", "LINES", "TERMINAL_WIDTH", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),
    *("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"),
):
    os.environ.pop(_name, None)

# Verdicts on kernels are remembered here, and not in the home of whoever runs the tests. The folder
# is removed by the process that made it, and not by workers, nor by tests that a test runs.
if "ESPER_CACHE_DIR" not in os.environ:
    os.environ["ESPER_CACHE_DIR"] = tempfile.mkdtemp(prefix="esper-tests-")
    atexit.register(shutil.rmtree, os.environ["ESPER_CACHE_DIR"], ignore_errors=True)

# Tests compile much and run it a few times: machine code that is not optimised takes half their
# time. Laws that are exact to the bit are tried with the compiler as users have it too, by
# test_default_compiler.py, and all are with XLA_FLAGS= (empty).
QUICK_XLA = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if jax.__version_info__[:2] == (0, 10):  # XLA aborts the process for a flag that it does not know
    os.environ.setdefault("XLA_FLAGS", QUICK_XLA)

# Tracing makes many small objects, and jax is called at each collection: Python's own thresholds,
# which are for smaller heaps, take a sixth of the time.
gc.set_threshold(20_000, 20, 20)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "allow")

_COMMON = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}
# Each example of most laws compiles or traces; `--hypothesis-profile=thorough` looks further.
settings.register_profile("esper", max_examples=20, **_COMMON)
settings.register_profile("thorough", max_examples=200, **_COMMON)
settings.load_profile("esper")


def pytest_report_header() -> list[str]:
    compiler = os.environ.get("XLA_FLAGS") or "as users have it"
    return [
        "seeds: fixed (hypothesis derandomised, numpy and jax keys written in the tests)",
        f"XLA: {compiler}",
    ]


_MOST_MEMORY = 3 << 30
"""Bytes of a worker beyond which it forgets what it compiled."""


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory() -> Iterator[None]:
    yield
    status = Path("/proc/self/statm")
    if status.exists() and int(status.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") > (
        _MOST_MEMORY
    ):
        jax.clear_caches()
        gc.unfreeze()
    gc.collect()
    # What is left is mostly what was imported and traced: later collections need not go through it.
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Two cores shared by several workers: more threads only wait for each other.
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
