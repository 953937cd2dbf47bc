"""Several processes that share the seeds of a comparison."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event as Flag
from pathlib import Path

from esper.errors import EsperError, Interrupted
from esper.tolaria.comparison._asked import Comparison
from esper.tolaria.comparison._seed import Tell, run_seed

_LOOK = 0.2
"""Seconds between two looks at whether to stop."""


def share_seeds(
    folder: Path, asked: Comparison, workers: int, stop: Callable[[], bool], tell: Tell
) -> None:
    """Run all seeds of a comparison, each of them in one of several processes.

    What a run records does not depend on the process that made it.

    Raises:
        Interrupted: when asked to stop; every run under way is saved.
        EsperError: where a run fails, or a process ends; the others stop, and are saved.
    """
    context = multiprocessing.get_context("spawn")
    flag = context.Event()
    told: SimpleQueue[str] = context.SimpleQueue()
    failures: list[BaseException] = []

    def pass_on() -> None:
        while not told.empty():
            tell(told.get())

    try:
        with ProcessPoolExecutor(workers, context, _begin, (flag, told)) as pool:
            try:
                with _uninterrupted():
                    waiting: set[Future[None]] = {
                        pool.submit(_run, folder, asked, seed) for seed in asked.seeds
                    }
                while waiting:
                    done, waiting = wait(waiting, timeout=_LOOK, return_when=FIRST_COMPLETED)
                    pass_on()
                    failures += [error for own in done if (error := own.exception()) is not None]
                    if (stop() or failures) and not flag.is_set():
                        flag.set()
                        waiting = {own for own in waiting if not own.cancel()}
            finally:
                # Also where this loop is left by an exception: nobody trains on alone.
                flag.set()
    finally:
        pass_on()
    for error in failures:
        if isinstance(error, BrokenProcessPool):
            if stop():
                continue
            raise EsperError(
                "a worker ended before its run did, as one does that is killed or for which the"
                f" memory does not suffice; what was run is whole: go on with --resume {folder},"
                " and fewer --workers"
            ) from error
        if not isinstance(error, Interrupted):
            raise error
    if stop() or failures:
        raise Interrupted(f"stopped; go on with --resume {folder}")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A while in which workers start, which inherit that Ctrl-C does not reach them."""
    # It is for the first process, which asks the others to stop. Importing, they could not answer.
    resource_tracker.ensure_running()  # which would unblock it
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# In a worker.

_stopped: Flag | None = None
_told: "SimpleQueue[str] | None" = None


def _begin(flag: Flag, told: "SimpleQueue[str]") -> None:
    global _stopped, _told
    _stopped, _told = flag, told
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        # A run may be killed anywhere, and nobody waits for this one any more.
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


def _is_stopped() -> bool:
    return _stopped is not None and _stopped.is_set()


def _run(folder: Path, asked: Comparison, seed: int) -> None:
    assert _told is not None
    run_seed(folder, asked, seed, stop=_is_stopped, tell=_told.put)
