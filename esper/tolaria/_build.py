"""From a configuration to the parts of a run, checked."""

from collections.abc import Mapping, Sequence
from typing import Any

from esper.cache import KernelCache
from esper.contracts import KernelState
from esper.errors import InputError, RunFolderError
from esper.nissa import MeasurementsDigest
from esper.oona import Broker, Bus
from esper.tolaria._clock import Clock
from esper.tolaria._config import GrowConfig
from esper.tolaria._decider import controller_of, guard_of
from esper.tolaria._hooks import Hooks
from esper.tolaria._ledger import Ledger
from esper.tolaria._run_folder import RunFolder, run_name
from esper.tolaria._trainee import Optimisation, Trainee
from esper.tolaria._trainer import Trainer
from esper.tolaria.tasks import Task, load_task, make_loader
from esper.urza import KernelRecord, Library
from esper_functional import SeedIndexError


def task_of(config: GrowConfig, task: Task | None) -> Task:
    """The task that a run names: one of Esper's, or the user's own.

    Raises:
        InputError: for another one than the run's.
    """
    if task is None:
        return load_task(config.task)
    if task.name != config.task:
        raise InputError(
            f"the configuration is of the task {config.task!r}, and the task given is"
            f" {task.name!r}: give both the same name"
        )
    return task


def check_task(folder: RunFolder, task: Task | None) -> Task:
    """The data that a run was begun with.

    Raises:
        RunFolderError: for a run that an older Esper began.
        InputError: for other data.
    """
    if folder.task_digest is None:
        raise RunFolderError(
            f"the run {folder.path} was begun by an older Esper, whose checkpoints this one does"
            " not read: train it with that, or begin a new run; its record can be replayed and"
            " shown"
        )
    found = task_of(folder.config, task)
    if found.digest != folder.task_digest:
        raise InputError(
            f"the data of the task {found.name!r} are not those that the run {folder.path} began"
            f" with: their SHA-256 is {found.digest[:12]}…, and it was {folder.task_digest[:12]}…"
        )
    return found


def _grow_at(config: GrowConfig, task: Task) -> tuple[str, ...]:
    return task.host.grow_at if config.grow_at is None else tuple(config.grow_at)


def make_trainee(task: Task, config: GrowConfig) -> Trainee:
    """The host of a task on the configured backend.

    Raises:
        InputError: where the backend is not installed.
    """
    options: dict[str, Any] = {
        "seed": config.seed,
        "seeds_per_layer": config.seeds_per_layer,
        "blend": config.blend,
        "isolate": config.isolate,
        "grow_at": _grow_at(config, task),
        "optimisation": Optimisation(
            optimizer=config.optimizer,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            accumulate=config.accumulate,
            precision=config.precision,
            ema_decay=config.ema_decay,
        ),
        "evaluation_batch": config.evaluation_batch,
    }
    try:
        if config.backend == "torch":
            import torch

            from esper.tolaria._torch_trainee import TorchTrainee

            torch.set_num_threads(config.threads)
            return TorchTrainee(task, **options)
        from esper.tolaria._jax_trainee import JaxTrainee

        return JaxTrainee(task, **options)
    except SeedIndexError as error:
        raise InputError(f"the configuration is not valid: grow_at: {error}") from error
    except ModuleNotFoundError as error:
        raise InputError(
            f"the backend {config.backend!r} needs {error.name}, which is not installed; install"
            " 'esper-morphogenetic[all]'"
        ) from error


def growing_rows(config: GrowConfig, task: Task, trainee: Trainee) -> list[int]:
    """The rows of the layers that may grow."""
    places = [graft.site for graft in config.initial_grafts]
    places += [decision.site for decision in config.schedule_of_grafts]
    wanted = [*_grow_at(config, task), *places]
    unknown = [name for name in wanted if name not in trainee.sites]
    if unknown:
        raise InputError(
            f"the configuration is not valid: grow_at, initial_grafts or schedule_of_grafts name"
            f" {unknown[0]!r}, and the host has the layers {', '.join(trainee.sites)}"
        )
    for graft in (*config.initial_grafts, *config.schedule_of_grafts):
        if graft.seed is not None and graft.seed >= config.seeds_per_layer:
            raise InputError(
                f"the configuration is not valid: initial_grafts or schedule_of_grafts name seed"
                f" {graft.seed}, and a layer has {config.seeds_per_layer}, counted from 0"
            )
    return [trainee.sites.index(name) for name in _grow_at(config, task)]


