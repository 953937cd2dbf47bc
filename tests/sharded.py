"""Tests on several devices: these are simulated, which takes a process of its own."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
FLAGS = "--xla_force_host_platform_device_count=4 --xla_cpu_multi_thread_eigen=false"


def report_cases(cases: Mapping[str, Callable[[], None]]) -> None:
    """In the process with four devices: run all cases and print what became of each."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    report: dict[str, str] = {"devices": str(len(jax.devices()))}
    for name, case in cases.items():
        try:
            case()
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
    json.dump(report, sys.stdout)


def assert_cases_pass(script: Path, cases: Collection[str]) -> None:
    """In the test: start a script that reports these cases, and look at what it found."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "functional", "adapters"))
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    given = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.pop("devices") == "4"
    assert report.keys() == set(cases), list(report)
    failed = {name: trace for name, trace in report.items() if trace}
    assert not failed, "\n".join(failed.values())
