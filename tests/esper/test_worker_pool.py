"""What a worker of a queue needs of its processes: more work while they work, and an end."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from esper.tezzeret import CompilePool
from tests.esper.test_compile_pool import SLOW, _job, _killed_in_a_second, _slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pool():
    with CompilePool(workers=1, retries=0) as workers:
        yield workers


def test_more_is_asked_for_while_somebody_has_nothing_to_do():
    # All while the first is compiled: where nobody has anything to do any more, nobody asks.
    waiting = [[], [_job("gated"), _job("gated", init_seed=1), _job("norm")]]
    asked, told = [], []

    def more(free: int):
        asked.append(free)
        return waiting.pop(0) if waiting else ()

    with CompilePool(workers=2) as pool:
        outcomes = list(
            pool.compile([_job()], progress=lambda *what: told.append(what[:2]), more=more)
        )
    assert {o.job.blueprint.name for o in outcomes} == {"low_rank", "gated", "norm"}
    assert None not in [outcome.artifact for outcome in outcomes]
    assert told[-1] == (4, 4)
    assert asked[0] == 1
    assert set(asked) <= {1, 2}


def test_what_is_not_begun_can_be_given_up_alone(pool):
    (_,) = pool.compile([_job()])
    begun = pool.compile([SLOW, _job("gated"), _job("norm")])
    threading.Timer(0.5, lambda: pool.cancel(begun=False)).start()
    outcomes = {o.job.blueprint.name: o for o in begun}
    assert outcomes["slow"].artifact is not None
    assert not outcomes["slow"].cancelled
    for name in ("gated", "norm"):
        assert outcomes[name].cancelled
        assert str(outcomes[name].error).endswith("cancelled")
    # The next call is another one's; what was begun can still be given up.
    later = pool.compile([_slow(71)])
    threading.Timer(0.5, lambda: (pool.cancel(begun=False), pool.cancel())).start()
    assert [o.cancelled for o in later] == [True]


def test_a_process_that_died_is_told_from_a_blueprint_that_failed(pool):
    with _killed_in_a_second(pool):
        (died,) = pool.compile([SLOW])
    assert died.died
    assert not died.cancelled
    (failed,) = pool.compile([_job("attention")])
    assert failed.error is not None
    assert not failed.died


def _is_there(pid: int) -> bool:
    try:
        # A process that has ended and is not yet asked for is gone as well.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_end_with_who_asked_though_it_is_killed(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, threading\n"
        "from tests.esper.test_compile_pool import SLOW, CompilePool, _job\n"
        "if __name__ == '__main__':\n"
        "    with CompilePool(workers=1) as pool:\n"
        "        (done,) = pool.compile([_job()])\n"
        "        print(done.worker, flush=True)\n"
        "        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "        list(pool.compile([SLOW]))\n"
    )
    path = os.pathsep.join(map(str, (ROOT, ROOT / "functional", ROOT / "adapters")))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -9
    worker = int(done.stdout)
    limit = time.monotonic() + 3.0  # the job takes far longer
    while _is_there(worker):
        assert time.monotonic() < limit, "it goes on though nobody waits for it"
        time.sleep(0.02)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pool_whose_threads_have_ended_is_made_anew():
    """A process that is killed just where it is handed a job takes the pool's threads along."""
    with CompilePool() as pool:
        (first,) = pool.compile([_job()])
        assert first.artifact is not None
        (worker,) = pool._workers
        worker.pool._context.task_queue.put("no task")  # its scheduler ends
        for _ in range(600):
            if worker.is_broken:
                break
            time.sleep(0.05)
        assert worker.is_broken
        (second,) = pool.compile([_job(init_seed=1)])
        assert second.artifact is not None, second.error
