"""One run as it is watched: its files followed, and what a page needs of them kept at hand."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper.nissa._entries import ROLLBACK, UNTOLD, WORTH, describe_entry, explain_entry, lines_kept
from esper.nissa._history import History, number
from esper.nissa._run_files import (
    Description,
    State,
    describe_run,
    idle_seconds,
    is_mark_of_end,
    state_of,
)
from esper.nissa._tail import CHUNK, Line, Tail

ENTRIES = 2_000
"""Most entries at hand; older ones go first, and are counted."""

PROBLEMS = 50
"""Most damaged lines that are told of; the rest are counted."""

Worth = tuple[int, float | None, float | None, float | None]
"""Step, value, low and high."""

_BEFORE, _BEHIND, _END = b'{"entry":', b',"hash":"', b'"}'
"""What stands around an entry's text and its hash."""

_UNTOLD_MARKS = [f'"kind":"{kind}"'.encode() for kind in UNTOLD]

_HOLDS = {"load"}
_EMPTIES = {"cancel", "unload", "reset", "fold"}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something in a file that could not be read."""

    file: str
    line: int
    what: str


@dataclasses.dataclass(frozen=True)
class Told:
    """An entry of the ledger, for people."""

    line: int
    data: dict[str, Any]
    """step, layer, seed, kind, what, kernel, reason; of rollbacks `to` and `lines`."""


@dataclasses.dataclass(frozen=True)
class _Move:
    """A seed got a kernel, or lost it, or the worth of its kernel was measured."""

    line: int
    place: tuple[int, int]
    kernel: tuple[str, int] | None = None
    """And the step it was asked for at."""
    worth: Worth | None = None


class WatchedRun:
    """Follows the files of one run.

    Args:
        path: its folder.
        name: what it is called among others.

    Raises:
        InputError: where its run.json cannot be read, or is of a newer version.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self.description: Description = describe_run(path)
        self._events = Tail(path / "events.jsonl")
        self._metrics = Tail(path / "metrics.jsonl")
        self.version = 0
        """Counts changes."""
        self.epoch = 0
        """Counts how often all was read anew."""
        self._forget_events()
        self._forget_metrics()

    def _forget_events(self) -> None:
        self.entries: list[Told] = []
        self.forgotten = 0
        """Entries that were let go."""
        self.ended = False
        self._hash = b""
        self.kernels: dict[tuple[int, int], tuple[str, int]] = {}
        """For each seed that holds or awaits one: its kernel, and the step it was asked for at."""
        self.worths: dict[tuple[int, int], Worth] = {}
        """For each seed whose present kernel was measured: the newest measurement."""
        self._moves: list[_Move] = []
        self._event_problems: list[Problem] = []

    def _forget_metrics(self) -> None:
        self.history = History()
        self.last: dict[str, Any] = {}
        """The newest measurement."""
        self._metric_problems: list[Problem] = []

    @property
    def problems(self) -> list[Problem]:
        """What could not be read, `PROBLEMS` of each file at most and one that counts the rest."""
        return self._event_problems + self._metric_problems

    @property
    def state(self) -> State:
        """Whether it is being trained."""
        step = self.last.get("step", -1)
        return state_of(self.path, self.description, ended=self.ended, step=step)

    @property
    def idle(self) -> float:
        """Seconds since something was written."""
        return idle_seconds(self.path)

    def poll(self, chunk: int = CHUNK) -> bool:
        """Read what is new; True where there is more to read at once.

        Raises:
            OSError: where a file is there and cannot be read.
        """
        events = self._events.read(chunk)
        if events.anew:
            self.epoch += 1
            self._forget_events()
        for line in events.fresh:
            self._take_event(line)
        metrics = self._metrics.read(chunk)
        if metrics.anew:
            self.epoch += 1
            self._forget_metrics()
        for line in metrics.fresh:
            self._take_row(line)
        more = events.more or metrics.more
        if events.fresh or metrics.fresh or events.anew or metrics.anew:
            self.version += 1
        return more

    def poll_to_end(self) -> None:
        """Read all there is.

        Raises:
            OSError: where a file is there and cannot be read.
        """
        while self.poll():
            pass

    # Lines

    def _take_event(self, line: Line) -> None:
        data = line.data
        text, claimed = _split(data)
        before, self._hash = self._hash, claimed
        if before and claimed and hashlib.sha256(before + text).hexdigest().encode() != claimed:
            what = "its hash does not follow from the line before; see esper replay"
            self._note(self._event_problems, "events.jsonl", line.number, what)
        # A quote inside of a text has a backslash before it, so only a kind can look like this.
        if claimed and any(mark in text for mark in _UNTOLD_MARKS):
            return
        try:
            entry = json.loads(data)["entry"]
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise ValueError("it is no entry of a ledger")
            if not claimed:
                raise ValueError("it is not in the form of a ledger's lines")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._hash = b""
            self._note(self._event_problems, "events.jsonl", line.number, _reason(error))
            return
        self._tell(line.number, entry)

    def _tell(self, line: int, entry: Mapping[str, Any]) -> None:
        kind = str(entry.get("kind"))
        place = (_whole(entry.get("layer")), _whole(entry.get("seed")))
        if kind in _HOLDS:
            self._move(_Move(line, place, (str(entry.get("kernel")), entry["step"])))
        elif kind in _EMPTIES:
            self._move(_Move(line, place))
        elif kind == WORTH:
            value, low, high = (number(entry.get(key)) for key in ("value", "low", "high"))
            self._move(_Move(line, place, worth=(entry["step"], value, low, high)))
        elif kind == ROLLBACK:
            moves = self._moves
            self._moves, self.kernels, self.worths = [], {}, {}
            for move in moves:
                if move.line <= lines_kept(entry, line - 1):
                    self._move(move)
        self.ended = is_mark_of_end(entry) or (self.ended and kind != ROLLBACK)
        data: dict[str, Any] = {
            "line": line,
            "step": entry["step"],
            "kind": kind,
            "what": describe_entry(entry),
            "reason": explain_entry(entry),
            "kernel": str(entry.get("kernel") or ""),
        }
        if "layer" in entry:
            data |= {"layer": place[0], "seed": place[1]}
        if kind == ROLLBACK:
            data |= {"to": _whole(entry.get("to")), "lines": lines_kept(entry, line - 1)}
        self.entries.append(Told(line, data))
        if len(self.entries) > ENTRIES + ENTRIES // 10:
            self.forgotten += len(self.entries) - ENTRIES
            del self.entries[:-ENTRIES]

    def _move(self, move: _Move) -> None:
        self._moves.append(move)
        if move.worth is not None:
            self.worths[move.place] = move.worth
            return
        self.worths.pop(move.place, None)
        if move.kernel is None:
            self.kernels.pop(move.place, None)
        else:
            self.kernels[move.place] = move.kernel

    def _take_row(self, line: Line) -> None:
        try:
            row = json.loads(line.data)
            if not isinstance(row, dict):
                raise ValueError("it is no measurement")
            self.history.append(row)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            self._note(self._metric_problems, "metrics.jsonl", line.number, _reason(error))
            return
        self.last = row

    def _note(self, problems: list[Problem], file: str, line: int, what: str) -> None:
        if len(problems) < PROBLEMS:
            problems.append(Problem(file, line, what))
        else:
            problems[-1] = Problem(file, line, "the last of more lines than are shown")


def _split(line: bytes) -> tuple[bytes, bytes]:
    """A ledger's line as its entry's text and its hash; empty where it has another form."""
    behind = len(_BEHIND) + 64 + len(_END)
    if not (
        line.startswith(_BEFORE) and line.endswith(_END) and line[-behind:].startswith(_BEHIND)
    ):
        return b"", b""
    return line[len(_BEFORE) : -behind], line[-64 - len(_END) : -len(_END)]


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]!r}"
    return f"it cannot be read ({error})" if str(error) else "it cannot be read"


def _whole(value: object) -> int:
    return value if isinstance(value, int) else -1
