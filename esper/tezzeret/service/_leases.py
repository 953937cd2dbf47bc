"""Claims that are held, renewed by a thread while what they are for goes on."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Literal

from esper.contracts import Claim
from esper.errors import EsperError
from esper.tezzeret.service._patience import is_away

RENEWED_AFTER = 1 / 3
"""Share of a lease after which it is renewed: two renewals may fail without a loss."""

_SOONEST = 0.05
"""Seconds between two looks at the claims."""

State = Literal["held", "settling", "lost"]


class _Held:
    def __init__(self, claim: Claim, due: float) -> None:
        self.claim = claim
        self.due = due
        self.state: State = "held"


class Leases:
    """Renews claims from a thread of its own; see `BlueprintQueue.renew`.

    A claim that is lost is renewed no more, and what is done for it is in vain: another worker
    does it. While the library is away renewals are tried again; whether a claim is lost by then is
    for the library to say.

    Args:
        renew: renews a claim.
        on_lost: told of a claim that is lost, and why, while nobody settles it.
        on_away: told of a renewal that had no answer.
        clock: gives seconds, of which only differences are read.
    """

    def __init__(
        self,
        renew: Callable[[Claim], Claim],
        *,
        on_lost: Callable[[Claim, Exception], object],
        on_away: Callable[[str, Exception, int], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._renew = renew
        self._on_lost = on_lost
        self._on_away = on_away
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._missed = 0
        self._thread = threading.Thread(target=self._run, name="esper-leases", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, claims: Iterable[Claim]) -> None:
        """Renew these from now on."""
        with self._changed:
            for claim in claims:
                self._held[claim.token] = _Held(claim, self._due(claim))
            self._changed.notify_all()

    def settle(self, claim: Claim) -> Claim | None:
        """The claim as it was renewed last, which is about to end; None where it is lost.

        It is renewed until it is dropped; that it then turns out to be ended is no loss.
        """
        with self._changed:
            held = self._held.get(claim.token)
            if held is None or held.state == "lost":
                return None
            held.state = "settling"
            return held.claim

    def current(self, claim: Claim) -> Claim | None:
        """The claim as it was renewed last; None where it is lost."""
        with self._changed:
            held = self._held.get(claim.token)
            return None if held is None or held.state == "lost" else held.claim

    def drop(self, claim: Claim) -> None:
        """Renew it no more."""
        with self._changed:
            self._held.pop(claim.token, None)

    def all(self) -> list[Claim]:
        """Those that are held and not lost."""
        with self._changed:
            return [held.claim for held in self._held.values() if held.state != "lost"]

    def close(self) -> None:
        """Renew nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _due(self, claim: Claim) -> float:
        return self._clock() + claim.seconds * RENEWED_AFTER

    def _run(self) -> None:
        while (due := self._next_due()) is not None:
            for held in due:
                self._renew_one(held)

    def _next_due(self) -> list[_Held] | None:
        """Wait for those that are due; None at the end."""
        with self._changed:
            while not self._closed:
                waiting = [held for held in self._held.values() if held.state != "lost"]
                now = self._clock()
                due = [held for held in waiting if held.due <= now]
                if due:
                    return due
                soonest = min((held.due for held in waiting), default=None)
                self._changed.wait(None if soonest is None else max(_SOONEST, soonest - now))
        return None

    def _renew_one(self, held: _Held) -> None:
        with self._changed:
            # Dropped while others were renewed, or the worker has ended.
            if self._closed or self._held.get(held.claim.token) is not held:
                return
        try:
            renewed = self._renew(held.claim)
        except Exception as error:
            # What nobody foresaw, too: without this thread no claim would ever be renewed again.
            self._not_renewed(held, error)
        else:
            self._missed = 0
            with self._changed:
                held.claim = renewed
                held.due = self._due(renewed)

    def _not_renewed(self, held: _Held, error: Exception) -> None:
        if is_away(error) or not isinstance(error, EsperError):
            self._missed += 1
            self._on_away("renewing a claim", error, self._missed)
            with self._changed:
                # Soon, but not so often that a library that comes back is kept from it.
                held.due = self._clock() + held.claim.seconds * RENEWED_AFTER / 4
            return
        with self._changed:
            told = held.state == "held" and held.claim.token in self._held
            held.state = "lost"
        if told:
            self._on_lost(held.claim, error)
