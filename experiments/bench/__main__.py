"""All benchmarks, one after the other: `python -m experiments.bench`.

Each runs in a process of its own, because each pins itself and sets XLA's flags
before jax starts. Options are passed on to every one; `--json FOLDER` says where
their files go.
"""

import argparse
import subprocess
import sys
from pathlib import Path

BENCHMARKS = ("dormant", "active", "state", "population", "graft")


def main() -> int:
    """Run from the command line; the number of benchmarks that failed to run."""
    parser = argparse.ArgumentParser(prog="experiments.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a rough look")
    parser.add_argument("--cpu-clock", action="store_true", help="see the benchmarks")
    parser.add_argument("--json", type=Path, default=Path("runs/bench"), help="folder of the files")
    options = parser.parse_args()
    passed = [
        flag
        for flag, given in (("--quick", options.quick), ("--cpu-clock", options.cpu_clock))
        if given
    ]
    failed = 0
    for name in BENCHMARKS:
        file = options.json / f"{name}.json"
        command = [sys.executable, "-m", f"experiments.bench.{name}", *passed, "--json", str(file)]
        failed += subprocess.run(command, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
