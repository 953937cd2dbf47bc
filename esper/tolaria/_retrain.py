"""Training a stretch of a run once more, and holding it against the record, bit by bit."""

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esper.checkpoints import checkpoint_steps, load_checkpoint, tree_digest
from esper.errors import InputError, Interrupted, LedgerError
from esper.nissa import OF_THE_PROCESS, read_metrics
from esper.oona import InProcessBus
from esper.tolaria._build import check_task, make_trainee, make_trainer
from esper.tolaria._departure import depart
from esper.tolaria._hooks import Hooks
from esper.tolaria._ledger import MARK, ROLLBACK, Entry, Ledger, read_ledger
from esper.tolaria._measured import check_measurements
from esper.tolaria._run_folder import RunFolder, open_run
from esper.tolaria.tasks import Task
from esper.urza import Library


@dataclasses.dataclass(frozen=True)
class Retrained:
    """A stretch that was trained once more; all of it was equal to the record."""

    began: int
    """The step of the checkpoint that it began from; 0 for the run's beginning."""
    last: int
    lines: int
    """Lines of the ledger that were written again."""
    boundaries: int
    """Measurements that were equal."""
    checkpoints: tuple[int, ...]
    """Steps at which all arrays were equal."""


def retrain_run(path: Path, first: int, last: int, *, task: Task | None = None) -> Retrained:
    """Train the steps from `first` to `last` again, from the last checkpoint before them.

    Every line of the ledger, every measurement and every checkpoint on the way is held against
    what was recorded. The run's folder is only read.

    Args:
        task: the user's own, where the run was started with one.

    Raises:
        InputError: for a stretch that the record does not hold, and for other data.
        LedgerError: at the first thing that differs, or where the record is damaged.
        CheckpointError, ArtifactError, LibraryError: where something is damaged or gone.
        EsperError: where measurements are not those that the ledger saw at the run's end.
    """
    folder = open_run(path)
    entries = list(read_ledger(folder.ledger, folder.genesis))
    rows = read_metrics(folder.metrics)
    for entry in entries:
        if entry.data["kind"] == MARK:
            check_measurements(folder.metrics, rows, entry.data)
    recorded = [row for row in rows if row["step"] <= last]
    reached = max((row["step"] for row in rows), default=0)
    if not 0 <= first < last <= reached:
        raise InputError(
            f"the stretch {first}..{last} cannot be trained again: expected FROM..TO within the"
            f" steps 0 to {reached} that the run {path} has recorded"
        )
    task = check_task(folder, task)
    start = depart(folder, at=first)
    library = Library(folder.library, create=False)
    with tempfile.TemporaryDirectory(prefix="esper-retrain-") as place:
        copy = dataclasses.replace(folder, path=Path(place))
        shutil.copyfile(folder.ledger, copy.ledger)
        watch = _Watch(recorded, entries, start.step, last)
        ledger = Ledger(copy.ledger, folder.genesis, start.cursor)
        watch.ledger = ledger
        trainer = make_trainer(
            copy,
            task,
            make_trainee(task, folder.config),
            library,
            ledger=ledger,
            bus=InProcessBus(),
            hooks=Hooks(stop=watch.done, on_step=watch.on_step, on_boundary=watch.on_boundary),
            past=[row for row in rows if row["step"] < start.step],
            asks=False,
        )
        try:
            if start.saved is not None:
                trainer.restore(*start.saved)
            trainer.run(start.step)
        except Interrupted:
            pass
        finally:
            library.close()
        equal = _equal_checkpoints(folder, copy, start.step, last)
    begun = 0 if start.cursor is None else start.cursor.lines
    return Retrained(start.step, last, ledger.cursor.lines - begun, watch.boundaries, equal)


class _Watch:
    """Compares measurements, and says when the stretch is over."""

    ledger: Ledger

    def __init__(
        self,
        recorded: Sequence[Mapping[str, Any]],
        entries: Sequence[Entry],
        began: int,
        last: int,
    ) -> None:
        self._recorded = {int(row["step"]): row for row in recorded}
        self._last = last
        self._now = began
        back = [e.number for e in entries if e.data["kind"] == ROLLBACK and e.data["to"] < last]
        self._through = max(back, default=0)
        """The line from which on the run is not taken back before `last` any more."""
        self._ends = [e for e in entries if e.data["kind"] == MARK and e.data["name"] == "end"]
        self.boundaries = 0

    def on_step(self, step: int, loss: Any) -> None:
        del loss
        self._now = step + 1

    def on_boundary(self, row: Mapping[str, Any]) -> None:
        step = int(row["step"])
        known = self._recorded.get(step)
        if known is None:
            return
        for key, value in known.items():
            if key not in OF_THE_PROCESS and row.get(key) != value:
                raise LedgerError(
                    f"retraining differs from the record at step {step}: {key} was {value}, and"
                    f" is now {row.get(key)}. Either the record was changed (esper replay tells,"
                    " where the run has ended), or this is not the machine, or not the library"
                    " versions, that it was trained with (see run.json)"
                )
        self.boundaries += 1

    def done(self) -> bool:
        return self._now >= self._last and self.ledger.cursor.lines >= self._through


def _equal_checkpoints(
    folder: RunFolder, copy: RunFolder, began: int, last: int
) -> tuple[int, ...]:
    again = set(checkpoint_steps(copy.checkpoints))
    steps = [step for step in checkpoint_steps(folder.checkpoints) if began < step <= last]
    compared: list[int] = []
    for step in (step for step in steps if step in again):
        was, now = (_digest(place, step) for place in (folder, copy))
        if was != now:
            raise LedgerError(
                f"retraining differs from the record in the arrays of step {step}: their SHA-256"
                f" was {was[:12]}…, and is now {now[:12]}…"
            )
        compared.append(step)
    return tuple(compared)


def _digest(folder: RunFolder, step: int) -> str:
    """Of the arrays before a step, whether the run was interrupted there or went on."""
    tree = load_checkpoint(folder.checkpoints, step)[0]
    return tree_digest({name: part for name, part in tree.items() if name != "held"})
