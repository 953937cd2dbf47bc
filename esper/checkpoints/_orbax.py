"""orbax, out of sight: what a user needs to know of it is said by the callers."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

_T = TypeVar("_T")


@contextmanager
def _withheld_logs() -> Iterator[None]:
    """Keep orbax from logging every save, and the traceback of one that failed."""
    others = {thread.ident for thread in threading.enumerate()}

    def from_orbax(_: logging.LogRecord) -> bool:
        return False

    def from_others(record: logging.LogRecord) -> bool:
        return record.thread in others

    withheld = {"absl": from_orbax, "asyncio": from_others}
    for name, keep in withheld.items():
        logging.getLogger(name).addFilter(keep)
    try:
        yield
    finally:
        for name, keep in withheld.items():
            logging.getLogger(name).removeFilter(keep)


def _with_checkpointer(work: Callable[[Any, Any], _T]) -> _T:
    """Call `work(orbax.checkpoint, checkpointer)` in a thread of its own.

    orbax runs an event loop. In a thread that has one already (a notebook's) it would
    patch asyncio for the whole process; in one that has none it would leave it closed.
    """
    import orbax.checkpoint as ocp

    # Which may be set for the caller's thread alone.
    x64 = jax.dtypes.canonicalize_dtype(np.int64) == np.int64

    def run() -> _T:
        with jax.enable_x64(x64), ocp.PyTreeCheckpointer() as checkpointer:
            return work(ocp, checkpointer)

    with _withheld_logs(), ThreadPoolExecutor(1, "checkpoint") as thread:
        return thread.submit(run).result()


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Store arrays by name; every device writes its own shards."""
    if not arrays:  # orbax refuses to store nothing
        folder.mkdir()
        return
    _with_checkpointer(lambda _, c: c.save(folder.absolute(), dict(arrays)))


def read_arrays(
    folder: Path, shardings: Mapping[str, jax.sharding.Sharding | None]
) -> dict[str, np.ndarray | jax.Array]:
    """The arrays of these names, on their shardings; in numpy where there is None."""
    if not shardings:
        return {}

    def read(ocp: Any, checkpointer: Any) -> dict[str, Any]:
        arguments = {
            name: ocp.RestoreArgs(restore_type=np.ndarray)
            if sharding is None
            else ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
            for name, sharding in shardings.items()
        }
        return checkpointer.restore(
            folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=arguments)
        )

    return _with_checkpointer(read)


def read_types(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every array that is stored."""

    def read(_: Any, checkpointer: Any) -> dict[str, Any]:
        found = checkpointer.metadata(folder.absolute()).item_metadata.tree
        return {name: (np.dtype(a.dtype).name, tuple(a.shape)) for name, a in found.items()}

    return _with_checkpointer(read)
