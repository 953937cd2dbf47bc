"""Letters between a run and a service, by a thread of their own: a slow bus keeps nobody waiting.

A round receives what has come, publishes what is to be said, and may wait for an answer. It is
begun at a boundary; between boundaries nothing is asked of the bus.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from esper.contracts import OonaMessage, Topic
from esper.errors import EsperError, LeaseLostError
from esper.oona import Broker, Consumer

_AT_ONCE = 64
_MOST_CALLS = 256
"""Of `receive` in a round, for what came before: others may tell more than one can read."""
_CLOSE_SECONDS = 2.0


class Heard(NamedTuple):
    """What came of a round, and of those before that nobody had waited for."""

    messages: list[OonaMessage]
    error: str
    """Why the bus was no use; empty where it was."""


class Correspondence:
    """Publishes on a bus, and receives what is said to one name, in the order of its coming.

    Its group of consumers is the name's: a process that takes the place of another one hears what
    that one did not. Where two live at once, the first one gets an error and is silent from then
    on.

    Args:
        bus: a bus, which stays open; or what opens one, which is then closed.
        name: the key of messages that are for it.
        bound_seconds: how long a round may take, waiting for an answer apart.
    """

    def __init__(
        self, bus: Broker | Callable[[], Broker], *, name: str, bound_seconds: float
    ) -> None:
        self._open = bus if callable(bus) else None
        self._broker: Broker | None = None if callable(bus) else bus
        self._name = name
        self._group = f"run-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
        self._bound = bound_seconds
        self._consumer: Consumer | None = None
        self._lost = False
        self._changed = threading.Condition()
        """Guards all that follows."""
        self._asked: tuple[Sequence[OonaMessage], str, float] | None = None
        """What is to be said, to which of it an answer is waited for, and until when."""
        self._busy = self._failing = self._closing = False
        self._error = ""
        self._inbox: list[OonaMessage] = []
        self._thread: threading.Thread | None = None

    def exchange(self, messages: Sequence[OonaMessage], *, answer_to: str, wait: float) -> Heard:
        """Say something, and hear what there is.

        A bus that failed or was late the last time is not waited for: it is asked again, and what
        comes of it is heard at the next call. What could not be said until then is not said any
        more.

        Args:
            answer_to: the id of a message to which an answer is waited for; "" for none.
            wait: seconds for which one is.
        """
        with self._changed:
            late = self._failing
            self._asked = (messages, answer_to, time.monotonic() + wait)
            self._begin()
            self._changed.notify_all()
            if not late:
                in_time = self._changed.wait_for(self._is_done, self._bound + wait)
                if not in_time:
                    self._failing = True
                    self._error = f"it did not answer within {self._bound + wait:g} s"
            heard, self._inbox = self._inbox, []
            return Heard(heard, self._error if self._failing else "")

    def close(self) -> None:
        """Leave the bus as if nobody had been there; what hangs is left behind."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_CLOSE_SECONDS)

    def _is_done(self) -> bool:
        return self._asked is None and not self._busy

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="esper-correspondence", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked is not None or self._closing)
                if self._closing or self._asked is None:
                    break
                asked, self._asked, self._busy = self._asked, None, True
            error = ""
            try:
                self._round(*asked)
            except (EsperError, OSError) as raised:
                self._lost = self._lost or isinstance(raised, LeaseLostError)
                error = str(raised).partition("\n")[0]
            with self._changed:
                self._busy, self._failing, self._error = False, bool(error), error
                self._changed.notify_all()
        self._leave()

    def _round(self, messages: Sequence[OonaMessage], answer_to: str, until: float) -> None:
        if self._lost:
            raise LeaseLostError(
                f"another run hears what is said to {self._name!r}: give each run a name of its own"
            )
        if self._broker is None:
            assert self._open is not None
            self._broker = self._open()
        if self._consumer is None:
            topics = [Topic.DECISION, Topic.ADVICE]
            self._consumer = self._broker.consumer(self._group, topics, name="run")
        for _ in range(_MOST_CALLS):
            if not self._receive(self._consumer, 0.0):
                break
        self._broker.publish(messages)
        answered = not answer_to
        # What is there already is heard, however long it took to say something.
        left = until - time.monotonic()
        while not answered:
            found = self._receive(self._consumer, max(0.0, left))
            left = until - time.monotonic()
            # What a service in shadow says of it is no answer: the one that decides may follow.
            answered = left <= 0.0 or any(
                message.trace_id == answer_to and message.topic is Topic.DECISION
                for message in found
            )

    def _receive(self, consumer: Consumer, wait: float) -> list[OonaMessage]:
        """Everything that came, whoever it is for; what is for this name is kept."""
        deliveries = consumer.receive(_AT_ONCE, wait)
        found = [delivery.message for delivery in deliveries]
        with self._changed:
            self._inbox += [message for message in found if message.key == self._name]
        if deliveries:
            consumer.acknowledge(deliveries)
        return found

    def _leave(self) -> None:
        # A bus that is away forgets the group by the bounds of its streams.
        with suppress(EsperError, OSError):
            if self._consumer is not None:
                self._consumer.close()
            if self._broker is not None and not self._lost:
                self._broker.remove_group(self._group)
        if self._open is not None and self._broker is not None:
            with suppress(EsperError, OSError):
                self._broker.close()
