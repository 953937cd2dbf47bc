"""All that a run records of itself while it trains: the ledger first, then whoever listens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from esper.oona import Bus, Topic
from esper.tamiyo import Veto, Worth
from esper.tolaria._ledger import MARK, ROLLBACK, Cursor, Ledger, event_entry
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

    def worth(self, step: int, layer: int, seed: int, worth: Worth) -> None:
        """Record a removal cost that was measured."""
        values = {"value": worth.value, "low": worth.low, "high": worth.high}
        finite = {name: value if abs(value) < float("inf") else None
                  for name, value in values.items()}  # fmt: skip
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
