"""Starting, resuming and finishing runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esper.checkpoints import checkpoint_steps, load_checkpoint
from esper.contracts import KernelSignature
from esper.errors import InputError, LedgerError, RunFolderError
from esper.nissa import MetricsWriter, keep_metrics_before, read_metrics, read_run, write_report
from esper.oona import Bus, InProcessBus
from esper.tamiyo import Controller, HeuristicController
from esper.tolaria._config import GrowConfig
from esper.tolaria._kernels import obtain_kernels
from esper.tolaria._ledger import Cursor, Ledger, read_ledger
from esper.tolaria._run_folder import (
    RunFolder,
    check_free,
    create_run,
    library_folder,
    locked,
    open_run,
)
from esper.tolaria._tasks import Task, load_task
from esper.tolaria._trainee import Trainee
from esper.tolaria._trainer import Clock, Trainer
from esper.urza import KernelRecord, Library


def make_trainee(task: Task, config: GrowConfig) -> Trainee:
    """The host of a task on the configured backend.

    Raises:
        InputError: where the backend is not installed.
    """
    options = {
        "seed": config.seed,
        "seeds_per_layer": config.seeds_per_layer,
        "blend": config.blend,
        "optimizer": config.optimizer,
        "learning_rate": config.learning_rate,
    }
    try:
        if config.backend == "torch":
            import torch

            from esper.tolaria._torch_trainee import TorchTrainee

            torch.set_num_threads(config.threads)
            return TorchTrainee(task, **options)
        from esper.tolaria._jax_trainee import JaxTrainee

        return JaxTrainee(task, **options)
    except ModuleNotFoundError as error:
        raise InputError(
            f"the backend {config.backend!r} needs {error.name}, which is not installed; install"
            " 'esper-morphogenetic[all]'"
        ) from error


def _rows(config: GrowConfig, trainee: Trainee) -> list[int]:
    """The rows of the layers that may grow."""
    wanted = [*config.grow_at, *(graft.site for graft in config.initial_grafts)]
    unknown = [name for name in wanted if name not in trainee.sites]
    if unknown:
        raise InputError(
            f"the configuration is not valid: grow_at or initial_grafts name {unknown[0]!r}, and"
            f" the host has the layers {', '.join(trainee.sites)}"
        )
    for graft in config.initial_grafts:
        if graft.seed >= config.seeds_per_layer:
            raise InputError(
                f"the configuration is not valid: initial_grafts name seed {graft.seed}, and a"
                f" layer has {config.seeds_per_layer}, counted from 0"
            )
    return [trainee.sites.index(name) for name in config.grow_at]


def _batch_fits(config: GrowConfig, task: Task) -> None:
    if config.batch_size is not None and config.batch_size > len(task.train):
        raise InputError(
            f"the configuration is not valid: batch_size is {config.batch_size}, and the training"
            f" part of {task.name} has {len(task.train)} examples"
        )


def start_run(
    path: Path,
    config: GrowConfig,
    *,
    bus: Bus | None = None,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda _: None,
    watch: Callable[[], None] = lambda: None,
) -> RunFolder:
    """Train a new run to its end, in a folder of its own.

    Args:
        path: the run's folder; it must not hold anything.
        bus: measurements and events are published on it as well as written.
        stop: is asked before every step whether to stop.
        tell: is told what is being prepared.
        watch: is called after every decision boundary.

    Raises:
        InputError: for a configuration or folder that cannot be used; nothing is written.
        Interrupted: when asked to stop; the run can be resumed.
        EsperError: where it fails; the run can be resumed from its last checkpoint.
    """
    check_free(path)
    task = load_task(config.task)
    _batch_fits(config, task)
    trainee = make_trainee(task, config)
    rows = _rows(config, trainee)
    library = Library(library_folder(path, config))
    try:
        kernels: dict[str, list[str]] = {}
        if config.controller != "none":
            for row in rows:
                in_features, out_features = trainee.layer_shape(row)
                signature = KernelSignature(
                    input_shape=(in_features,), output_shape=(out_features,)
                )
                kernels[trainee.sites[row]] = obtain_kernels(
                    library,
                    config.blueprint,
                    signature,
                    sizes=config.blueprint_sizes,
                    variants=config.variants,
                    tell=tell,
                    stop=stop,
                )
        _check_grafts(config, trainee, library)
        folder = create_run(path, config, kernels)
        with locked(folder):
            return _train(folder, task, trainee, library, bus=bus, stop=stop, watch=watch)
    finally:
        library.close()


def resume_run(
    path: Path,
    *,
    bus: Bus | None = None,
    stop: Callable[[], bool] = lambda: False,
    watch: Callable[[], None] = lambda: None,
) -> RunFolder:
    """Go on with a run from its last checkpoint, or from its beginning where it has none.

    The ledger is verified first. A run that has ended is left as it is.

    Raises:
        RunFolderError: where there is no run.
        LedgerError, CheckpointError, ArtifactError: where something is damaged; nothing is
            changed.
    """
    folder = open_run(path)
    task = load_task(folder.config.task)
    trainee = make_trainee(task, folder.config)
    _rows(folder.config, trainee)
    library = Library(folder.library, create=False)
    try:
        with locked(folder):
            return _train(folder, task, trainee, library, bus=bus, stop=stop, watch=watch)
    finally:
        library.close()


def _candidates(
    folder: RunFolder, trainee: Trainee, library: Library
) -> dict[int, list[KernelRecord]]:
    """The kernels to choose from, every one of them read and verified."""
    known = {record.kernel_id: record for record in library.find()} if folder.kernels else {}
    found: dict[int, list[KernelRecord]] = {}
    for name, ids in folder.kernels.items():
        for kernel_id in ids:
            library.get(kernel_id)
            if kernel_id not in known:
                raise RunFolderError(
                    f"the run {folder.path} chooses from kernel {kernel_id[:12]}, which the library"
                    f" {library.folder} does not list: restore that library, or start a new run"
                )
        found[trainee.sites.index(name)] = [known[kernel_id] for kernel_id in ids]
    return found


def _check_grafts(config: GrowConfig, trainee: Trainee, library: Library) -> None:
    """Refuse initial grafts that could not be made, before a run is begun."""
    for graft in config.initial_grafts:
        manifest = library.get(graft.kernel).manifest
        in_features, out_features = trainee.layer_shape(trainee.sites.index(graft.site))
        signature = KernelSignature(input_shape=(in_features,), output_shape=(out_features,))
        if manifest.signature != signature:
            raise InputError(
                f"the configuration is not valid: initial_grafts put kernel {graft.kernel[:12]},"
                f" compiled for {manifest.signature}, into {graft.site}, which takes {signature}"
            )


class _Departure(NamedTuple):
    """From where a run goes on; all of it verified."""

    step: int
    saved: tuple[dict[str, Any], dict[str, Any]] | None
    """Arrays and meta values of the checkpoint, where there is one."""
    cursor: Cursor | None
    """The ledger's place at that step."""


