"""A consumer of any store: what it holds, how it waits, and what it cannot read."""

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from esper.contracts import OonaMessage, Topic
from esper.errors import BusError, EsperError, InputError, LeaseLostError
from esper.oona._broker import Delivery, Place
from esper.oona._store import ALONE, Member, Outcome, Store, Taken

_MOST = 10_000
_MOST_WAIT = 1.0
"""Seconds after which one that waits looks by itself, whether leases have run out."""


class StoredConsumer:
    """A `Consumer` on a seat of a store."""

    def __init__(self, store: Store, member: Member) -> None:
        self._member = member
        self._held: dict[Place, int] = {}
        """What was delivered and not settled, and for which time; 0 where it was lost meanwhile."""
        self._unreadable: list[tuple[Place, str]] = []
        """What is to become a dead letter, and why."""
        self._seat = store.join(member, self._held)
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._closed = False

    @property
    def name(self) -> str:
        """See `Consumer.name`."""
        return self._member.name

    def receive(self, most: int = 64, wait_seconds: float = 0.0) -> list[Delivery]:
        """See `Consumer.receive`."""
        if not 1 <= most <= _MOST:
            raise InputError(f"most is from 1 to {_MOST} messages, got {most!r}")
        until = time.monotonic() + wait_seconds
        # Often enough for the leases, and for those of others that run out.
        pause = min(_MOST_WAIT, self._member.lease_seconds / 4)
        while True:
            with self._lock:
                self._check_open("receive")
                # Before all else: one of them that has to be alone would hold up everything.
                self._bury()
                alone = self._alone()
                if alone:
                    self._settled.clear()
                    # Its lease may have run out, and the message be another's, or done with.
                    self._look()
                    alone = self._alone()
                found = [] if alone else self._take(most)
            left = until - time.monotonic()
            if found or left <= 0.0:
                return found
            wait = self._settled.wait if alone else self._seat.wait
            try:
                wait(min(left, pause))
            except EsperError:
                # What was closed by another thread cannot be waited for any more.
                self._check_open("receive")
                raise

    def _take(self, most: int) -> list[Delivery]:
        while True:
            taken = self._seat.take(most)
            found, unreadable = _read(taken)
            self._held.update((each.place, each.attempt) for each in taken)
            self._unreadable += unreadable
            try:
                self._bury()
            except EsperError:
                # What was found is this member's by now, and would come to nobody else. The next
                # call tries again, and says what is wrong if it still is.
                if not found:
                    raise
            if found or not unreadable:
                return found

    def _bury(self) -> None:
        while self._unreadable:
            place, reason = self._unreadable[0]
            self._seat.settle([place], Outcome.DEAD, reason)
            del self._unreadable[0]
            self._held.pop(place, None)

    def _look(self) -> None:
        """See to its share, and take nothing."""
        self._seat.take(0)
        for place in self._held:
            if (place.topic, place.partition) not in self._seat.slots:
                self._held[place] = 0

    def _alone(self) -> bool:
        slots = self._seat.slots
        return any(
            attempt >= ALONE and (place.topic, place.partition) in slots
            for place, attempt in self._held.items()
        )

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """See `Consumer.acknowledge`."""
        self._settle(deliveries, Outcome.DONE, "")

    def give_back(self, deliveries: Sequence[Delivery]) -> None:
        """See `Consumer.give_back`."""
        self._settle(deliveries, Outcome.BACK, "")

    def reject(self, deliveries: Sequence[Delivery], reason: str) -> None:
        """See `Consumer.reject`."""
        if not isinstance(reason, str) or not reason.strip():
            raise InputError(f"say why the messages are rejected: reason is a text, got {reason!r}")
        self._settle(deliveries, Outcome.DEAD, reason)

    def _settle(self, deliveries: Sequence[Delivery], outcome: Outcome, reason: str) -> None:
        with self._lock:
            self._check_open("settle messages")
            places = [each.place for each in deliveries if each.place in self._held]
            if not places:
                return
            lost = self._seat.settle(places, outcome, reason)
            for place in places:
                self._held.pop(place, None)
            self._settled.set()
        if lost:
            raise LeaseLostError(
                f"{len(lost)} of {len(places)} messages are not consumer {self.name!r}'s any more:"
                f" it called nothing for longer than its lease of {self._member.lease_seconds:g} s,"
                f" or another was started under its name, and in group {self._member.group!r} they"
                " are to be settled by who has them now. For longer work, ask for a longer lease or"
                " call renew() meanwhile."
            )

    def renew(self) -> None:
        """See `Consumer.renew`."""
        with self._lock:
            self._check_open("renew its leases")
            self._seat.renew()

    def close(self) -> None:
        """See `Consumer.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._held.clear()
            self._seat.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise BusError(
                f"consumer {self.name!r} of group {self._member.group!r} cannot {what}:"
                " it was closed; join the group again"
            )


def decode(body: bytes, topic: Topic) -> tuple[OonaMessage | None, str]:
    """Read what a store holds: the message, or None and why there is none."""
    try:
        message = OonaMessage.from_bytes(body)
    except EsperError as error:
        return None, f"it cannot be read: {error}"
    if message.topic != topic:
        return None, f"it cannot be read: it lies under {topic.value}, and says {message.topic}"
    return message, ""


def _read(taken: Sequence[Taken]) -> tuple[list[Delivery], list[tuple[Place, str]]]:
    found: list[Delivery] = []
    unreadable: list[tuple[Place, str]] = []
    for each in taken:
        message, problem = each.message, ""
        if message is None:
            message, problem = decode(each.body, each.place.topic)
        if message is None:
            unreadable.append((each.place, problem))
        else:
            found.append(Delivery(message, each.attempt, each.place))
    return found, unreadable


def replaced(member: Member) -> LeaseLostError:
    """The error of one whose place in the group another has."""
    return LeaseLostError(
        f"another consumer was started as {member.name!r} in group {member.group!r}, and has what"
        " this one had not settled. Give each a name of its own, or none."
    )
