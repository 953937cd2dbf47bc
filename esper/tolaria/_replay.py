"""Replaying a run: its ledger verified, and folded to the states it recorded."""

import dataclasses
from pathlib import Path

from esper.checkpoints import checkpoint_steps, verify_checkpoint
from esper.errors import InputError, LedgerError
from esper.nissa import read_metrics
from esper.tolaria._fold import Fold
from esper.tolaria._ledger import MARK, Cursor, read_ledger
from esper.tolaria._measured import check_measurements
from esper.tolaria._run_folder import RunFolder, open_run
from esper.tolaria.tasks import load_task
from esper_functional import SeedState, advance, state_digest


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a replay found; nothing in it disagreed."""

    folder: RunFolder
    lines: int
    events: int
    rollbacks: int
    step: int
    """The step of the last entry, or the one that was asked for."""
    digest: str
    """Of the folded seed state."""
    state: SeedState
    verified: tuple[tuple[int, str], ...]
    """Steps at which the fold was held against a recorded digest, and by whom it was recorded."""


def replay_run(path: Path, *, to: int | None = None) -> Replay:
    """Verify a run's ledger and fold it.

    The fold is compared with the digest in every checkpoint and with the one at
    the run's end.

    Args:
        to: the step before which the state is wanted; None for the last one.

    Raises:
        RunFolderError: where there is no run.
        InputError: for a step that the run does not have.
        LedgerError: where a line is damaged, or the fold gives another digest.
        CheckpointError: where a file of a checkpoint is damaged.
        EsperError: where measurements are damaged, or not those that the ledger saw at the end.
    """
    folder = open_run(path)
    if to is not None and not 0 <= to <= folder.config.steps:
        raise InputError(f"the run {path} has the steps 0 to {folder.config.steps}, and not {to}")
    fold = Fold(site_count(folder), folder.config.seeds_per_layer)
    expected = _expected(folder)
    verified: list[tuple[int, str]] = []
    step = 0

    def check(at: Cursor) -> None:
        for when, advanced, digest in expected.pop(at, []):
            then = advance(fold.state, advanced)
            _compare(path, f"the checkpoint of step {when}", then, digest)
            verified.append((when, "checkpoint"))

    cursor = Cursor(0, 0, folder.genesis)
    check(cursor)
    for entry in read_ledger(folder.ledger, folder.genesis):
        cursor, step = entry.after, int(entry.data["step"])
        fold.take(entry, folder.ledger)
        if entry.data["kind"] == MARK:
            _compare(path, f"line {entry.number}", advance(fold.state, step), entry.data["seeds"])
            verified.append((step, entry.data["name"]))
            if folder.metrics.exists() and check_measurements(
                folder.metrics, read_metrics(folder.metrics), entry.data
            ):
                verified.append((step, "measurements"))
        check(cursor)
    if expected:
        when = min(found[0][0] for found in expected.values())
        raise LedgerError(
            f"the ledger {folder.ledger} is damaged: the checkpoint of step {when} has seen lines"
            " that are not there. Restore it from a copy."
        )
    state = advance(fold.state, step) if to is None else fold.at(to)
    return Replay(
        folder=folder,
        lines=cursor.lines,
        events=fold.events,
        rollbacks=fold.rollbacks,
        step=step if to is None else to,
        digest=state_digest(state),
        state=state,
        verified=tuple(verified),
    )


def site_count(folder: RunFolder) -> int:
    """How many layers with seeds a run's host has."""
    if folder.host is not None:
        return len(folder.host.sites)
    return len(load_task(folder.config.task).host_sizes) - 1


def _expected(folder: RunFolder) -> dict[Cursor, list[tuple[int, int, str]]]:
    """What checkpoints say of the fold, by their places in the ledger."""
    expected: dict[Cursor, list[tuple[int, int, str]]] = {}
    for step in checkpoint_steps(folder.checkpoints):
        meta = verify_checkpoint(folder.checkpoints, step)["meta"]
        offset, lines, digest = meta["ledger"]
        at = Cursor(int(offset), int(lines), str(digest))
        expected.setdefault(at, []).append((step, int(meta["advanced"]), meta["digest"]))
    return expected


def _compare(path: Path, where: str, state: SeedState, digest: str) -> None:
    found = state_digest(state)
    if found != digest:
        raise LedgerError(
            f"the ledger of {path} does not fold to what was recorded: at {where} the seeds'"
            f" digest is {digest[:12]}…, and the fold gives {found[:12]}…"
        )
