"""A member of a group that reads from a Redis server."""

import json
import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from esper.contracts import Topic
from esper.oona._broker import Place
from esper.oona._redis_server import Server
from esper.oona._store import ALONE, EXHAUSTED, Member, Outcome, Slot, Taken
from esper.oona._stored_consumer import replaced

_PAUSE = 0.02


class RedisSeat:
    """A `Seat` in a group on a Redis server.

    Where the answer to `take` was lost, the next one says what this member holds, and the server
    gives it the rest again, as if that had never been delivered.
    """

    def __init__(
        self,
        server: Server,
        name: str,
        member: Member,
        held: MutableMapping[Place, int],
        capacity: int,
        clock: Callable[[], float] | None,
    ) -> None:
        self.slots: frozenset[Slot] = frozenset()
        self._server = server
        self._name = name
        self._member = member
        self._held = held
        self._capacity = capacity
        self._clock = clock
        self._readable: dict[Slot, str] = {}
        """What it has, and the last that was delivered of each."""
        self._moved: set[Slot] = set()
        """Where something may lie that was delivered and is to be delivered again."""
        self._turn = 0
        self._until = 0.0
        self._renewed = 0.0
        self._seen = ""
        self._doubt = False

    def _ask(self, **values: Any) -> str:
        member = self._member
        ask = {
            "group": member.group,
            "name": member.name,
            "token": member.token,
            "topics": member.topics,
            "lease": 1e3 * member.lease_seconds,
            "capacity": self._capacity,
            **values,
        }
        if self._clock is not None:
            ask["now"] = 1e3 * self._clock()
        return json.dumps(ask)

    def _now(self) -> float:
        return time.monotonic() if self._clock is None else self._clock()

    def join(self) -> None:
        """Come into the group."""
        self._server.run("join", self._ask(start=self._member.start))

    def take(self, most: int) -> list[Taken]:
        """See `Seat.take`."""
        self._turn += 1
        state, found, moved, slots = self._server.patiently(
            lambda: self._take_once(most), self._note_doubt
        )
        self._doubt = False
        if state[0] == b"SAT":
            _, seen, left, _, drained = state
            self._seen = seen.decode()
            self._until = self._now() + left / 1e3
            self._renewed = self._now()
            self.slots = frozenset([_slot(each) for each in (*slots, *drained)])
            self._forget()
        self._readable = {_slot(each): each[2].decode() for each in slots}
        self._moved = {_slot(each) for each in moved}
        return [
            Taken(Place(*_slot(each), each[2].decode()), int(each[3]), each[4]) for each in found
        ]

    def _forget(self) -> None:
        """Note what comes alone and is another's by now, or done with."""
        for place in [place for place, attempt in self._held.items() if attempt >= ALONE]:
            stream = f"{self._name}:{place.topic.value}:p{place.partition}"
            rows = self._server.patiently(
                lambda stream=stream, at=place.position: self._server.client.xpending_range(
                    stream, self._member.group, at, at, 1
                )
            )
            if [row["consumer"] for row in rows] != [self._member.token.encode()]:
                self._held[place] = 0

    def _note_doubt(self) -> None:
        self._doubt = True

    def _take_once(self, most: int) -> Any:
        due = not self._renewed <= self._now() < self._until
        ask = self._ask(
            most=most,
            max_deliveries=self._member.max_deliveries,
            exhausted=EXHAUSTED,
            turn=self._turn,
            due=due or self._doubt,
            doubt=self._doubt,
            seen=self._seen,
            held=list(self._held),
            moved=list(self._moved),
            slots=[(*slot, last) for slot, last in self._readable.items()],
        )
        answer = self._server.run_once("take", ask)
        if answer[0][0] == b"REPLACED":
            raise replaced(self._member)
        return answer

    def settle(self, places: Sequence[Place], outcome: Outcome, reason: str) -> list[Place]:
        """See `Seat.settle`."""
        now = self._now()
        renew = not self._renewed <= now < self._renewed + self._member.lease_seconds / 4
        ask = self._ask(outcome=outcome.value, reason=reason, renew=renew)
        lost = self._settle(ask, places)
        if renew:
            self._renewed = now
        if outcome is Outcome.BACK:
            self._moved |= {(place.topic, place.partition) for place in places}
        return lost

    def _settle(self, ask: str, places: Sequence[Place]) -> list[Place]:
        arguments = [part for place in places for part in (place[0].value, *place[1:])]
        answer = self._server.run("settle", ask, *arguments)
        if answer[0] == b"REPLACED":
            raise replaced(self._member)
        return [places[index] for index in answer[1]]

    def renew(self) -> None:
        """See `Seat.renew`."""
        now = self._now()
        self._settle(self._ask(outcome=Outcome.DONE.value, reason="", renew=True), ())
        self._renewed = now

    def wait(self, seconds: float) -> None:
        """See `Seat.wait`."""
        if self._moved:
            return
        if not self._readable:
            time.sleep(min(seconds, _PAUSE))
            return
        streams = {
            f"{self._name}:{topic.value}:p{partition}": last
            for (topic, partition), last in self._readable.items()
        }
        # The answer to a read that waits comes late on purpose.
        block = max(1, int(1e3 * min(seconds, self._server.timeout / 2)))
        self._server.patiently(lambda: self._server.client.xread(streams, count=1, block=block))  # pyright: ignore[reportArgumentType]

    def leave(self) -> None:
        """See `Seat.leave`."""
        self._server.run("leave", self._ask())


def _slot(answer: Any) -> Slot:
    return Topic(answer[0].decode()), int(answer[1])
