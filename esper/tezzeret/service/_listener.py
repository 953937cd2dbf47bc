"""Hears on the bus that there is something to compile."""

import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from esper.contracts import BlueprintChanged, BlueprintState, Topic, payload_of
from esper.errors import EsperError
from esper.recovery import RetryPolicy
from esper.tezzeret.service._bell import Bell
from esper.tezzeret.service._late_bus import WorkerBus
from esper.tezzeret.service._patience import POLICY

if TYPE_CHECKING:
    from esper.oona import Consumer, Delivery

GROUP = "tezzeret"
"""All workers are one group: what is submitted wakes one of them."""

_AT_ONCE = 64
_WAIT_SECONDS = 1.0
_LEASE_SECONDS = 10.0
"""After so long what was a killed worker's to hear is heard by others."""


class Listener:
    """Rings a bell when a blueprint waits to be compiled, from a thread of its own.

    A message that is missed costs a wait and no more, because workers ask the library again and
    again by themselves. So messages are acknowledged before they are acted upon, and a bus that is
    away is only tried again.

    Args:
        bus: where it listens.
        bell: is rung.
        on_away: told of each time that the bus did not answer.
        policy: the waits in between.
        draws: their jitter.
    """

    def __init__(
        self,
        bus: WorkerBus,
        bell: Bell,
        *,
        on_away: Callable[[str, Exception, int], object],
        policy: RetryPolicy = POLICY,
        draws: random.Random | None = None,
    ) -> None:
        self._bus = bus
        self._bell = bell
        self._on_away = on_away
        self._policy = policy
        self._draws = draws or random.Random(policy.seed)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="esper-listener", daemon=True)
        self._thread.start()

    def close(self, seconds: float = 3.0) -> None:
        """Listen no more; a call of the bus that hangs is waited for that long."""
        self._closing.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        delays, missed = self._policy.delays(self._draws), 0
        while not self._closing.is_set():
            try:
                consumer = self._bus.consumer(
                    GROUP,
                    (Topic.BLUEPRINT_CHANGED,),
                    lease_seconds=_LEASE_SECONDS,
                )
                try:
                    # What came before it listened is found by asking.
                    self._bell.ring()
                    while not self._closing.is_set():
                        self._hear(consumer)
                        delays, missed = self._policy.delays(self._draws), 0
                finally:
                    with suppress(EsperError, OSError):
                        consumer.close()
            except (EsperError, OSError) as error:
                missed += 1
                self._on_away("listening", error, missed)
                self._closing.wait(next(delays))

    def _hear(self, consumer: "Consumer") -> None:
        deliveries = consumer.receive(_AT_ONCE, _WAIT_SECONDS)
        if not deliveries:
            return
        consumer.acknowledge(deliveries)
        if waits(deliveries):
            self._bell.ring()


def waits(deliveries: Sequence["Delivery"]) -> bool:
    """Whether one of them says that a blueprint waits to be compiled."""
    for delivery in deliveries:
        with suppress(EsperError):
            payload = payload_of(delivery.message)
            after = payload.after if isinstance(payload, BlueprintChanged) else None
            if after is BlueprintState.UNVALIDATED:
                return True
    return False
