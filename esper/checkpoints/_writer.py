"""Checkpoints written in the background, one at a time."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from esper.checkpoints._manifest import Folder
from esper.checkpoints._store import discard_checkpoint, save_checkpoint


def _replace(folder: Folder, step: int, tree: Any, meta: Mapping[str, Any]) -> None:
    discard_checkpoint(folder, step)
    save_checkpoint(folder, step, tree, meta)


class CheckpointWriter:
    """Saves what it is given while the caller goes on.

    The caller must leave the arrays as they are: jax's are never written to, and others are to
    be copied before. A checkpoint is begun when the one before it is whole, so at most one is in
    memory besides the run.

    Args:
        folder: where checkpoints are kept, one folder for each step.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="esper-checkpoint")
        self._under_way: Future[None] | None = None

    def save(self, step: int, tree: Any, meta: Mapping[str, Any], *, replace: bool = False) -> None:
        """Begin to save; waits only for a checkpoint that is still being written.

        Args:
            replace: remove the checkpoint of that step, where there is one.

        Raises:
            CheckpointError: where the one before could not be written.
        """
        self.wait()
        write = _replace if replace else save_checkpoint
        self._under_way = self._thread.submit(write, self._folder, step, tree, meta)

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
            CheckpointError: where it could not be.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """Wait for what is under way, and let the thread go; errors are for `wait` to raise."""
        self._thread.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self.close()