def check_batch(config: GrowConfig, task: Task) -> None:
    examples = len(task.train)
    if config.batch_size is not None and config.batch_size > examples:
        raise InputError(
            f"the configuration is not valid: batch_size is {config.batch_size}, and the training"
            f" part of {task.name} has {examples} examples"
        )
    if config.batch_size is None and examples % config.accumulate:
        raise InputError(
            f"the configuration is not valid: accumulate is {config.accumulate}, and does not"
            f" divide the {examples} training examples of {task.name} into equal parts"
        )


def find_candidates(
    folder: RunFolder,
    task: Task,
    trainee: Trainee,
    library: Library,
    kernels: KernelCache | None = None,
) -> dict[int, list[KernelRecord]]:
    """The kernels to choose from by layer row, every one of them read and verified.

    Args:
        kernels: keeps them.

    Raises:
        ArtifactError: for one that is damaged or not there.
        RunFolderError: for one that the library does not list.
    """
    # A run that has begun goes on with what is not to be used by new ones.
    records = library.find(states=KernelState) if folder.kernels else []
    known = {record.kernel_id: record for record in records}
    found: dict[int, list[KernelRecord]] = {}
    # In the order of preference, which a file of sorted keys does not keep.
    for name in (n for n in _grow_at(folder.config, task) if n in folder.kernels):
        ids = folder.kernels[name]
        for kernel_id in ids:
            artifact = library.get(kernel_id)
            if kernels is not None:
                kernels.put(artifact)
            if kernel_id not in known:
                raise RunFolderError(
                    f"the run {folder.path} chooses from kernel {kernel_id[:12]}, which the library"
                    f" {library.folder} does not list: restore that library, or start a new run"
                )
        found[trainee.sites.index(name)] = [known[kernel_id] for kernel_id in ids]
    return found


def check_grafts(config: GrowConfig, trainee: Trainee, library: Library) -> None:
    """Refuse grafts by id that could not be made, before a run is begun."""
    named: list[tuple[str, str, str]] = [
        ("initial_grafts", graft.site, graft.kernel) for graft in config.initial_grafts
    ]
    named += [
        ("schedule_of_grafts", own.site, own.kernel)
        for own in config.schedule_of_grafts
        if own.kernel is not None
    ]
    for key, site, kernel in named:
        manifest = library.get(kernel).manifest
        signature = trainee.signature(trainee.sites.index(site))
        if manifest.signature != signature:
            raise InputError(
                f"the configuration is not valid: {key} put kernel {kernel[:12]}, compiled for"
                f" {manifest.signature}, into {site}, which takes {signature}"
            )


def make_trainer(
    folder: RunFolder,
    task: Task,
    trainee: Trainee,
    library: Library,
    *,
    ledger: Ledger,
    bus: Bus,
    hooks: Hooks,
    past: Sequence[Mapping[str, Any]] = (),
    broker: Broker | None = None,
    asks: bool = True,
) -> Trainer:
    """The trainer of a run.

    Args:
        past: the measurements made so far.
        broker: the bus that a service is on, where the configuration names none.
        asks: whether a service is asked at all, and not only done again what was recorded.
    """
    config, kernels = folder.config, KernelCache()
    return Trainer(
        folder=folder,
        task=task,
        trainee=trainee,
        loader=make_loader(task, batch_size=config.batch_size, seed=config.seed),
        controller=controller_of(
            config, trainee.sites, run=run_name(folder.path), broker=broker, asks=asks
        ),
        guard=guard_of(config),
        library=library,
        kernels=kernels,
        candidates=find_candidates(folder, task, trainee, library, kernels),
        ledger=ledger,
        bus=bus,
        hooks=hooks,
        clock=Clock(past[-1]["seconds"] if past else None),
        measured=MeasurementsDigest(past),
    )
