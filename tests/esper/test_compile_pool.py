"""Compilation in worker processes: real ones, which are killed, starved and told to stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from esper.contracts import KernelSignature
from esper.errors import BlueprintError, KernelCompilationError
from esper.tezzeret import (
    CompileJob,
    CompileLimits,
    CompilePool,
    compile_blueprint,
    load_blueprint,
    parse_blueprint,
)
from esper.urza import Library

SIGNATURE = KernelSignature(input_shape=(3,), output_shape=(4,))


def _job(name: str = "low_rank", **more) -> CompileJob:
    return CompileJob(load_blueprint(name), SIGNATURE, **more)


def _slow(layers: int) -> CompileJob:
    """A job of many seconds, most of them inside of XLA."""
    nodes = "".join(
        f"  - {{name: n{i}, op: linear, features: in, inputs: [{f'n{i - 1}' if i else 'x'}]}}\n"
        for i in range(layers)
    )
    head = "schema_version: 2\nname: slow\nsummary: long to compile\nbirth: free\nnodes:\n"
    text = f"{head}{nodes}output: n{layers - 1}\n"
    signature = KernelSignature(input_shape=(4,), output_shape=(4,))
    return CompileJob(parse_blueprint(text, "the test"), signature)


SLOW = _slow(70)


@pytest.fixture(scope="module")
def pool():
    with CompilePool(workers=1) as workers:
        yield workers


def test_a_batch_goes_on_where_one_of_its_jobs_fails_and_its_bytes_are_those_made_here(pool):
    dead = parse_blueprint(
        load_blueprint("low_rank").canonical_json().decode().replace('"zeros"', '"fan_in"'),
        "a blueprint that lies about its birth",
    )
    jobs = [
        _job(),
        CompileJob(dead, SIGNATURE),
        _job(init_seed=5),
        _job(sizes={"rnk": 3}),
        _job("attention"),
        _job("gated", sizes={"width": 4}),
    ]
    told = []
    outcomes = {
        id(o.job): o for o in pool.compile(jobs, progress=lambda *what: told.append(what[:2]))
    }
    assert told == [(i, 6) for i in range(1, 7)]
    first, lies, seeded, unknown, misfit, gated = (outcomes[id(job)] for job in jobs)
    for job, outcome in ((jobs[0], first), (jobs[2], seeded), (jobs[5], gated)):
        here = compile_blueprint(
            job.blueprint, job.signature, sizes=job.sizes, init_seed=job.init_seed
        )
        assert outcome.artifact is not None
        assert outcome.artifact.data == here.data
        assert outcome.error is None
        assert outcome.attempts == 1
    assert isinstance(lies.error, KernelCompilationError)
    assert "claims to be born zero" in str(lies.error)
    assert isinstance(unknown.error, BlueprintError)
    assert "has no size rnk" in str(unknown.error)
    assert isinstance(misfit.error, BlueprintError)
    assert {o.artifact for o in (lies, unknown, misfit)} == {None}


def test_kernels_of_one_program_are_made_by_one_worker():
    jobs = [_job(name, init_seed=seed) for seed in range(3) for name in ("low_rank", "gated")]
    with CompilePool(workers=3) as pool:
        outcomes = list(pool.compile(jobs))
        # And by the same one when they are asked for again.
        outcomes += pool.compile(list(reversed(jobs)))
    assert len(outcomes) == 12
    assert None not in [outcome.artifact for outcome in outcomes]
    by_program = {(o.job.blueprint.name, o.worker) for o in outcomes}
    assert len(by_program) == len({worker for _, worker in by_program}) == 2


def _workers() -> set[int]:
    """The processes of this one that are compile workers."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (entry / "cmdline").read_bytes()
        except (OSError, IndexError, ValueError):
            continue
        if parent == os.getpid() and b"spawn_main" in command:
            found.add(int(entry.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes under /proc")
def test_a_worker_that_is_killed_costs_its_job_a_try_and_no_more():
    others = _workers()
    with CompilePool(workers=1, retries=1) as workers:
        next(iter(workers.compile([_job()])))  # it has begun
        (first,) = _workers() - others
        threading.Timer(1.0, os.kill, (first, signal.SIGKILL)).start()
        outcomes = {o.job.blueprint.name: o for o in workers.compile([SLOW, _job("gated")])}
    assert outcomes["gated"].artifact is not None
    slow = outcomes["slow"]
    assert slow.artifact is not None
    assert slow.attempts == 2


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes under /proc")
def test_a_job_whose_workers_keep_dying_is_given_up_and_the_rest_goes_on():
    others = _workers()
    with CompilePool(workers=1, retries=0) as workers:
        next(iter(workers.compile([_job()])))
        (first,) = _workers() - others
        threading.Timer(1.0, os.kill, (first, signal.SIGKILL)).start()
        outcomes = {o.job.blueprint.name: o for o in workers.compile([SLOW, _job("gated")])}
    assert isinstance(outcomes["slow"].error, KernelCompilationError)
    assert "its worker is gone: it died by SIGKILL, 1 times" in str(outcomes["slow"].error)
    assert outcomes["gated"].artifact is not None


def test_a_job_that_takes_too_long_is_killed_and_the_rest_goes_on():
    with CompilePool(workers=1, limits=CompileLimits(wall_seconds=4.0)) as workers:
        next(iter(workers.compile([_job()])))
        outcomes = {o.job.blueprint.name: o for o in workers.compile([_slow(250), _job()])}
    assert "not compiled within 4 s; its worker was killed" in str(outcomes["slow"].error)
    assert outcomes["low_rank"].artifact is not None


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_job_that_takes_too_much_processor_time_is_killed():
    with CompilePool(workers=1, limits=CompileLimits(cpu_seconds=1)) as workers:
        (outcome,) = workers.compile([SLOW])
    assert "it used 1 s of processor time, its limit" in str(outcome.error)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_job_that_takes_too_much_memory_fails_and_the_rest_goes_on():
    large = CompileJob(
        load_blueprint("norm"), KernelSignature(input_shape=(16_000,), output_shape=(16_000,))
    )
    with CompilePool(workers=1, limits=CompileLimits(memory_bytes=2 << 30), retries=0) as workers:
        outcomes = {o.job.blueprint.name: o for o in workers.compile([large, _job()])}
    assert "it needed more than 2147483648 bytes, its limit" in str(outcomes["norm"].error)
    assert outcomes["norm"].artifact is None
    assert outcomes["low_rank"].artifact is not None


def test_what_is_cancelled_says_so_and_its_worker_is_gone():
    with CompilePool(workers=1) as workers:
        next(iter(workers.compile([_job()])))
        threading.Timer(0.5, workers.cancel).start()
        begun = time.monotonic()
        outcomes = list(workers.compile([SLOW, _job("gated")]))
        assert {str(o.error) for o in outcomes} == {
            "slow 4->4 float32, seed 0: cancelled",
            "gated 3->4 float32, seed 0: cancelled",
        }
        assert time.monotonic() - begun < 60
        # The pool is as good as new.
        (again,) = workers.compile([_job("gated")])
        assert again.artifact is not None


def test_measurements_come_with_the_kernel_and_lie_beside_it(tmp_path: Path):
    library = Library(tmp_path / "library")
    with CompilePool(workers=1, measure=("torch", "abacus", "jax")) as workers:
        (outcome,) = workers.compile([_job()])
    # One that fails costs neither the kernel nor the others.
    assert "unknown backend 'abacus'" in str(outcome.error)
    assert outcome.artifact is not None
    library.put(outcome.artifact)
    for measurement in outcome.measurements:
        library.record_measurement(measurement)
    kept = library.measurements(outcome.artifact.kernel_id)
    assert [m["backend"] for m in kept] == ["jax", "torch"]
    for measurement in kept:
        assert measurement["forward_us"] > 0.0
        assert measurement["size_bytes"] == len(outcome.artifact.data)
        assert measurement["memory_bytes"] > 0
    # Measured again, the newer one counts.
    library.record_measurement({**kept[0], "forward_us": 1.5})
    again = library.measurements(outcome.artifact.kernel_id)
    assert [m["forward_us"] for m in again] == [1.5, kept[1]["forward_us"]]


def test_ctrl_c_ends_the_workers(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, threading\n"
        "from tests.esper.test_compile_pool import SLOW, CompilePool, _job\n"
        "if __name__ == '__main__':\n"
        "    with CompilePool(workers=1) as pool:\n"
        "        next(iter(pool.compile([_job()])))\n"
        "        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "        list(pool.compile([SLOW]))\n"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (root, root / "functional", root / "adapters")))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGINT or "KeyboardInterrupt" in done.stderr


@pytest.mark.parametrize(
    "make",
    [
        lambda: CompilePool(workers=0),
        lambda: CompilePool(retries=-1),
        lambda: CompileLimits(wall_seconds=0.0),
        lambda: CompileLimits(memory_bytes=-1),
    ],
)
def test_limits_that_are_none(make):
    with pytest.raises(
        ValueError, match=r"at least 1 worker|must be positive, got|at least 1\.5 GiB"
    ):
        make()