def _depart(folder: RunFolder) -> _Departure:
    """Verify what a run has recorded, and find from where it goes on.

    Raises:
        LedgerError, CheckpointError: where it is damaged.
    """
    places = {Cursor(0, 0, folder.genesis)}
    places |= {entry.after for entry in read_ledger(folder.ledger, folder.genesis)}
    steps = checkpoint_steps(folder.checkpoints)
    if not steps:
        return _Departure(0, None, None)
    saved = load_checkpoint(folder.checkpoints, steps[-1])
    offset, lines, digest = saved[1]["ledger"]
    cursor = Cursor(int(offset), int(lines), str(digest))
    if cursor not in places:
        raise LedgerError(
            f"the ledger {folder.ledger} is damaged, or run.json was changed: the checkpoint of"
            f" step {steps[-1]} has seen {cursor.lines} lines up to the hash {cursor.hash[:12]}…,"
            " and they are not there. Restore them from a copy, or start a new run."
        )
    return _Departure(steps[-1], saved, cursor)


def _controller(config: GrowConfig) -> Controller | None:
    if config.controller == "none":
        return None
    return HeuristicController(
        patience=config.patience,
        min_improvement=config.min_improvement,
        enough_loss=config.enough_loss,
        trial_steps=config.loading_steps + config.ramp_steps + config.trial_steps,
        min_worth=config.min_worth,
        offset=config.seed,
    )


def _train(
    folder: RunFolder,
    task: Task,
    trainee: Trainee,
    library: Library,
    *,
    bus: Bus | None,
    stop: Callable[[], bool],
    watch: Callable[[], None],
) -> RunFolder:
    """Train from where the record ends; the caller holds the run's lock."""
    config = folder.config
    start = _depart(folder)
    past = [row for row in read_metrics(folder.metrics) if row["step"] < start.step]
    channel = bus or InProcessBus()
    metrics = MetricsWriter(folder.metrics, channel)

    def after_boundary() -> None:
        metrics.flush()
        watch()

    trainer = Trainer(
        folder=folder,
        task=task,
        trainee=trainee,
        controller=_controller(config),
        library=library,
        candidates=_candidates(folder, trainee, library),
        ledger=Ledger(folder.ledger, folder.genesis, start.cursor),
        bus=channel,
        stop=stop,
        clock=Clock(past[-1]["seconds"] if past else None),
        after_boundary=after_boundary,
    )
    if start.saved is not None:
        trainer.restore(*start.saved)
    if start.step < config.steps:
        # Everything has been read and found whole; from here on the folder changes.
        keep_metrics_before(folder.metrics, start.step)
        with metrics:
            trainer.run(start.step)
    if trainer.regions:
        np.savez_compressed(folder.regions, allow_pickle=False, **trainer.regions)
    arm = "grown" if config.controller != "none" else "static"
    arms = {config.task: {arm: [read_run(folder.path)]}}
    write_report(folder.report, arms, title=f"Esper: {config.task}")
    return folder
