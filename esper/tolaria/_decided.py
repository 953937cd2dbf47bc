"""What a run's decisions were expected to bring, and what was measured of them afterwards."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from esper.nissa import standing
from esper.tolaria._ledger import DECISION

_EMPTIED = frozenset({"unload", "reset", "cancel", "fail", "fold"})
"""Kinds of entries after which a seed has no kernel to be measured."""


class Decided(NamedTuple):
    """A decision that was done, and the later worths of the kernel in its seed."""

    decision: Mapping[str, Any]
    """Its entry: step, layer, seed, action, confidence, uncertainty, value, low, high, features."""
    worths: tuple[Mapping[str, Any], ...]
    """Entries of kind `worth`, in order: step, value, low, high."""


def decisions_of(entries: Iterable[Mapping[str, Any]]) -> list[Decided]:
    """Join the decisions of a whole ledger with what was measured of their kernels.

    What a rollback took back is left out. A kernel that left its seed is measured no more.
    """
    every = list(entries)
    found: list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]] = []
    here: dict[tuple[int, int], list[list[Mapping[str, Any]]]] = {}
    for entry, holds in zip(every, standing(every), strict=True):
        if not holds or "layer" not in entry:
            continue
        place, kind = (entry["layer"], entry["seed"]), entry["kind"]
        if kind == DECISION:
            found.append((entry, []))
            here.setdefault(place, []).append(found[-1][1])
        elif kind == "worth":
            for worths in here.get(place, ()):
                worths.append(entry)
        elif kind in _EMPTIED:
            here.pop(place, None)
    return [Decided(decision, tuple(worths)) for decision, worths in found]
