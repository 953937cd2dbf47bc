"""Replaying a run: its ledger verified, and folded to the states it recorded."""

import dataclasses
from pathlib import Path

from esper.checkpoints import checkpoint_steps, verify_checkpoint
from esper.errors import LedgerError
from esper.tolaria._ledger import MARK, Cursor, entry_event, read_ledger
from esper.tolaria._run_folder import RunFolder, open_run
from esper.tolaria._tasks import load_task
from esper_functional import (
    KasminaException,
    SeedState,
    advance,
    apply_event,
    init_seeds,
    state_digest,
)


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a replay found; nothing in it disagreed."""

    folder: RunFolder
    lines: int
    events: int
    step: int
    """The step of the last entry."""
    digest: str
    """Of the folded seed state."""
    state: SeedState
    verified: tuple[tuple[int, str], ...]
    """Steps at which the fold was held against a recorded digest, and by whom it was recorded."""


def replay_run(path: Path) -> Replay:
    """Verify a run's ledger and fold it to its last state.

    The fold is compared with the digest in every checkpoint and with the one at
    the run's end.

    Raises:
        RunFolderError: where there is no run.
        LedgerError: where a line is damaged, or the fold gives another digest.
        CheckpointError: where a file of a checkpoint is damaged.
    """
    folder = open_run(path)
    config = folder.config
    rows = len(load_task(config.task).host_sizes) - 1
    expected: dict[Cursor, list[tuple[int, int, str]]] = {}
    for step in checkpoint_steps(folder.checkpoints):
        meta = verify_checkpoint(folder.checkpoints, step)["meta"]
        offset, lines, digest = meta["ledger"]
        at = Cursor(int(offset), int(lines), str(digest))
        expected.setdefault(at, []).append((step, int(meta["advanced"]), meta["digest"]))
    state = init_seeds(rows, config.seeds_per_layer)
    verified: list[tuple[int, str]] = []
    start = Cursor(0, 0, folder.genesis)
    events = step = 0

    def check(at: Cursor, state: SeedState) -> None:
        for when, advanced, digest in expected.pop(at, []):
            then = advance(state, advanced)
            _compare(path, f"the checkpoint of step {when}", then, digest)
            verified.append((when, "checkpoint"))

    cursor = start
    check(cursor, state)
    for entry in read_ledger(folder.ledger, folder.genesis):
        cursor, step = entry.after, int(entry.data["step"])
        if entry.data["kind"] == MARK:
            state = advance(state, step)
            _compare(path, f"line {entry.number}", state, entry.data["seeds"])
            verified.append((step, entry.data["name"]))
        else:
            try:
                state = apply_event(state, entry_event(entry.data))
            except KasminaException as error:
                raise LedgerError(
                    f"the ledger {folder.ledger} contradicts itself at line {entry.number}: {error}"
                ) from error
            events += 1
        check(cursor, state)
    if expected:
        when = min(found[0][0] for found in expected.values())
        raise LedgerError(
            f"the ledger {folder.ledger} is damaged: the checkpoint of step {when} has seen lines"
            " that are not there. Restore it from a copy."
        )
    return Replay(
        folder=folder,
        lines=cursor.lines,
        events=events,
        step=step,
        digest=state_digest(state),
        state=state,
        verified=tuple(verified),
    )


def _compare(path: Path, where: str, state: SeedState, digest: str) -> None:
    found = state_digest(state)
    if found != digest:
        raise LedgerError(
            f"the ledger of {path} does not fold to what was recorded: at {where} the seeds'"
            f" digest is {digest[:12]}…, and the fold gives {found[:12]}…"
        )
