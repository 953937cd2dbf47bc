"""The ledger of a run: every change of a seed, one line each, chained by hash.

A line is `{"entry": …, "hash": h}` with h = SHA-256(previous hash + entry); the
first line follows the SHA-256 of `run.json`. Nothing in an entry depends on a
clock, so a resumed run writes the very lines that it wrote before: it is held
against them, and a difference is an error.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from esper.errors import LedgerError
from esper_functional import Event, EventKind

MARK = "mark"
"""The kind of an entry that records a digest instead of an event."""
DECISION = "decision"
"""The kind of an entry that says what the decision is expected to bring that is done next."""
NOTE = "note"
"""The kind of an entry that holds what a controller said besides."""
ROLLBACK = "rollback"
"""The kind of an entry from which on the run is again what an earlier line led to."""


class Cursor(NamedTuple):
    """A place in a ledger: bytes and lines before it, and the hash of the last of them."""

    offset: int
    lines: int
    hash: str


class Entry(NamedTuple):
    """One line as read."""

    number: int
    """From 1."""
    data: dict[str, Any]
    after: Cursor
    """The place behind it."""


def _chain(previous: str, entry: str) -> str:
    return hashlib.sha256((previous + entry).encode()).hexdigest()


def _text(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)


def event_entry(event: Event, reason: str = "") -> dict[str, Any]:
    """An event as a ledger entry."""
    return {
        "step": event.step,
        "layer": event.layer,
        "seed": event.seed,
        "kind": event.kind.value,
        "kernel": event.kernel_id,
        "value": float(event.value),
        "span": event.span,
        **({"shape": event.shape} if event.kind is EventKind.RAMP else {}),
        "reason": reason,
    }


def entry_event(entry: dict[str, Any]) -> Event:
    """The event of an entry that is not a mark."""
    return Event(
        step=entry["step"],
        layer=entry["layer"],
        seed=entry["seed"],
        kind=EventKind(entry["kind"]),
        kernel_id=entry["kernel"],
        value=entry["value"],
        span=entry["span"],
        shape=entry.get("shape", "linear"),
    )


def read_ledger(path: Path, genesis: str) -> Iterator[Entry]:
    """The entries of a ledger, each verified.

    A last line without its newline was never acknowledged and is passed over.

    Raises:
        LedgerError: at the first line that is damaged, naming it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"the ledger {path} cannot be read: {error}") from error
    cursor = Cursor(0, 0, genesis)
    for line in data.split(b"\n")[:-1]:
        number = cursor.lines + 1
        try:
            parsed = json.loads(line)
            entry, claimed = parsed["entry"], parsed["hash"]
            text = _text(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError(_damaged(path, number, f"it cannot be parsed ({error})")) from error
        expected = _chain(cursor.hash, text)
        if claimed != expected:
            raise LedgerError(
                _damaged(path, number, f"its hash is {str(claimed)[:12]}…, expected"
                         f" {expected[:12]}…")
            )  # fmt: skip
        if line != _line(entry, expected):
            raise LedgerError(_damaged(path, number, "it is not in the canonical form"))
        cursor = Cursor(cursor.offset + len(line) + 1, number, expected)
        yield Entry(number, entry, cursor)


def _damaged(path: Path, number: int, what: str) -> str:
    return (
        f"the ledger {path} is damaged at line {number}: {what}. It was changed after it was"
        " written; restore it from a copy, or start a new run."
    )


def _line(entry: dict[str, Any], digest: str) -> bytes:
    return f'{{"entry":{_text(entry)},"hash":"{digest}"}}'.encode()


class Ledger:
    """An append-only ledger, opened at a place from which a run goes on.

    Args:
        at: the place; what lies behind it must be written again just as it was.
        genesis: hash that the first line follows.
    """

    def __init__(self, path: Path, genesis: str, at: Cursor | None = None) -> None:
        self.path = path
        self.cursor = at or Cursor(0, 0, genesis)
        known = path.read_bytes() if path.exists() else b""
        self._whole = known.rfind(b"\n") + 1
        self._ahead = known[self.cursor.offset : self._whole]
        self._file: BinaryIO | None = None
        self._synced = True

    def _opened(self) -> BinaryIO:
        """The file, opened at the first line that is new: until then nothing is touched."""
        if self._file is None:
            self._file = self.path.open("r+b" if self.path.exists() else "w+b")
            # A torn last line was never acknowledged.
            self._file.truncate(self._whole)
            self._file.seek(0, os.SEEK_END)
        return self._file

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Write entries: they outlast the process, and after `sync` the machine.

        Raises:
            LedgerError: where a resumed run does otherwise than it did before.
            OSError: where the disk does not take them.
        """
        fresh = b""
        for entry in entries:
            digest = _chain(self.cursor.hash, _text(entry))
            line = _line(entry, digest) + b"\n"
            if self._ahead:
                if not self._ahead.startswith(line):
                    recorded = self._ahead.split(b"\n", 1)[0].decode()
                    raise LedgerError(
                        f"this run does otherwise than its record: line {self.cursor.lines + 1} of"
                        f" {self.path} is {recorded[:200]}, and now"
                        f" it would be {line.decode()[:200]}. Resume on the machine and with the"
                        " library versions that began it (see run.json)."
                    )
                self._ahead = self._ahead[len(line) :]
            else:
                fresh += line
            self.cursor = Cursor(self.cursor.offset + len(line), self.cursor.lines + 1, digest)
        if fresh:
            file = self._opened()
            file.write(fresh)
            file.flush()
            self._synced = False

    def sync(self) -> None:
        """Wait until all that was written is on the disk.

        Training waits for it only before a checkpoint, which refers to a place in the ledger: what
        a machine that loses power forgets behind that, the run writes again just as it was.

        Raises:
            OSError: where the disk does not take it.
        """
        if self._file is not None and not self._synced:
            os.fsync(self._file.fileno())
            self._synced = True

    def recorded_rollback(self, step: int) -> str | None:
        """Why the run was taken back at `step` the last time, where that is what it did next."""
        if not self._ahead:
            return None
        entry = json.loads(self._ahead.split(b"\n", 1)[0])["entry"]
        back = entry["kind"] == ROLLBACK and entry["step"] == step
        return str(entry["cause"]) if back else None

    def recorded_notes(self, step: int) -> list[str] | None:
        """What was noted next the last time, as far as that was at `step`.

        None where nothing came next: all that was recorded is written again.
        """
        if not self._ahead:
            return None
        found: list[str] = []
        for line in io.BytesIO(self._ahead):
            entry = json.loads(line)["entry"]
            if entry["kind"] != NOTE or entry["step"] != step:
                break
            found.append(str(entry["reason"]))
        return found

    def close(self) -> None:
        """Close the file, when all of it is on the disk."""
        if self._file is not None and not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()
