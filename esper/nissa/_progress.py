"""A progress bar of a run, fed by the bus."""

from collections import Counter
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from esper.nissa._entries import ROLLBACK, VETO
from esper.oona import Bus, Topic

_STAGES = ("dormant", "loading", "active", "recovering", "fossil")


def describe_stages(stages: list[list[int]]) -> str:
    """Seeds by stage in words, such as `6 dormant, 2 fossil`."""
    flat = [stage for row in stages for stage in row]
    counts = [(flat.count(i), name) for i, name in enumerate(_STAGES)]
    return ", ".join(f"{count} {name}" for count, name in counts if count)


class ProgressView:
    """Shows step, loss, accuracy and seeds by stage; use as a context manager.

    It says how many decisions were vetoed, and how often the run was rolled back.
    """

    def __init__(self, bus: Bus, label: str, steps: int, console: Console) -> None:
        self._messages = bus.subscribe(Topic.METRICS, capacity=64)
        self._entries = bus.subscribe(Topic.SEED_EVENT)
        self._counts: Counter[str] = Counter()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=console,
            # Elsewhere a bar is noise; one line at the end says what came of it.
            disable=not console.is_terminal,
        )
        self._console = console
        self._label = label
        self._told = ""
        self._task = self._progress.add_task(label, total=steps, told="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.refresh()
        self._progress.stop()
        if error is None and not self._console.is_terminal:
            told = f"{self._label}: {self._told}"
            self._console.print(told, highlight=False, markup=False, soft_wrap=True)

    def refresh(self) -> None:
        """Show the newest measurement."""
        kinds = [str(message.payload.get("kind")) for message in self._entries.drain()]
        self._counts.update(kind for kind in kinds if kind in (VETO, ROLLBACK))
        waiting = self._messages.drain()
        if waiting:
            row = waiting[-1].payload
            counted = [(self._counts[VETO], "vetoed"), (self._counts[ROLLBACK], "rolled back")]
            more = "".join(f", {count} {what}" for count, what in counted if count)
            self._told = _describe(dict(row)) + more
            self._progress.update(self._task, completed=row["step"], told=self._told)


def _describe(row: dict[str, Any]) -> str:
    loss = row["train_loss"]
    shown = "–" if loss is None else f"{loss:.4f}"
    told = f"loss {shown}  test accuracy {row['test_accuracy']:.1%}"
    return f"{told}  {describe_stages(row['stages'])}"
