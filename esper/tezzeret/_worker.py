"""What runs in a compile worker.

A worker is a fresh interpreter that the pool spawned: it shares no memory with
the training process, and what it takes can be limited and taken back.
"""

import json
import multiprocessing
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from esper.contracts import KernelSignature
from esper.errors import (
    ArtifactError,
    BlueprintError,
    EsperError,
    InputError,
    KernelCompilationError,
)
from esper.tezzeret._own_kernel import first_line


class Task(NamedTuple):
    """A job in plain data."""

    blueprint: bytes
    signature: str
    sizes: dict[str, int]
    init_seed: int
    ancestor: str | None
    cpu_seconds: int
    measure: tuple[str, ...]
    """Backends on which to measure what was compiled."""


class Done(NamedTuple):
    """What the worker gives back: the bytes of an artifact, or the kind and text of an error.

    Both where the artifact could not be measured.
    """

    data: bytes | None
    error: tuple[str, str] | None
    seconds: float
    worker: int
    """Its process id."""
    measurements: tuple[str, ...] = ()
    """Each as JSON."""


OUT_OF_MEMORY = 77
"""The exit status of a worker that reached its limit of memory."""

_SIGNS = ("bad_alloc", "out of memory", "can't allocate memory", "cannot allocate memory")

_ERRORS: dict[str, type[EsperError]] = {
    kind.__name__: kind
    for kind in (EsperError, ArtifactError, BlueprintError, InputError, KernelCompilationError)
}


def error_of(kind: str, text: str) -> EsperError:
    """The error that a worker told of."""
    return _ERRORS.get(kind, EsperError)(text)


def prepare(memory_bytes: int) -> None:
    """Import what compiling needs, and limit the memory from there on."""
    threading.Thread(target=_end_with_the_asker, daemon=True).start()
    # Workers share the machine with training, and with each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from esper.tezzeret import _compile  # noqa: F401  (imported before the limit is set)

    torch.set_num_threads(1)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with_the_asker() -> None:
    """Nobody waits for what a killed process has asked for, and it may take minutes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


def work(task: Task) -> Done:
    """Compile one kernel."""
    from esper.tezzeret._blueprint import read_blueprint
    from esper.tezzeret._compile import compile_blueprint

    begun = time.monotonic()
    _limit_cpu(task.cpu_seconds)
    try:
        artifact = compile_blueprint(
            read_blueprint(task.blueprint, "the job's blueprint"),
            KernelSignature.model_validate_json(task.signature),
            sizes=task.sizes,
            init_seed=task.init_seed,
            ancestor=task.ancestor,
        )
        seconds = time.monotonic() - begun
    except EsperError as error:
        return Done(None, (type(error).__name__, str(error)), time.monotonic() - begun, os.getpid())
    except Exception as error:  # whatever it is, it is of this job alone
        if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _SIGNS):
            # What ran out of memory inside of a library may hang at the next job.
            os._exit(OUT_OF_MEMORY)
        told = ("EsperError", first_line(error))
        return Done(None, told, time.monotonic() - begun, os.getpid())
    measured: list[str] = []
    failed = None
    for backend in task.measure:
        try:
            measured.append(json.dumps(_measured(artifact, backend)))
        except EsperError as error:
            failed = (type(error).__name__, str(error))
        except Exception as error:  # which costs no kernel that was compiled
            failed = ("EsperError", first_line(error))
    return Done(artifact.data, failed, seconds, os.getpid(), tuple(measured))


def _limit_cpu(seconds: int) -> None:
    """From here on; the signal of the soft limit ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, hard))


def _measured(artifact: Any, backend: Any) -> dict[str, Any]:
    from esper.execution import RealKernelExecutor

    # It was compiled here.
    executor = RealKernelExecutor(backend=backend, trust=lambda _: None)
    return executor.profile(artifact).to_dict()
