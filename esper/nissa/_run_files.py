"""Folders of runs, looked at from outside: which there are, what they are, and how they stand."""

import dataclasses
import json
import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Any

from esper.errors import InputError
from esper.nissa._entries import MARK
from esper.nissa._tail import last_line

SCHEMA_VERSION = 2
"""Of the newest `run.json` that is understood."""

QUIET = 60.0
"""Seconds without a word after which a run that nobody holds counts as stale."""

MOST_RUNS = 2_000
"""Runs of a folder that are listed."""

_DEEPEST = 6
_PASSED_OVER = {"checkpoints", "library", "tensorboard", "node_modules", "__pycache__"}


class State(StrEnum):
    """How a run stands."""

    TRAINING = "training"
    """A process holds it, or it wrote something lately."""
    ENDED = "ended"
    """It has reached its last step."""
    STALE = "stale"
    """It has not ended, and nobody goes on with it: interrupted, or dead."""
    UNREADABLE = "unreadable"
    """Its `run.json` is damaged, or of a newer version."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What `run.json` says."""

    config: dict[str, Any]
    versions: dict[str, str]
    sites: tuple[str, ...]
    """Names of the layers that may grow, by row; empty for older runs, which do not tell."""
    task: str

    @property
    def steps(self) -> int:
        """At which the run ends; 0 where it does not say."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else 0

    @property
    def label(self) -> str:
        """Task, backend and random seed, as far as they are known."""
        parts = [self.task, self.config.get("backend"), _seed(self.config)]
        return " · ".join(str(part) for part in parts if part)


def _seed(config: dict[str, Any]) -> str:
    return f"seed {config['seed']}" if "seed" in config else ""


def describe_run(path: Path) -> Description:
    """Read a run's `run.json`.

    Raises:
        InputError: where it cannot be read, or was written by a newer version.
    """
    file = path / "run.json"
    try:
        content = json.loads(file.read_bytes())
        schema = content["schema_version"]
        if not isinstance(schema, int):
            raise TypeError(f"its schema_version is {schema!r}, expected a whole number")
        if schema > SCHEMA_VERSION:
            raise InputError(
                f"{file} has schema version {schema}, this Esper reads up to {SCHEMA_VERSION}: it"
                " was written by a newer version, so watch it with that one"
            )
        config = dict(content["config"])
        host = dict(content.get("host") or {})
        task = dict(content.get("task") or {})
        return Description(
            config=config,
            versions={str(k): str(v) for k, v in dict(content.get("versions") or {}).items()},
            sites=tuple(str(site) for site in host.get("sites") or ()),
            task=str(task.get("name") or config.get("task") or ""),
        )
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{file} is damaged: {what}. Restore it from a copy, or watch another run."
        ) from error


def find_runs(root: Path) -> dict[str, Path]:
    """The runs at or below a folder, by their path from there ("." for itself), in order.

    Links are not followed, and folders inside of a run are not searched.

    Raises:
        InputError: where the folder is not there, is none, or holds no run.
    """
    try:
        if not root.exists():
            raise InputError(f"there is no folder {root}: give the folder of a run, or one of runs")
        if not root.is_dir():
            raise InputError(f"{root} is a file: give the folder of a run, or one of runs")
        found = list_runs(root)
    except OSError as error:
        raise InputError(f"the folder {root} cannot be read: {error.strerror or error}") from error
    if not found:
        raise InputError(
            f"no run in {root}: neither it nor a folder in it holds a run.json; esper grow makes"
            " one"
        )
    return found


def list_runs(root: Path) -> dict[str, Path]:
    """As `find_runs`, but empty where there are none.

    Raises:
        OSError: where the folder itself cannot be read.
    """
    if (root / "run.json").is_file():
        return {".": root}
    found: dict[str, Path] = {}
    os.listdir(root)  # noqa: PTH208  (a walk passes over what cannot be read)
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        if "run.json" in files:
            found[here.relative_to(root).as_posix()] = here
            folders.clear()
            if len(found) >= MOST_RUNS:
                break
        elif len(here.relative_to(root).parts) >= _DEEPEST:
            folders.clear()
        else:
            folders[:] = sorted(
                (name for name in folders if name not in _PASSED_OVER and name[0] != "."),
                key=_natural,
            )
    return found


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A key by which seed-2 comes before seed-10."""
    pieces: list[tuple[int, int, str]] = []
    word = ""
    for char in [*name, ""]:
        if word and (not char or char.isdecimal() != word[-1].isdecimal()):
            pieces.append((0, int(word), "") if word.isdecimal() else (1, 0, word))
            word = ""
        word += char
    return pieces, name


def is_mark_of_end(entry: Any) -> bool:
    """Whether a ledger's entry says that the run has reached its last step."""
    return entry.get("kind") == MARK and entry.get("name") == "end"


def state_of(path: Path, description: Description, *, ended: bool, step: int) -> State:
    """How a run stands.

    Args:
        ended: its ledger says so.
        step: of its newest measurement.
    """
    if ended or (description.steps and step >= description.steps):
        return State.ENDED
    if is_held(path) or idle_seconds(path) <= QUIET:
        return State.TRAINING
    return State.STALE


def idle_seconds(path: Path) -> float:
    """Seconds since a run last wrote something; infinite where nothing is there."""
    newest = max((_modified(path / name) for name in _WRITTEN), default=0.0)
    return max(0.0, time.time() - newest) if newest else float("inf")


_WRITTEN = ("metrics.jsonl", "events.jsonl", "run.json")


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def is_held(path: Path) -> bool:
    """Whether a process holds a run's lock, as far as the system tells; False where it does not.

    The lock itself is not tried: a trainer that begins at that moment would find it taken.
    """
    try:
        status = (path / "run.json").stat()
        locks = Path("/proc/locks").read_text()
    except (OSError, UnicodeDecodeError):
        return False
    major, minor = os.major(status.st_dev), os.minor(status.st_dev)
    place = f"{major:02x}:{minor:02x}:{status.st_ino}"
    return any("FLOCK" in line and place in line.split() for line in locks.splitlines())


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run in one line of a list."""

    name: str
    state: State
    label: str = ""
    step: int | None = None
    steps: int = 0
    accuracy: float | None = None
    """On the test part, in [0, 1]."""
    trouble: str = ""
    """Why it cannot be read."""


def summarise_run(path: Path, name: str) -> tuple[Summary, dict[str, Any]]:
    """A run's line in a list, and its newest measurement; both from the ends of its files."""
    try:
        description = describe_run(path)
    except InputError as error:
        return Summary(name, State.UNREADABLE, trouble=str(error)), {}
    row = _parsed(path / "metrics.jsonl")
    entry = _parsed(path / "events.jsonl").get("entry")
    step = row.get("step")
    step = step if isinstance(step, int) else None
    accuracy = row.get("test_accuracy")
    ended = isinstance(entry, dict) and is_mark_of_end(entry)
    summary = Summary(
        name=name,
        state=state_of(path, description, ended=ended, step=-1 if step is None else step),
        label=description.label,
        step=step,
        steps=description.steps,
        accuracy=float(accuracy) if isinstance(accuracy, int | float) else None,
    )
    return summary, row


def _parsed(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(last_line(path) or b"{}")
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
