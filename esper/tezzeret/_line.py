"""Which worker takes which job: those of one program go to one worker."""

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

from esper.tezzeret._jobs import CompileJob

WORTH_SHARING = 20
"""Sets of parameters that take about as long as the program they are for. So many jobs of one
program must be left, for each worker that is to be at it, for one more to compile it as well."""


class Ticket(NamedTuple):
    """A job, and which try of it comes next, from 1 on."""

    job: CompileJob
    attempt: int = 1


def program_of(job: CompileJob) -> Hashable:
    """What jobs have in common whose kernels differ in their parameters alone."""
    # As text, because what is no size may be of any type, and its job is refused by a worker.
    return job.blueprint.canonical_json(), job.signature, repr(sorted(job.sizes.items(), key=repr))


class Line:
    """Jobs that wait for a worker, by program, in the order in which they were asked for."""

    def __init__(self, jobs: Iterable[CompileJob]) -> None:
        self._groups: dict[Hashable, deque[Ticket]] = {}
        for job in jobs:
            self.add(job)

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def add(self, job: CompileJob) -> None:
        """Wait, after the others of its program."""
        self._groups.setdefault(program_of(job), deque()).append(Ticket(job))

    def put_back(self, ticket: Ticket) -> None:
        """Wait again, before the others of its program."""
        self._groups.setdefault(program_of(ticket.job), deque()).appendleft(ticket)

    def holds(self, program: Hashable) -> bool:
        """Whether jobs of a program wait."""
        return program in self._groups

    def take(self, last: Hashable, elsewhere: Mapping[Hashable, int]) -> Ticket | None:
        """The next job for a worker; None where it had better do nothing.

        Args:
            last: the program that the worker compiled last.
            elsewhere: how many other workers are at a program.
        """
        if last in self._groups:
            return self._pop(last)
        for program in self._groups:
            if not elsewhere.get(program):
                return self._pop(program)
        longest = max(self._groups, key=lambda program: len(self._groups[program]), default=None)
        if longest is None or len(self._groups[longest]) < WORTH_SHARING * (1 + elsewhere[longest]):
            return None
        return self._pop(longest)

    def take_all(self) -> list[Ticket]:
        """All that wait."""
        left = [ticket for group in self._groups.values() for ticket in group]
        self._groups.clear()
        return left

    def _pop(self, program: Hashable) -> Ticket:
        group = self._groups[program]
        ticket = group.popleft()
        if not group:
            del self._groups[program]
        return ticket
