"""From where a run goes on: what it has recorded, verified."""

from collections import deque
from typing import Any, NamedTuple

from esper.checkpoints import checkpoint_steps, load_checkpoint
from esper.errors import LedgerError
from esper.tolaria._ledger import MARK, Cursor, read_ledger
from esper.tolaria._run_folder import RunFolder


class Departure(NamedTuple):
    """From where a run goes on; all of it verified."""

    step: int
    saved: tuple[dict[str, Any], dict[str, Any]] | None
    """Arrays and meta values of the checkpoint, where there is one."""
    cursor: Cursor | None
    """The ledger's place at that step."""
    ended: bool
    """Whether the record has come to its end."""


def depart(folder: RunFolder, *, at: int | None = None) -> Departure:
    """Verify what a run has recorded, and find from where it goes on.

    Args:
        at: the last checkpoint that is not after this step is taken; None takes the last.

    Raises:
        LedgerError, CheckpointError: where it is damaged.
    """
    places = {Cursor(0, 0, folder.genesis)}
    ended = False
    for entry in read_ledger(folder.ledger, folder.genesis):
        places.add(entry.after)
        ended = entry.data["kind"] == MARK and entry.data["name"] == "end"
    steps = [step for step in checkpoint_steps(folder.checkpoints) if at is None or step <= at]
    if not steps:
        return Departure(0, None, None, ended)
    saved = load_checkpoint(folder.checkpoints, steps[-1])
    offset, lines, digest = saved[1]["ledger"]
    cursor = Cursor(int(offset), int(lines), str(digest))
    if cursor not in places:
        raise LedgerError(
            f"the ledger {folder.ledger} is damaged, or run.json was changed: the checkpoint of"
            f" step {steps[-1]} has seen {cursor.lines} lines up to the hash {cursor.hash[:12]}…,"
            " and they are not there. Restore them from a copy, or start a new run."
        )
    return Departure(steps[-1], saved, cursor, ended)


def is_last(folder: RunFolder, start: Departure) -> bool:
    """Whether the checkpoint is the one of the run's end."""
    lines = deque(read_ledger(folder.ledger, folder.genesis), maxlen=1)
    return bool(lines) and start.cursor == lines[0].after
