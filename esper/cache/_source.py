"""The library behind a cache: whether it has a kernel, has none, or is down."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

from esper.artifacts import Artifact
from esper.errors import ArtifactError, InputError, KernelNotFoundError, LibraryError

_MOST_ABSENT = 1024
"""Ids whose absence is remembered at most."""


class KernelSource(Protocol):
    """Where kernels come from; `esper.urza.Library` is one."""

    def get(self, kernel_id: str) -> Artifact:
        """The artifact of that id, its bytes verified.

        Raises:
            KernelNotFoundError: where there is none, which is an answer.
            Exception: any other is a failure, such as LibraryError or OSError.
        """
        ...


Guard = Callable[[Callable[[], Any]], Any]
"""Calls what it is given, or raises, as a circuit breaker does. A kernel that is not there, and
one that is damaged, are answers: what the guard calls returns then, and raises nothing."""


def unguarded(call: Callable[[], Any]) -> Any:
    """The guard that guards nothing."""
    return call()


class LeftBehind:
    """Stands for the library of a cache that was unpickled."""

    def get(self, kernel_id: str) -> Artifact:
        """Raises LibraryError."""
        raise LibraryError(
            "the library was left behind when the cache was pickled: give it one, by"
            " cache.library = ..."
        )


class Absent:
    """Which kernels were found to be in no library, for a number of asks each."""

    def __init__(self, asks: int) -> None:
        self._asks = asks
        self._left: OrderedDict[str, int] = OrderedDict()

    def note(self, kernel_id: str) -> None:
        """It was not found."""
        if self._asks:
            self._left[kernel_id] = self._asks
            if len(self._left) > _MOST_ABSENT:
                self._left.popitem(last=False)

    def recalls(self, kernel_id: str) -> bool:
        """Whether it is still taken to be absent; counts as an ask."""
        left = self._left.pop(kernel_id, 0)
        if left > 1:
            self._left[kernel_id] = left - 1
        return left > 0

    def forget(self, kernel_id: str) -> None:
        """It is there after all."""
        self._left.pop(kernel_id, None)

    def clear(self) -> None:
        """Another library is asked from now on."""
        self._left.clear()


def check_id(kernel_id: object) -> None:
    """Refuse what is no id.

    Raises:
        InputError: for what is no text.
    """
    if not isinstance(kernel_id, str):
        raise InputError(
            f"a kernel is asked for by its id, a text, got {kernel_id!r}, a"
            f" {type(kernel_id).__name__}"
        )


def ask(library: KernelSource, guard: Guard, kernel_id: str) -> Artifact | None:
    """The artifact of an id; None where the library has none.

    Raises:
        ArtifactError: where what the library holds is damaged.
        LibraryError: where it could not be asked, with the reason.
    """

    def answer() -> Artifact | ArtifactError | None:
        try:
            return library.get(kernel_id)
        except KernelNotFoundError:
            return None
        except ArtifactError as error:
            return error

    try:
        found = guard(answer)
    except Exception as error:  # whatever a service, its client or a breaker raises
        reason = str(error) if isinstance(error, LibraryError) else f"{_name(error)}: {error}"
        raise LibraryError(reason) from error
    if isinstance(found, ArtifactError):
        raise found
    if found is not None and not (isinstance(found, Artifact) and found.kernel_id == kernel_id):
        what = found.kernel_id[:12] if isinstance(found, Artifact) else f"a {type(found).__name__}"
        raise LibraryError(f"it gave {what} for kernel {kernel_id[:12]}")
    return found


def _name(error: Exception) -> str:
    return type(error).__name__
