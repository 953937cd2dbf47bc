"""Folding a run's entries to the states of its seeds, also where it was taken back."""

from typing import Any

from esper.errors import LedgerError
from esper.tolaria._ledger import ROLLBACK, Entry, entry_event
from esper_functional import (
    EventKind,
    KasminaException,
    SeedState,
    advance,
    apply_event,
    init_seeds,
)

_KINDS = {kind.value for kind in EventKind}


class Fold:
    """The seeds' state along a ledger.

    Args:
        rows: layers with seeds.
        columns: seeds of each.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self._first = init_seeds(rows, columns)
        self._history: list[Entry] = []
        self.state: SeedState = self._first
        self.events = 0
        self.rollbacks = 0

    @property
    def history(self) -> tuple[Entry, ...]:
        """The events that were not undone."""
        return tuple(self._history)

    def take(self, entry: Entry, ledger: Any) -> None:
        """Take the next entry.

        Raises:
            LedgerError: for an event that the seeds' state does not allow.
        """
        kind = entry.data["kind"]
        if kind == ROLLBACK:
            self._undo(int(entry.data["lines"]))
        elif kind in _KINDS:
            self._apply(entry, ledger)
            self._history.append(entry)
            self.events += 1

    def _apply(self, entry: Entry, ledger: Any) -> None:
        try:
            self.state = apply_event(self.state, entry_event(entry.data))
        except (KasminaException, KeyError, TypeError, ValueError) as error:
            raise LedgerError(
                f"the ledger {ledger} contradicts itself at line {entry.number}: {error}"
            ) from error

    def _undo(self, lines: int) -> None:
        """Be again what the first `lines` lines led to."""
        self.rollbacks += 1
        self._history = [entry for entry in self._history if entry.number <= lines]
        self.state = self._first
        for entry in self._history:
            self.state = apply_event(self.state, entry_event(entry.data))

    def at(self, step: int) -> SeedState:
        """The state before a step, in what is the run's history now."""
        state = self._first
        for entry in self._history:
            if int(entry.data["step"]) > step:
                break
            state = apply_event(state, entry_event(entry.data))
        return advance(state, step)
