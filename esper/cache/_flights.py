"""Work for a key that is done once, however many ask for it meanwhile."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

from esper.cache._forks import renew_at_fork

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Abandoned(Exception):
    """Whoever was at the work was interrupted; another may begin anew."""


class Flights(Generic[K, T]):
    """What is under way, by key. Work for different keys goes on side by side."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[K, Future[T]] = {}
        renew_at_fork(self)

    def forked(self) -> None:
        """What is under way is so in the parent."""
        self._lock = threading.Lock()
        self._under_way = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def join(self, key: K) -> tuple[Future[T], bool]:
        """The work for a key, and whether it is the caller's to do, by `fly`.

        The future cannot be cancelled, so that one who waits no longer stops nobody else.
        """
        with self._lock:
            flight = self._under_way.get(key)
            if flight is not None:
                return flight, False
            flight = self._under_way[key] = Future()
            flight.set_running_or_notify_cancel()
            return flight, True

    def fly(
        self,
        key: K,
        flight: Future[T],
        make: Callable[[], T],
        then: Callable[[], object] | None = None,
    ) -> None:
        """Do the work that `join` gave; its result or its error is the future's.

        Args:
            then: called after what was made, when it is under way no more.

        Raises:
            BaseException: what interrupted it; who waits finds `Abandoned`.
        """
        try:
            result = make()
        except Exception as error:
            self._land(key, flight)
            flight.set_exception(error)
        except BaseException:
            self._land(key, flight)
            flight.set_exception(Abandoned())
            raise
        else:
            # First, so that whoever comes now looks where the result has been put.
            self._land(key, flight)
            try:
                if then is not None:
                    then()
            finally:
                flight.set_result(result)

    def _land(self, key: K, flight: Future[T]) -> None:
        with self._lock:
            # After a fork it is none of this process's, though its thread may be.
            if self._under_way.get(key) is flight:
                del self._under_way[key]

    def run(
        self, key: K, make: Callable[[], T], then: Callable[[], object] | None = None
    ) -> tuple[T, bool]:
        """Do the work here, as `fly` does, or wait for who does it.

        Returns:
            The result, and whether it was made here.
        """
        while True:
            flight, leads = self.join(key)
            if leads:
                self.fly(key, flight, make, then)
            try:
                return flight.result(), leads
            except Abandoned:
                continue
