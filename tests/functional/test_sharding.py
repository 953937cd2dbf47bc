"""On several devices: batches, weights and populations that are spread give what one device gives.

The devices are simulated, which takes a process of its own: see sharded_process.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = "--xla_force_host_platform_device_count=4 --xla_cpu_multi_thread_eigen=false"


CASES = {
    "data_parallel",
    "one_bad_example",
    "tensor_parallel",
    "data_and_tensor_parallel",
    "incubation",
    "population",
    "explicit_mesh",
    "explicit_mesh_mapped",
    "shard_map",
}


def run_cases(script: Path) -> dict[str, str]:
    """What became of each case: "" or a traceback."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "functional", "adapters"))
    given = {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# One test, for workers of pytest-xdist would each start a process of their own.
def test_every_case_gives_what_one_device_gives():
    report = run_cases(Path(__file__).with_name("sharded_process.py"))
    assert report.pop("devices") == "4"
    assert report.keys() == CASES
    failed = {name: trace for name, trace in report.items() if trace}
    assert not failed, "\n".join(failed.values())
