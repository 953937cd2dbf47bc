"""Compilation in worker processes: real ones, which are killed, starved and told to stop."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pebble import ProcessExpired

from esper.contracts import KernelSignature
from esper.errors import (
    ArtifactError,
    BlueprintError,
    EsperError,
    InputError,
    KernelCompilationError,
)
from esper.tezzeret import (
    CompileJob,
    CompileLimits,
    CompilePool,
    compile_blueprint,
    load_blueprint,
    parse_blueprint,
)
from esper.tezzeret._pool import _died
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


# A worker takes seconds to start, and one that is killed is followed by another: most tests share
# one of these two.


@pytest.fixture(scope="module")
def pool():
    with CompilePool(workers=1, limits=CompileLimits(memory_bytes=3 << 30)) as workers:
        yield workers


@pytest.fixture(scope="module")
def strict():
    limits = CompileLimits(wall_seconds=4.0)
    with CompilePool(workers=1, retries=0, limits=limits) as workers:
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
        _job(init_seed=-1),
        _job(sizes={"rank": "3"}),
        _job(sizes={"rank": [3]}),
        _job(ancestor=5),
        _job(ancestor=threading.Lock()),
    ]
    told = []
    outcomes = {
        id(o.job): o for o in pool.compile(jobs, progress=lambda *what: told.append(what[:2]))
    }
    assert told == [(i, 11) for i in range(1, 12)]
    first, lies, seeded, unknown, misfit, gated, *others = (outcomes[id(job)] for job in jobs)
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
    for outcome, (kind, message) in zip(
        others,
        [
            (InputError, "`init_seed` must be an integer from 0 on, got -1"),
            (BlueprintError, "rank must be an integer from 1 to 1048576, got '3'"),
            (BlueprintError, "rank must be an integer from 1 to 1048576, got .3."),
            # What nobody foresaw costs its job alone, in the worker and on the way to it.
            (ArtifactError, "these parts are no kernel artifact: 1 validation error"),
            (EsperError, "it could not be given to a worker, or what .*TypeError: cannot pickle"),
        ],
        strict=True,
    ):
        assert type(outcome.error) is kind
        assert re.search(message, str(outcome.error))
    assert {o.artifact for o in (lies, unknown, misfit, *others)} == {None}


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


@contextmanager
def _killed_in_a_second(workers: CompilePool) -> Iterator[None]:
    """The one worker of a pool, which has begun."""
    (outcome,) = workers.compile([_job()])
    assert outcome.worker is not None
    timer = threading.Timer(1.0, os.kill, (outcome.worker, signal.SIGKILL))
    timer.start()
    yield
    timer.join()


def test_a_worker_that_is_killed_costs_its_job_a_try_and_no_more(pool):
    with _killed_in_a_second(pool):
        outcomes = {o.job.blueprint.name: o for o in pool.compile([SLOW, _job("gated")])}
    assert outcomes["gated"].artifact is not None
    slow = outcomes["slow"]
    assert slow.artifact is not None
    assert slow.attempts == 2


def test_a_job_whose_workers_keep_dying_is_given_up_and_the_rest_goes_on(strict):
    with _killed_in_a_second(strict):
        outcomes = {o.job.blueprint.name: o for o in strict.compile([SLOW, _job()])}
    assert isinstance(outcomes["slow"].error, KernelCompilationError)
    assert "its worker is gone: it died by SIGKILL, 1 times" in str(outcomes["slow"].error)
    assert outcomes["low_rank"].artifact is not None


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (-signal.SIGSEGV, "died by SIGSEGV"),
        (-40, "died by signal 40"),
        (3, "ended with status 3"),
        (None, "ended with status None"),
    ],
)
def test_what_a_worker_died_of_has_a_name_or_a_number(code, told):
    assert _died(ProcessExpired("gone", code=code)) == told


def test_a_job_that_takes_too_long_is_killed_and_the_rest_goes_on(strict):
    outcomes = {o.job.blueprint.name: o for o in strict.compile([_slow(250), _job()])}
    assert "not compiled within 4 s; its worker was killed" in str(outcomes["slow"].error)
    assert outcomes["low_rank"].artifact is not None


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_job_that_takes_too_much_processor_time_is_killed():
    with CompilePool(workers=1, limits=CompileLimits(cpu_seconds=1)) as workers:
        (outcome,) = workers.compile([SLOW])
    assert "it used 1 s of processor time, its limit" in str(outcome.error)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_job_that_takes_too_much_memory_fails_and_the_rest_goes_on(pool):
    large = CompileJob(
        load_blueprint("norm"), KernelSignature(input_shape=(16_000,), output_shape=(16_000,))
    )
    outcomes = {o.job.blueprint.name: o for o in pool.compile([large, _job()])}
    assert "it needed more than 3221225472 bytes, its limit" in str(outcomes["norm"].error)
    assert outcomes["norm"].artifact is None
    assert outcomes["norm"].attempts == 1
    assert outcomes["low_rank"].artifact is not None


def test_what_is_cancelled_says_so_and_its_worker_is_gone(pool):
    (before,) = pool.compile([_job()])
    threading.Timer(0.5, pool.cancel).start()
    outcomes = list(pool.compile([SLOW, _job("gated")]))
    assert {str(o.error) for o in outcomes} == {
        "slow 4->4 float32, seed 0: cancelled",
        "gated 3->4 float32, seed 0: cancelled",
    }
    # The pool is as good as new.
    (again,) = pool.compile([_job("gated")])
    assert again.artifact is not None
    assert again.worker != before.worker


def test_cancel_gives_up_what_was_asked_for_until_then_and_nothing_later(pool):
    one, other = pool.compile([SLOW]), pool.compile([SLOW])
    pool.cancel()
    later = pool.compile([_job()])
    for asked in (one, other):
        (outcome,) = asked
        assert str(outcome.error) == "slow 4->4 float32, seed 0: cancelled"
        # That another call goes on takes nothing back.
        for kept in later:
            assert kept.artifact is not None


def test_a_closed_pool_says_that_it_is():
    with CompilePool(workers=1) as workers:
        asked = workers.compile([_job()])
    assert [str(o.error) for o in asked] == ["low_rank 3->4 float32, seed 0: cancelled"]
    with pytest.raises(EsperError, match=r"the pool is closed .*: make another CompilePool"):
        workers.compile([_job()])


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
