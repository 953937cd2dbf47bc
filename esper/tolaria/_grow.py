"""Starting, resuming and finishing runs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esper.nissa import (
    Writers,
    keep_metrics_before,
    make_writers,
    read_metrics,
    read_run,
    write_report,
)
from esper.oona import Broker, Bus, InProcessBus
from esper.tolaria._build import (
    check_batch,
    check_grafts,
    check_task,
    growing_rows,
    make_trainee,
    make_trainer,
    task_of,
)
from esper.tolaria._config import GrowConfig, sizes_of
from esper.tolaria._decider import controller_of
from esper.tolaria._departure import depart, is_last
from esper.tolaria._hooks import Hooks
from esper.tolaria._kernels import obtain_kernels
from esper.tolaria._ledger import Ledger
from esper.tolaria._outcomes import refer, tell_outcomes
from esper.tolaria._run_folder import (
    HostRecord,
    RunFolder,
    check_free,
    create_run,
    library_folder,
    locked,
    open_run,
    run_name,
)
from esper.tolaria._trainee import Trainee
from esper.tolaria._trainer import FLOPS_PER_STEP
from esper.tolaria.tasks import Task
from esper.urza import Library


def start_run(
    path: Path,
    config: GrowConfig,
    *,
    task: Task | None = None,
    bus: Bus | None = None,
    broker: Broker | None = None,
    hooks: Hooks | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> RunFolder:
    """Train a new run to its end, in a folder of its own.

    Args:
        path: the run's folder; it must not hold anything.
        task: the user's own, under the configuration's name; None for one of Esper's.
        bus: measurements and events are published on it as well as written.
        broker: where a service is asked, with `controller: service`, if the configuration names no
            bus; it stays open.
        hooks: functions that are called on the way.
        tell: is told what is being prepared.

    Raises:
        InputError: for a configuration, data or folder that cannot be used; nothing is written.
        Interrupted: when asked to stop; the run can be resumed.
        DivergedError: where training diverges however often it is taken back.
        EsperError: where it fails; the run can be resumed from its last checkpoint.
    """
    check_free(path)
    hooks = hooks or Hooks()
    task = task_of(config, task)
    check_batch(config, task)
    trainee = make_trainee(task, config)
    rows = growing_rows(config, task, trainee)
    # A policy that cannot be read, or a bus that is none, is found out before anything is written.
    controller_of(config, trainee.sites, run=run_name(path), broker=broker)
    library = Library(library_folder(path, config))
    try:
        kernels: dict[str, list[str]] = {}
        if config.controller != "none":
            kernels = _obtain(config, trainee, rows, library, tell, hooks.stop)
        check_grafts(config, trainee, library)
        cost, examples = trainee.cost(), config.batch_size or len(task.train)
        step_flops = FLOPS_PER_STEP * examples * cost.flops
        host = HostRecord(trainee.sites, cost.parameters, step_flops)
        folder = create_run(path, config, kernels, host=host, task_digest=task.digest)
        with locked(folder):
            return _train(folder, task, trainee, library, bus=bus, broker=broker, hooks=hooks)
    finally:
        library.close()


def _obtain(
    config: GrowConfig,
    trainee: Trainee,
    rows: Sequence[int],
    library: Library,
    tell: Callable[[str], None],
    stop: Callable[[], bool],
) -> dict[str, list[str]]:
    """The ids of the kernels to choose from, by layer name."""
    return {
        trainee.sites[row]: [
            kernel_id
            for blueprint in config.blueprints
            for kernel_id in obtain_kernels(
                library,
                blueprint,
                trainee.signature(row),
                sizes=sizes_of(config, blueprint),
                variants=config.variants,
                tell=tell,
                stop=stop,
            )
        ]
        for row in rows
    }


def compile_kernels(
    config: GrowConfig,
    library: Library,
    *,
    task: Task | None = None,
    tell: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, list[str]]:
    """Put the kernels that a run would choose from into a library, before any run begins.

    Returns:
        Their ids, by layer name.

    Raises:
        InputError: for a configuration or data that cannot be used.
        Interrupted: when asked to stop; what was compiled is kept.
    """
    task = task_of(config, task)
    trainee = make_trainee(task, config)
    return _obtain(config, trainee, growing_rows(config, task, trainee), library, tell, stop)


def resume_run(
    path: Path,
    *,
    task: Task | None = None,
    bus: Bus | None = None,
    broker: Broker | None = None,
    hooks: Hooks | None = None,
) -> RunFolder:
    """Go on with a run from its last checkpoint, or from its beginning where it has none.

    The ledger is verified first. A run that goes on refers to its kernels again, because it may
    have been released meanwhile. A run that has ended is left as it is.

    Args:
        task: the user's own, where the run was started with one.
        broker: as of `start_run`.

    Raises:
        RunFolderError: where there is no run, or one that an older Esper began.
        InputError: for other data than the run began with.
        LedgerError, CheckpointError, ArtifactError: where something is damaged; nothing is
            changed.
        LibraryError: where a kernel of the run is gone, or the library cannot be written; nothing
            is changed.
    """
    folder = open_run(path)
    task = check_task(folder, task)
    trainee = make_trainee(task, folder.config)
    growing_rows(folder.config, task, trainee)
    library = Library(folder.library, create=False)
    try:
        with locked(folder):
            own = hooks or Hooks()
            return _train(folder, task, trainee, library, bus=bus, broker=broker, hooks=own)
    finally:
        library.close()


def _train(
    folder: RunFolder,
    task: Task,
    trainee: Trainee,
    library: Library,
    *,
    bus: Bus | None,
    broker: Broker | None,
    hooks: Hooks,
) -> RunFolder:
    """Train from where the record ends; the caller holds the run's lock."""
    start = depart(folder)
    past = [row for row in read_metrics(folder.metrics) if row["step"] < start.step]
    channel = bus or InProcessBus()
    writers: list[Writers] = []

    def on_boundary(row: Mapping[str, Any]) -> None:
        for own in writers:
            own.flush()
        if hooks.on_boundary is not None:
            hooks.on_boundary(row)

    trainer = make_trainer(
        folder,
        task,
        trainee,
        library,
        ledger=Ledger(folder.ledger, folder.genesis, start.cursor),
        bus=channel,
        hooks=dataclasses.replace(hooks, on_boundary=on_boundary),
        past=past,
        broker=broker,
    )
    if start.saved is not None:
        trainer.restore(*start.saved)
    if not (start.ended and start.saved is not None and is_last(folder, start)):
        # Everything has been read and found whole; from here on library and folder change. A
        # run that goes on may have been released, and one that was killed early never referred.
        refer(library, folder)
        keep_metrics_before(folder.metrics, start.step)
        config = folder.config
        with make_writers(
            folder.path, channel, tensorboard=config.tensorboard, prometheus=config.prometheus
        ) as own:
            writers.append(own)
            trainer.run(start.step)
    if trainer.regions:
        np.savez_compressed(folder.regions, allow_pickle=False, **trainer.regions)
    arm = "grown" if folder.config.controller != "none" else "static"
    record = read_run(folder.path)
    tell_outcomes(library, folder, record)
    arms = {folder.config.task: {arm: [record]}}
    write_report(folder.report, arms, title=f"Esper: {folder.config.task}")
    return folder
