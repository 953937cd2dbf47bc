"""Kernels compiled in worker processes, while the process that asks goes on."""

import json
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, cast

from pebble import ProcessExpired, ProcessPool

from esper.artifacts import read_artifact, trust
from esper.errors import EsperError, KernelCompilationError
from esper.tezzeret._jobs import CompileJob, CompileLimits, CompileOutcome
from esper.tezzeret._worker import OUT_OF_MEMORY, Done, Task, error_of, prepare, work

Progress = Callable[[int, int, CompileOutcome], None]
"""Told after each job: how many are done, how many there are, and what became of this one."""


class CompilePool:
    """Compiles kernels in spawned worker processes, under limits.

    ```python
    with CompilePool(workers=2) as pool:
        for outcome in pool.compile(jobs):
            if outcome.artifact is not None:
                library.put(outcome.artifact)
    ```

    A worker that dies, runs out of memory or exceeds a limit takes its job down and nothing else:
    the job's outcome has the error, and the rest goes on in a new worker. A job whose worker died
    is given to another one, up to `retries` times; one that reached its time limit is not.

    The workers import the program's main module, as all spawned processes of Python do: guard what
    a script does by `if __name__ == "__main__":`.

    Args:
        workers: how many processes; each is an interpreter with jax and torch, about 500 MB.
        limits: what each may use for one job.
        retries: how often a job is tried again whose worker died.
        measure: backends ("torch", "jax") on which each kernel is timed after it was compiled, in
            its worker. Workers that run beside each other disturb each other's timings.

    Raises:
        ValueError: for fewer than one worker, or less than no retry.
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        limits: CompileLimits | None = None,
        retries: int = 1,
        measure: Sequence[str] = (),
    ) -> None:
        if workers < 1 or retries < 0:
            raise ValueError(
                f"a pool has at least 1 worker and 0 retries; got {workers} and {retries}"
            )
        self.limits = limits or CompileLimits()
        self.retries = retries
        self._measure = tuple(measure)
        self._cancelled = threading.Event()
        self._pool = ProcessPool(
            max_workers=workers,
            # Never fork: jax and obstore have threads.
            context=cast(Any, multiprocessing.get_context("spawn")),
            initializer=_start,
            initargs=[self.limits.memory_bytes],
        )

    def __enter__(self) -> "CompilePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they are at."""
        self._cancelled.set()
        self._pool.stop()
        self._pool.join()

    def cancel(self) -> None:
        """Give up the jobs that are not done; may be called from another thread.

        Their outcomes say that they were cancelled; workers that are at one are killed.
        """
        self._cancelled.set()

    def compile(
        self, jobs: Iterable[CompileJob], *, progress: Progress | None = None
    ) -> Iterator[CompileOutcome]:
        """Compile jobs, and give what became of each as it is done, which is in no set order.

        Leaving the loop early gives up the rest.

        Args:
            progress: is told after each job.
        """
        self._cancelled.clear()
        asked = list(jobs)
        waiting: dict[Any, tuple[CompileJob, int]] = {}
        done = 0
        try:
            for job in asked:
                waiting[self._submit(job)] = (job, 1)
            while waiting:
                ready, _ = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
                if self._cancelled.is_set():
                    for future in waiting:
                        future.cancel()
                    ready = set(waiting)
                for future in ready:
                    job, attempt = waiting.pop(future)
                    outcome = self._outcome(future, job, attempt)
                    if outcome is None:
                        waiting[self._submit(job)] = (job, attempt + 1)
                        continue
                    done += 1
                    if progress is not None:
                        progress(done, len(asked), outcome)
                    yield outcome
        finally:
            for future in waiting:
                future.cancel()

    def _submit(self, job: CompileJob) -> Any:
        task = Task(
            blueprint=job.blueprint.canonical_json(),
            signature=job.signature.model_dump_json(),
            sizes=dict(job.sizes),
            init_seed=job.init_seed,
            ancestor=job.ancestor,
            cpu_seconds=self.limits.cpu_seconds,
            measure=self._measure,
        )
        return self._pool.schedule(work, args=[task], timeout=self.limits.wall_seconds)

    def _outcome(self, future: Any, job: CompileJob, attempt: int) -> CompileOutcome | None:
        """What became of a job; None where it is to be tried again."""
        if self._cancelled.is_set() and not (future.done() and not future.cancelled()):
            return CompileOutcome(job, None, EsperError(f"{job}: cancelled"), attempt)
        try:
            done: Done = future.result()
        except CancelledError:
            return CompileOutcome(job, None, EsperError(f"{job}: cancelled"), attempt)
        except FutureTimeoutError:
            error = KernelCompilationError(
                f"{job}: not compiled within {self.limits.wall_seconds:g} s; its worker was killed."
                " Give it more time, or choose smaller sizes"
            )
            return CompileOutcome(job, None, error, attempt, self.limits.wall_seconds)
        except ProcessExpired as error:
            if _is_cpu_limit(error):
                reason = f"it used {self.limits.cpu_seconds} s of processor time, its limit"
            elif error.exitcode == OUT_OF_MEMORY or error.exitcode == -signal.SIGABRT:
                # A library that cannot go on without memory aborts.
                reason = f"it needed more than {self.limits.memory_bytes} bytes, its limit"
            elif attempt <= self.retries:
                return None
            else:
                reason = f"it {_died(error)}, {attempt} times"
            told = KernelCompilationError(
                f"{job}: its worker is gone: {reason}. The other jobs go on; see whether the"
                " machine has the memory, or choose smaller sizes"
            )
            return CompileOutcome(job, None, told, attempt)
        if done.error is not None:
            return CompileOutcome(job, None, error_of(*done.error), attempt, done.seconds)
        assert done.data is not None
        measurements = tuple(json.loads(text) for text in done.measurements)
        artifact = read_artifact(done.data)
        # A worker of this process's own made it, and its gates ran it.
        trust(artifact)
        return CompileOutcome(job, artifact, None, attempt, done.seconds, measurements)


def _start(memory_bytes: int) -> None:
    # Ctrl-C is for the process that asked; it ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare(memory_bytes)


def _is_cpu_limit(error: ProcessExpired) -> bool:
    return error.exitcode == -signal.SIGXCPU


def _died(error: ProcessExpired) -> str:
    code = error.exitcode
    if code is not None and code < 0:
        return f"died by {signal.Signals(-code).name}"
    return f"ended with status {code}"
