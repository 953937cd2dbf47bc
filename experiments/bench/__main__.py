"""All benchmarks, one after the other: `python -m experiments.bench`.

Each runs in a process of its own, because each pins itself and sets XLA's flags
before jax starts. Options are passed on to every one; `--json FOLDER` says where
their files go.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.bench._command import INTERRUPTED, add_shared

BENCHMARKS = (
    "dormant",
    "active",
    "state",
    "population",
    "graft",
    "pytorch",
    "trust",
    "cache",
    "executor",
    "compile",
    "training",
    "seeds",
    "policy",
    "gym",
)

Start = Callable[[Sequence[str]], int]
"""Runs a command to its end, and gives its exit status; ends it where it is interrupted."""


def start_process(command: Sequence[str]) -> int:
    """Run a command in a process group of its own.

    Ctrl-C then reaches this process alone, which ends the other and has the one word to say.
    """
    return subprocess.run(command, check=False, process_group=0).returncode


def main(argv: Sequence[str] | None = None, start: Start = start_process) -> int:
    """Run from the command line.

    Returns:
        The exit status: 0, 1 where a benchmark failed to run, or 130 after Ctrl-C.

    Raises:
        SystemExit: with status 2, for bad usage.
    """
    parser = argparse.ArgumentParser(prog="experiments.bench", description=__doc__)
    add_shared(parser, "a rough look")
    parser.add_argument("--json", type=Path, default=Path("runs/bench"), help="folder of the files")
    options = parser.parse_args(argv)
    passed = [
        *(["--quick"] if options.quick else []),
        *(["--rounds", str(options.rounds)] if options.rounds else []),
        *(["--cpu-clock"] if options.cpu_clock else []),
    ]
    failed: list[str] = []
    for name in BENCHMARKS:
        file = options.json / f"{name}.json"
        command = [sys.executable, "-m", f"experiments.bench.{name}", *passed, "--json", str(file)]
        try:
            status = start(command)
        except KeyboardInterrupt:
            print(f"experiments.bench: interrupted in {name}", file=sys.stderr)
            return INTERRUPTED
        if status:
            failed.append(name)
    if failed:
        print(f"experiments.bench: failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
