"""Kernels compiled in worker processes, while the process that asks goes on."""

import json
import multiprocessing
import signal
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, InvalidStateError, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any, cast
from weakref import WeakSet

from pebble import ProcessExpired, ProcessPool

from esper.artifacts import read_artifact, trust
from esper.errors import EsperError, KernelCompilationError
from esper.sandbox import signal_name
from esper.tezzeret._jobs import CompileJob, CompileLimits, CompileOutcome
from esper.tezzeret._line import Line, Ticket, program_of
from esper.tezzeret._own_kernel import first_line
from esper.tezzeret._worker import OUT_OF_MEMORY, Done, Task, error_of, prepare, work

_JOIN_SECONDS = 2.0

Progress = Callable[[int, int, CompileOutcome], None]
"""Told after each job: how many are done, how many there are, and what became of this one."""

More = Callable[[int], Iterable[CompileJob]]
"""Asked for more jobs while so many workers have nothing to do; may give none, and is asked again
a tenth of a second later."""


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

    Kernels of one program, which differ in their parameters alone, are made by one worker, because
    each process compiles the program anew; several share them where there are many.

    The workers import the program's main module, as all spawned processes of Python do: guard what
    a script does by `if __name__ == "__main__":`.

    Args:
        workers: how many processes at most; each is an interpreter with jax and torch, about
            500 MB, and starts when there is work for it.
        limits: what each may use.
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
        self._closed = False
        self._calls: WeakSet[_Call] = WeakSet()
        self._cancelling = threading.RLock()  # a signal's handler may cancel, too
        self._workers = [_Worker(self.limits.memory_bytes) for _ in range(workers)]

    def __len__(self) -> int:
        """How many processes it has at most."""
        return len(self._workers)

    def __enter__(self) -> "CompilePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they are at."""
        self._closed = True
        self.cancel()
        for worker in self._workers:
            worker.pool.stop()
        for worker in self._workers:
            worker.pool.join()

    def cancel(self, *, begun: bool = True) -> None:
        """Give up the jobs that are not done; may be called from another thread.

        They are those of every call of `compile` until now, and no later one's. Their outcomes say
        that they were cancelled; workers that are at one are killed.

        Args:
            begun: those too that a worker is at; else these go on to their end, where they have
                one: a job whose worker dies is not tried again.
        """
        with self._cancelling:
            for call in list(self._calls):
                call.cancelled_waiting = True
                call.cancelled_begun = call.cancelled_begun or begun

    def compile(
        self,
        jobs: Iterable[CompileJob],
        *,
        progress: Progress | None = None,
        more: More | None = None,
    ) -> Iterator[CompileOutcome]:
        """Compile jobs, and give what became of each as it is done, which is in no set order.

        Leaving the loop early gives up the rest.

        Args:
            progress: is told after each job.
            more: is asked for further jobs while workers have nothing to do and others have.

        Raises:
            EsperError: where the pool is closed.
        """
        if self._closed:
            raise EsperError(
                "the pool is closed and its workers are gone: make another CompilePool"
            )
        call = _Call()
        with self._cancelling:
            self._calls.add(call)
        return self._compiled(jobs, progress, more, call)

    def _compiled(
        self,
        jobs: Iterable[CompileJob],
        progress: Progress | None,
        more: More | None,
        call: "_Call",
    ) -> Iterator[CompileOutcome]:
        line, free = Line(jobs), list(self._workers)
        asked = len(line)
        running: dict[Any, tuple[_Worker, Ticket]] = {}
        done = 0

        def told(outcome: CompileOutcome) -> CompileOutcome:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, asked, outcome)
            return outcome

        try:
            while line or running:
                if call.cancelled_waiting:
                    for job, attempt in line.take_all():
                        yield told(_cancelled(job, attempt))
                if call.cancelled_begun:
                    for future in running:
                        future.cancel()
                    ready = set(running)
                else:
                    self._give_out(line, free, running)
                    if more is not None and free and not call.cancelled_waiting:
                        for job in more(len(free)):
                            line.add(job)
                            asked += 1
                        self._give_out(line, free, running)
                    ready, _ = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
                    ready |= _broken(running)
                for future in ready:
                    worker, ticket = running.pop(future)
                    free.append(worker)
                    outcome = self._outcome(future, *ticket, call.cancelled_begun)
                    if outcome is None:
                        line.put_back(Ticket(ticket.job, ticket.attempt + 1))
                        continue
                    yield told(outcome)
        finally:
            for future in running:
                future.cancel()

    def _give_out(
        self, line: Line, free: list["_Worker"], running: dict[Any, tuple["_Worker", Ticket]]
    ) -> None:
        # Those first that have a program of the line already.
        for worker in sorted(free, key=lambda worker: not line.holds(worker.program)):
            at = Counter(program_of(ticket.job) for _, ticket in running.values())
            ticket = line.take(worker.program, at)
            if ticket is None:
                continue
            free.remove(worker)
            worker.program = program_of(ticket.job)
            running[self._submit(worker, ticket.job)] = (worker, ticket)

    def _submit(self, worker: "_Worker", job: CompileJob) -> Any:
        task = Task(
            blueprint=job.blueprint.canonical_json(),
            signature=job.signature.model_dump_json(),
            sizes=dict(job.sizes),
            init_seed=job.init_seed,
            ancestor=job.ancestor,
            cpu_seconds=self.limits.cpu_seconds,
            measure=self._measure,
        )
        with _uninterrupted():
            if worker.is_broken and not self._closed:
                worker.renew()
            return worker.pool.schedule(work, args=[task], timeout=self.limits.wall_seconds)

    def _outcome(
        self, future: Any, job: CompileJob, attempt: int, cancelled: bool
    ) -> CompileOutcome | None:
        """What became of a job; None where it is to be tried again."""
        if cancelled and not (future.done() and not future.cancelled()):
            return _cancelled(job, attempt)
        try:
            return _read(job, attempt, future.result())
        except CancelledError:
            return _cancelled(job, attempt)
        except FutureTimeoutError:
            error = KernelCompilationError(
                f"{job}: not compiled within {self.limits.wall_seconds:g} s; its worker was killed."
                " Give it more time, or choose smaller sizes"
            )
            return CompileOutcome(job, None, error, attempt, self.limits.wall_seconds)
        except ProcessExpired as error:
            died = False
            if _is_cpu_limit(error):
                reason = f"it used {self.limits.cpu_seconds} s of processor time, its limit"
            elif error.exitcode == OUT_OF_MEMORY or error.exitcode == -signal.SIGABRT:
                # A library that cannot go on without memory aborts.
                reason = f"it needed more than {self.limits.memory_bytes} bytes, its limit"
            elif attempt <= self.retries:
                return None
            else:
                reason = f"it {_died(error)}, {attempt} times"
                died = True
            told = KernelCompilationError(
                f"{job}: its worker is gone: {reason}. The other jobs go on; see whether the"
                " machine has the memory, or choose smaller sizes"
            )
            return CompileOutcome(job, None, told, attempt, died=died)
        except Exception as error:  # of what brings the job there and the outcome back
            told = EsperError(
                f"{job}: it could not be given to a worker, or what came back could not be read:"
                f" {first_line(error)}"
            )
            return CompileOutcome(job, None, told, attempt)


