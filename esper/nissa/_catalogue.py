"""The runs of a folder, looked at again and again without reading again what has not changed."""

import dataclasses
from pathlib import Path
from typing import Any

from esper.nissa._run_files import State, Summary, list_runs, summarise_run

_FILES = ("run.json", "events.jsonl", "metrics.jsonl")


@dataclasses.dataclass
class _Known:
    stamp: tuple[tuple[int, int, int], ...]
    summary: Summary
    row: dict[str, Any]


class Catalogue:
    """What runs there are below a folder, and how they stand.

    Runs that appear are found, and those whose folders are gone are let go.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths: dict[str, Path] = {}
        self._known: dict[str, _Known] = {}

    @property
    def summaries(self) -> list[Summary]:
        """As of the last `refresh`, in order."""
        return [self._known[name].summary for name in self.paths if name in self._known]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The newest measurement of each run that has one, as of the last `refresh`."""
        return {name: known.row for name, known in self._known.items() if known.row}

    def refresh(self) -> None:
        """Look at the folder again; where it cannot be read, it has no runs."""
        try:
            self.paths = list_runs(self.root)
        except OSError:
            self.paths = {}
        fresh: dict[str, _Known] = {}
        for name, path in self.paths.items():
            known, stamp = self._known.get(name), _stamp(path)
            # How the others stand depends on the clock, and on who holds them.
            settled = known is not None and known.summary.state in (State.ENDED, State.UNREADABLE)
            if known is None or known.stamp != stamp or not settled:
                known = _Known(stamp, *summarise_run(path, name))
            fresh[name] = known
        self._known = fresh


def _stamp(path: Path) -> tuple[tuple[int, int, int], ...]:
    """Changes when a file of a run does."""
    found: list[tuple[int, int, int]] = []
    for name in _FILES:
        try:
            status = (path / name).stat()
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            found.append((0, 0, 0))
    return tuple(found)
