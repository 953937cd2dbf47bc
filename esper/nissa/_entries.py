"""The entries of a ledger as a reader meets them: what they say, and which of them still hold."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from esper_functional import EventKind

VETO = "veto"
"""A decision that a rule of safety refused."""
ROLLBACK = "rollback"
"""The run went back; see `standing`."""
WORTH = "worth"
"""What removing a kernel would cost was measured."""
MARK = "mark"
"""A digest was recorded."""
NOTE = "note"
"""The controller said something without deciding anything."""

DECISION = "decision"
"""What a decision that is done next is expected to bring."""

NO_EVENTS = frozenset({VETO, ROLLBACK, WORTH, MARK, NOTE, DECISION})
"""Kinds of entries that change no seed."""

UNTOLD = frozenset({EventKind.HEALTH.value, EventKind.LATENCY.value})
"""Kinds of events that are measurements, one at every boundary, and make no history."""

DECISIONS: dict[str, str] = {
    EventKind.LOAD: "graft asked for",
    EventKind.CANCEL: "graft called off",
    EventKind.FAIL: "graft failed",
    EventKind.FOSSILIZE: "fossilised",
    EventKind.UNLOAD: "unloaded",
    EventKind.RESET: "reset",
    EventKind.ERRORS: "failures in a row",
    EventKind.FOLD: "folded into the host",
}
"""What decided a seed's fate, in words."""

_OTHERS: dict[str, str] = {
    EventKind.ACTIVATE: "kernel at work",
    EventKind.ALPHA: "alpha set to",
    EventKind.INCUBATE: "incubation begun",
    EventKind.UNCALLED: "layer not called",
}


def describe_entry(entry: Mapping[str, Any]) -> str:
    """An entry in a few words, such as `graft asked for` or `cosine ramp to 1 over 100 steps`.

    Kinds that are not known are called by their names.
    """
    kind = str(entry.get("kind"))
    value = entry.get("value")
    match kind:
        case "errors":
            return f"{_short(value)} {DECISIONS[kind]}"
        case "ramp":
            shape = str(entry.get("shape") or "linear")
            named = "" if shape == "linear" else f"{shape} "
            return f"{named}ramp to {_short(value)} over {_short(entry.get('span'))} steps"
        case "alpha":
            return f"{_OTHERS[kind]} {_short(value)}"
        case "veto":
            return f"vetoed: {entry.get('action')}"
        case "rollback":
            return f"rolled back to step {_short(entry.get('to'))}"
        case "worth":
            return f"worth {_short(value)}{_interval(entry)}"
        case "mark":
            return f"mark: {entry.get('name')}"
        case "decision":
            return f"{entry.get('action')} expected to bring {_short(value)}{_interval(entry)}"
        case "note":
            return "the controller notes"
    return DECISIONS.get(kind) or _OTHERS.get(kind) or kind


def explain_entry(entry: Mapping[str, Any]) -> str:
    """Why an entry was made, as far as it says; may be empty."""
    kind = entry.get("kind")
    if kind == VETO:
        return _joined(": ", entry.get("rule"), entry.get("reason"))
    if kind == ROLLBACK:
        return _joined("; ", entry.get("cause"), entry.get("remedy"))
    return str(entry.get("reason") or "")


def standing(entries: Iterable[Mapping[str, Any]]) -> list[bool]:
    """For each entry of a whole ledger, in order, whether it still holds.

    A rollback takes back the lines after its `lines`, up to itself; it holds as what happened.
    """
    held: list[bool] = []
    for entry in entries:
        if entry.get("kind") == ROLLBACK:
            kept = lines_kept(entry, len(held))
            held[kept:] = [False] * (len(held) - kept)
        held.append(True)
    return held


def lines_kept(rollback: Mapping[str, Any], before: int) -> int:
    """How many of the `before` lines that stand before a rollback it keeps."""
    lines = rollback.get("lines")
    return min(max(lines, 0), before) if isinstance(lines, int) else before


def kept_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measurements by step: those that a run took back, and made again, are left out."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _short(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "?"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _interval(entry: Mapping[str, Any]) -> str:
    low, high = entry.get("low"), entry.get("high")
    if isinstance(low, int | float) and isinstance(high, int | float):
        return f" ({_short(low)} to {_short(high)})"
    return ""


def _joined(between: str, *parts: object) -> str:
    return between.join(str(part) for part in parts if part)