def _broken(running: dict[Any, tuple["_Worker", Ticket]]) -> set[Any]:
    """The jobs that nobody will tell of any more: they go as those whose process was killed."""
    lost = {future for future, (worker, _) in running.items() if worker.is_broken}
    for future in lost:
        with suppress(InvalidStateError):
            future.set_exception(ProcessExpired("the pool broke", code=-signal.SIGKILL))
    return lost


class _Call:
    """What was cancelled of one call of `compile`."""

    def __init__(self) -> None:
        self.cancelled_waiting = False
        self.cancelled_begun = False


class _Worker:
    """A process, made anew when it dies, and the program that it compiled last."""

    def __init__(self, memory_bytes: int) -> None:
        self.program: Hashable = None
        self._memory_bytes = memory_bytes
        self.pool = self._made()

    def _made(self) -> ProcessPool:
        return ProcessPool(
            max_workers=1,
            # Never fork: jax and obstore have threads.
            context=cast(Any, multiprocessing.get_context("spawn")),
            initializer=prepare,
            initargs=[self._memory_bytes],
        )

    @property
    def is_broken(self) -> bool:
        """Whether what makes its process anew has ended itself.

        The process was then killed just where it was handed something.
        """
        return not self.pool.active

    def renew(self) -> None:
        """Have a process of a new pool from now on."""
        with suppress(Exception):  # whatever is left of the old one
            self.pool.stop()
            self.pool.join(_JOIN_SECONDS)
        self.program = None
        self.pool = self._made()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A while in which workers may start: Ctrl-C is answered after it, and never by them."""
    # It is for the process that asked, which ends its workers. They inherit what is blocked, from
    # the threads too that are made here and make other workers.
    resource_tracker.ensure_running()  # which unblocks it, where the first worker would start it
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.getsignal(signal.SIGINT)
    asked: list[int] = []
    # Another thread may take the signal, and this one then run the handler; a worker that is
    # half made would tell of it.
    here = threading.current_thread() is threading.main_thread() and handler is not None
    if here:
        signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield
    finally:
        if here:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if asked:
            signal.raise_signal(signal.SIGINT)


def _read(job: CompileJob, attempt: int, done: Done) -> CompileOutcome:
    failed = None if done.error is None else error_of(*done.error)
    if done.data is None:
        return CompileOutcome(job, None, failed, attempt, done.seconds, worker=done.worker)
    measurements = tuple(json.loads(text) for text in done.measurements)
    artifact = read_artifact(done.data)
    # A worker of this process's own made it, and its gates ran it.
    trust(artifact)
    return CompileOutcome(job, artifact, failed, attempt, done.seconds, measurements, done.worker)


def _cancelled(job: CompileJob, attempt: int) -> CompileOutcome:
    return CompileOutcome(job, None, EsperError(f"{job}: cancelled"), attempt, cancelled=True)


def _is_cpu_limit(error: ProcessExpired) -> bool:
    return error.exitcode == -signal.SIGXCPU


def _died(error: ProcessExpired) -> str:
    code = error.exitcode
    if code is not None and code < 0:
        return f"died by {signal_name(-code)}"
    return f"ended with status {code}"
