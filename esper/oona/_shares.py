"""Who has which partition of a topic in a group: leases, and a fair share for everyone."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple


class Lease(NamedTuple):
    """Something that belongs to somebody for a while."""

    token: str
    until: float
    seconds: float

    def runs(self, now: float) -> bool:
        """Whether it has not run out.

        One that begins in the future has: the clock it was made by was another, of before the
        machine was started, or was set back.
        """
        return self.until - self.seconds <= now < self.until


class Shares(NamedTuple):
    """What one member is to do about the partitions of a topic."""

    keep: frozenset[int]
    """To renew, and read from."""
    drain: frozenset[int]
    """To renew, and to read nothing new from: others are to have them once all is settled."""
    free: frozenset[int]
    """To give up."""
    take: frozenset[int]
    """To take, which are nobody's."""

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do when this is done."""
        return not self.drain


def share(
    token: str,
    leases: Mapping[int, Lease],
    partitions: int,
    members: Collection[str],
    held: Collection[int],
    now: float,
) -> Shares:
    """Share out the partitions of a topic, as far as it is one member's business.

    Args:
        token: of the member.
        leases: of those partitions that have one, run out or not.
        members: the tokens of all whose lease has not run out, this one among them.
        held: partitions of which the member has something that is not settled.
    """
    own = [p for p in range(partitions) if p in leases and leases[p].token == token]
    fair = math.ceil(partitions / max(1, len(members)))
    # What is held is kept rather than what is not, and the lower numbers rather than the higher.
    wanted = _first(own, held)
    keep, over = wanted[:fair], wanted[fair:]
    nobodys = [
        p
        for p in range(partitions)
        if p not in own and (p not in leases or not leases[p].runs(now))
    ]
    return Shares(
        keep=frozenset(keep),
        drain=frozenset(p for p in over if p in held),
        free=frozenset(p for p in over if p not in held),
        take=frozenset(nobodys[: fair - len(keep)]),
    )


def _first(own: Sequence[int], held: Collection[int]) -> list[int]:
    return sorted(own, key=lambda partition: (partition not in held, partition))


def soonest(until: float, token: str, *leases: Iterable[Lease]) -> float:
    """When something of others may be there to take, but not after `until`."""
    others = (lease.until for own in leases for lease in own if lease.token != token)
    return min([until, *others])
