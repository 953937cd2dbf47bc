"""A worker is killed at any moment: no blueprint is lost, and no half kernel is found.

The moments are those at which the library is seen to be in some state, and random ones. How many
rounds: `KILLED_ROUNDS`, by default 5.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from esper.contracts import BlueprintQuery, BlueprintState
from esper.tezzeret import CompileJob, load_blueprint
from esper.tezzeret.service import request_of
from esper.urza import Library
from tests.esper.test_cli import ENVIRONMENT
from tests.esper.test_cli_worker import SIGNATURE
from tests.esper.test_worker_parts import until

ROUNDS = int(os.environ.get("KILLED_ROUNDS", "5"))
ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 240.0

# The smallest process that is a worker: that of the command imports much besides.
SCRIPT = """
import sys
from esper.tezzeret.service import QueueWorker
from esper.urza import Library
if __name__ == "__main__":
    QueueWorker(Library(sys.argv[1], max_attempts=1000), sys.argv[2], lease_seconds=2.0).run()
"""


class Workers:
    """One that works, and one that takes over when it is killed, because a start takes seconds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._script = folder / "script.py"
        self._script.write_text(SCRIPT)
        path = os.pathsep.join(map(str, (ROOT, ROOT / "functional", ROOT / "adapters")))
        self._environment = {**ENVIRONMENT, "PYTHONPATH": path}
        self._number = 0
        self.running = [self._started(), self._started()]

    def _started(self) -> subprocess.Popen[bytes]:
        self._number += 1
        name = f"worker-{self._number}"
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(self._script), str(self._folder / "library"), name],
                stdout=log,
                stderr=log,
                env=self._environment,
            )

    def kill(self, which: int) -> None:
        """SIGKILL to one of them, which another one follows."""
        worker = self.running.pop(which)
        assert worker.poll() is None, (self._folder / "log").read_text()
        worker.send_signal(signal.SIGKILL)
        worker.wait(60)
        self.running.append(self._started())

    def kill_compilers(self) -> None:
        """SIGKILL to all processes that compile, and none to the workers."""
        for worker in self.running:
            for pid in _children(worker.pid):
                if b"spawn_main" in _command(pid):
                    os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        for worker in self.running:
            worker.kill()
            worker.wait(60)


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def _command(pid: int) -> bytes:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes() if path.exists() else b""


def _states(library: Library, ids: list[str]) -> list[BlueprintState]:
    return [library.blueprint(each).state for each in ids]


def _is_claimed(library: Library, ids: list[str], kernels: int) -> bool:
    return BlueprintState.UNVALIDATED not in _states(library, ids)


def _is_put(library: Library, ids: list[str], kernels: int) -> bool:
    return len(library.find()) > kernels


def _is_completed(library: Library, ids: list[str], kernels: int) -> bool:
    return BlueprintState.VALIDATED in _states(library, ids)


MOMENTS: dict[str, Callable[[Library, list[str], int], bool]] = {
    "claimed": _is_claimed,
    "put": _is_put,
    "completed": _is_completed,
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_may_be_killed_at_any_moment(tmp_path):
    draws = random.Random(20)
    # A worker that is killed costs what it held an attempt; unlucky ones may be held by several.
    library = Library(tmp_path / "library", max_attempts=1000)
    workers = Workers(tmp_path)
    asked: list[str] = []
    try:
        for number in range(ROUNDS):
            kernels = len(library.find())
            ids = [
                library.submit(
                    request_of(
                        CompileJob(load_blueprint("low_rank"), SIGNATURE, {}, 10 * number + seed)
                    )
                ).blueprint_id
                for seed in range(3)
            ]
            asked += ids
            moment = draws.choice([*MOMENTS, "random", "compiler"])
            seen = MOMENTS.get(moment)
            if seen is not None:
                until(partial(seen, library, ids, kernels), PATIENCE_SECONDS)
            else:
                time.sleep(draws.uniform(0.0, 1.0))
            if moment == "compiler":
                workers.kill_compilers()
            else:
                # The one that has it is not known; the first was there for longest.
                workers.kill(draws.choice([0, 0, 1]))
            _check(library)
        # Whoever is left does what is left.
        done = [BlueprintState.VALIDATED] * len(asked)
        until(lambda: _states(library, asked) == done, PATIENCE_SECONDS)
    finally:
        workers.end()
    _check(library)
    assert len({library.blueprint(each).kernel_id for each in asked}) == len(asked)
    assert len(library.find()) == len(asked)
    library.close()


def _check(library: Library) -> None:
    """What is found is whole, and what is VALIDATED is found."""
    found = {record.kernel_id for record in library.find()}
    for kernel_id in found:
        assert library.get(kernel_id).kernel_id == kernel_id
    for record in library.blueprints(BlueprintQuery(limit=1000)).items:
        assert record.state is not BlueprintState.INVALID, record.reason
        if record.state is BlueprintState.VALIDATED:
            assert library.record(str(record.kernel_id)).kernel_id == record.kernel_id
