"""`esper grow`."""

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple

import typer
from rich.markup import escape
from rich.table import Table

from esper.cli._console import Trace, err, errors, out, say, show_table
from esper.cli._missing import fetching_told
from esper.errors import CheckpointError, InputError, Interrupted

_RESUME = "; what a run has recorded is whole, and it goes on with --resume"


class Stop:
    """Becomes true at the first Ctrl-C; a second one interrupts at once."""

    def __init__(self) -> None:
        self._asked = False
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        err.print(
            "[yellow]esper:[/] stopping after this step; once more stops at once", highlight=False
        )

    def __call__(self) -> bool:
        return self._asked


def grow(
    task: Annotated[
        str | None, typer.Option(help="spirals, digits, xor-N, shapes, grammar, cifar10:FOLDER, …")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="jax or torch.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the keys of a configuration.")
    ] = None,
    controller: Annotated[
        str | None, typer.Option(help="none, fixed, random, heuristic, bandit, learned or service.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=10_000, help="Number of runs, with seeds from `seed` on.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run (or runs); by default runs/TASK-BACKEND."),
    ] = None,
    bus: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Tell events and measurements here too: sqlite:PATH or redis://HOST:PORT/NUMBER.",
        ),
    ] = None,
    bus_capacity: Annotated[
        int, typer.Option(min=1, help="Messages that wait for the bus at most; more are dropped.")
    ] = 65_536,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with an interrupted run.")
    ] = None,
    traceback: Trace = False,
) -> None:
    """Train a network that grows, and record the run."""
    with errors(traceback, _RESUME):
        if resume is not None:
            given = {
                "--task": task,
                "--backend": backend,
                "--config": config,
                "--controller": controller,
                "--out": out,
            }
            extra = [name for name, value in given.items() if value is not None]
            if extra or seeds != 1:
                raise InputError(
                    f"--resume goes on with what the run began with; leave out"
                    f" {', '.join(extra) or '--seeds'}"
                )
            _resume(resume, _Told(bus, bus_capacity))
        else:
            given = {"task": task, "backend": backend, "controller": controller}
            own = {key: value for key, value in given.items() if value}
            _start(own, config, seeds, out, _Told(bus, bus_capacity))


class _Told(NamedTuple):
    """Who else is told of a run."""

    url: str | None
    capacity: int


def _start(
    given: dict[str, str], config: Path | None, seeds: int, out: Path | None, bus: _Told
) -> None:
    from esper.tolaria import create_study, make_config, read_config_file

    values = read_config_file(config) if config is not None else {}
    values |= given
    if "task" not in values:
        raise InputError("say what to train on: --task spirals, for example")
    values.setdefault("backend", "jax")
    first = make_config(**values)
    name = first.task.partition(":")[0]
    place = out if out is not None else Path("runs") / f"{name}-{first.backend}"
    if seeds == 1:
        _train_told([(place, first)], place, bus, resuming=False)
    else:
        _train_told(create_study(place, first, seeds).runs, place, bus, resuming=False)


def _resume(path: Path, bus: _Told) -> None:
    from esper.tolaria import is_study, open_run, open_study

    runs = open_study(path).runs if is_study(path) else [(path, open_run(path).config)]
    _train_told(runs, path, bus, resuming=True)


def _train_told(runs: list[tuple[Path, Any]], place: Path, bus: _Told, *, resuming: bool) -> None:
    """Train, and tell whoever reads the bus of that URL."""
    if bus.url is None:
        _train(runs, place, None, bus.capacity, resuming=resuming)
        return
    from esper.oona import open_broker
    from esper.tamiyo._asking import check_service_bus

    if any(config.controller == "service" and not _has_bus(config) for _, config in runs):
        check_service_bus(bus.url)
    with open_broker(bus.url) as broker:
        _train(runs, place, broker, bus.capacity, resuming=resuming)


def _has_bus(config: Any) -> bool:
    """Whether a run asks its service on a bus of its own."""
    return config.service is not None and config.service.bus is not None


def _train(
    runs: list[tuple[Path, Any]], place: Path, broker: Any, capacity: int, *, resuming: bool
) -> None:
    """Train each run to its end, then show what came of all of them."""
    from esper.nissa import ProgressView, describe_stages, read_run, write_report
    from esper.oona import InProcessBus, TelemetryBus
    from esper.tolaria import Hooks, has_run, resume_run, start_run
    from esper.tolaria._run_folder import library_folder, run_name

    stop = Stop()
    for path, config in runs:
        bus = InProcessBus()
        told = None
        if broker is not None:
            told = TelemetryBus(broker, sender_id=run_name(path), local=bus, capacity=capacity)
        label = f"{config.task} · {config.backend} · seed {config.seed}"
        rows: list[Any] = []
        with ProgressView(bus, label, config.steps, out) as view:

            def on_boundary(row: Any, view: Any = view, rows: list[Any] = rows) -> None:
                view.refresh()
                rows[:] = [row]

            hooks = Hooks(stop=stop, on_boundary=on_boundary)
            try:
                with fetching_told(library_folder(path, config)):
                    if resuming and has_run(path):
                        resume_run(path, bus=told or bus, broker=broker, hooks=hooks)
                    else:
                        start_run(
                            path, config, bus=told or bus, broker=broker, hooks=hooks, tell=_tell
                        )
            except CheckpointError as error:
                if not rows:
                    # Refused before it went on: the message says what to do.
                    raise
                raise CheckpointError(f"{error} Then go on with --resume {place}") from error
            except Interrupted as error:
                if len(runs) == 1:
                    raise
                # Gone on with by the folder of one run, a study would lack the others.
                what = str(error).partition(";")[0]
                raise Interrupted(f"{path.name}: {what}; go on with --resume {place}") from error
            finally:
                if told is not None:
                    _end(told)
    table = Table("run", "test accuracy", "parameters", "seeds", box=None)
    records = [record for path, _ in runs if (record := read_run(path)).metrics]
    for record in records:
        last = record.metrics[-1]
        table.add_row(
            escape(str(record.path)),
            f"{last['test_accuracy']:.1%}",
            str(last["parameters"]),
            describe_stages(last["stages"]),
        )
    show_table(table)
    if len(records) > 1:
        first = runs[0][1]
        write_report(
            place / "report.html",
            {f"{first.task}, {first.backend}": {"grown": records}},
            title=f"Esper: {first.task}",
        )
    out.print(f"report: {place / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _end(told: Any) -> None:
    told.close()
    found = told.statistics
    for reason, count in found.dropped.items():
        why = f": {found.last_error}" if found.last_error else ""
        say(err, "yellow", f"{count} messages did not get to the bus, as {reason.value}{why}")


def _tell(text: str) -> None:
    out.print(f"[dim]{escape(text)}[/]", highlight=False)
