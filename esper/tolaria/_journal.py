"""All that a run records of itself while it trains: the ledger first, then whoever listens."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from esper.oona import Bus, Topic
from esper.tamiyo import Decision, Veto, Worth
from esper.tolaria._ledger import DECISION, MARK, NOTE, ROLLBACK, Cursor, Ledger, event_entry
from esper_functional import Event


class Journal:
    """The ledger of a run, and the bus on which its entries are published.

    Args:
        on_entry: is called with every entry that is written.
    """

    def __init__(
        self,
        ledger: Ledger,
        bus: Bus,
        on_entry: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._ledger = ledger
        self._bus = bus
        self._on_entry = on_entry

    @property
    def cursor(self) -> Cursor:
        """The ledger's place."""
        return self._ledger.cursor

    def write(self, entries: Sequence[dict[str, Any]]) -> None:
        """Write entries, and tell of them.

        Raises:
            LedgerError: where a resumed run does otherwise than it did before.
            OSError: where the disk does not take them.
        """
        if not entries:
            return
        self._ledger.append(list(entries))
        for entry in entries:
            self._bus.publish(Topic.SEED_EVENT, entry)
            if self._on_entry is not None:
                self._on_entry(entry)

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        self._ledger.sync()

    def events(self, events: Sequence[tuple[Event, str]]) -> None:
        """Record changes of seeds, each with its reason."""
        self.write([event_entry(event, reason) for event, reason in events])

    def mark(self, step: int, name: str, **digests: str) -> None:
        """Record what the run is at a step."""
        self.write([{"kind": MARK, "step": step, "name": name, **digests}])

    def vetoes(self, step: int, vetoes: Sequence[Veto]) -> None:
        """Record decisions that were refused."""
        self.write(
            [
                {
                    "kind": "veto",
                    "step": step,
                    "layer": veto.decision.layer,
                    "seed": veto.decision.seed,
                    "action": veto.decision.action.value,
                    "kernel": veto.decision.kernel_id,
                    "rule": veto.rule,
                    "reason": veto.reason,
                }
                for veto in vetoes
            ]
        )

    def decision(self, step: int, decision: Decision) -> None:
        """Record what a decision that is done is expected to bring, where it says so."""
        if decision.effect is None:
            return
        effect = {name: _finite(own) for name, own in decision.effect._asdict().items()}
        entry = {
            "kind": DECISION,
            "step": step,
            "layer": decision.layer,
            "seed": decision.seed,
            "action": decision.action.value,
            "kernel": decision.kernel_id,
            "confidence": _finite(decision.confidence),
            "uncertainty": _finite(decision.uncertainty),
            "features": [[name, _finite(part)] for name, part in decision.features],
            **effect,
        }
        self.write([entry])

    def notes(self, step: int, remarks: Sequence[str]) -> None:
        """Record what the controller said without deciding anything."""
        self.write([{"kind": NOTE, "step": step, "reason": remark} for remark in remarks])

    def worth(self, step: int, layer: int, seed: int, worth: Worth) -> None:
        """Record a removal cost that was measured."""
        finite = {name: _finite(value) for name, value in worth._asdict().items()}
        self.write([{"kind": "worth", "step": step, "layer": layer, "seed": seed, **finite}])

    def rollback(self, step: int, to: int, lines: int, cause: str, remedy: str) -> None:
        """Record that the run was taken back.

        Args:
            lines: how many lines of the ledger lead to what it was taken back to.
        """
        self.write(
            [
                {
                    "kind": ROLLBACK,
                    "step": step,
                    "to": to,
                    "lines": lines,
                    "cause": cause,
                    "remedy": remedy,
                }
            ]
        )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
