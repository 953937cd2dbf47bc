"""A bus that may not be there yet when a worker begins."""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from esper.contracts import OonaMessage, Topic
    from esper.oona import Broker, Consumer


class WorkerBus(Protocol):
    """What a worker needs of a bus; an `esper.oona.Broker` has it."""

    def publish(self, messages: "Sequence[OonaMessage]") -> None:
        """Returns once the bus has them."""
        ...

    def consumer(
        self,
        group: str,
        topics: "Sequence[Topic | str]",
        *,
        lease_seconds: float = 30.0,
    ) -> "Consumer":
        """Join a group, which begins with what is published from then on."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class LateBus:
    """Opens a bus when it is first needed, and again after that has failed. A `WorkerBus`.

    Args:
        open_bus: opens it.
    """

    def __init__(self, open_bus: "Callable[[], Broker]") -> None:
        self._open_bus = open_bus
        self._lock = threading.Lock()
        self._broker: Broker | None = None

    def publish(self, messages: "Sequence[OonaMessage]") -> None:
        """See `WorkerBus.publish`."""
        self._opened().publish(messages)

    def consumer(
        self,
        group: str,
        topics: "Sequence[Topic | str]",
        *,
        lease_seconds: float = 30.0,
    ) -> "Consumer":
        """See `WorkerBus.consumer`."""
        return self._opened().consumer(group, topics, lease_seconds=lease_seconds)

    def close(self) -> None:
        """Close it, where it was opened."""
        with self._lock:
            if self._broker is not None:
                self._broker.close()

    def _opened(self) -> "Broker":
        with self._lock:
            if self._broker is None:
                self._broker = self._open_bus()
            return self._broker
