"""Two hundred rounds of faults over a whole lab: `python -m experiments.faults`.

Each round one of PostgreSQL, Redis, the service, a worker, what a worker compiles in, or a client
is killed by SIGKILL, or the network between them is stopped for 30 seconds, at a random moment;
every twentieth round all are killed at once. After it clients have to be answered again and all
that waited to be compiled has to be compiled, with nobody's help; then all that any client was
ever answered is looked for, and every kernel that is found is read and its digest compared.

The rounds are those of tests/faults, which is to be there; the gate runs six of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def table(rows: list[dict[str, Any]]) -> str:
    """For each fault: how often it came, and how long it took until all went on."""
    by_fault: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_fault[row["fault"]].append(row)
    lines = [
        "| fault | rounds | answered again after, s | at most | all compiled after, s | at most |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for fault, own in sorted(by_fault.items()):
        answered = [row["answered_after"] for row in own]
        compiled = [row["compiled_after"] for row in own]
        lines.append(
            f"| {fault} | {len(own)} | {statistics.median(answered):.1f} | {max(answered):.1f} |"
            f" {statistics.median(compiled):.1f} | {max(compiled):.1f} |"
        )
    if rows:
        last = rows[-1]
        lines.append("")
        lines.append(
            f"{len(rows)} rounds; clients were answered for {last['kernel']} kernels,"
            f" {last['outcome']} outcomes, {last['message']} messages and {last['blueprint']}"
            " blueprints, and all of it was found after every round."
        )
    return "\n".join(lines)


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    asked.add_argument("--rounds", type=int, default=200)
    asked.add_argument("--seed", type=int, default=7)
    asked.add_argument("--cut-seconds", type=float, default=30.0, help="of a network that stops")
    asked.add_argument("--out", type=Path, default=Path("runs/faults.jsonl"))
    given = asked.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("")
    environment = {
        **os.environ,
        "FAULTS_ROUNDS": str(given.rounds),
        "FAULTS_SEED": str(given.seed),
        "FAULTS_CUT_SECONDS": str(given.cut_seconds),
        "FAULTS_TABLE": str(given.out.absolute()),
    }
    command = [sys.executable, "-m", "pytest", "tests/faults/test_faults.py", "-q", "-x"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    rows = [json.loads(line) for line in given.out.read_text().splitlines()]
    print(table(rows))
    if done.returncode:
        print(f"round {len(rows) + 1} of {given.rounds} failed: what it said stands above")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
