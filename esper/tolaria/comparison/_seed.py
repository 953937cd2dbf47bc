"""All arms of a comparison with one seed: the treatment first, and the controls by what it did."""

import json
from collections.abc import Callable
from pathlib import Path

from esper._files import write_atomically
from esper.errors import InputError
from esper.tolaria._build import make_trainee
from esper.tolaria._config import GrowConfig
from esper.tolaria._divergence import DivergedError
from esper.tolaria._grow import resume_run, start_run
from esper.tolaria._hooks import Hooks
from esper.tolaria._run_folder import RUN, has_run, open_run
from esper.tolaria._trainer import FLOPS_PER_STEP
from esper.tolaria.comparison._arm_config import control_config, treatment_config
from esper.tolaria.comparison._asked import Comparison
from esper.tolaria.comparison._design import Budget
from esper.tolaria.comparison._kept import fresh_kernels, kept_kernels
from esper.tolaria.comparison._read import read_outcome
from esper.tolaria.tasks import Task, load_task
from esper.urza import Library

Tell = Callable[[str], None]


def library_of(folder: Path) -> Path:
    """Where the kernels of a comparison are."""
    return (folder / "library").absolute()


def run_folder(folder: Path, budget: Budget, arm: str, seed: int) -> Path:
    """Of one run of a comparison."""
    return folder / f"equal-{budget}" / arm / f"seed-{seed}"


def run_seed(
    folder: Path,
    asked: Comparison,
    seed: int,
    *,
    task: Task | None = None,
    stop: Callable[[], bool] = lambda: False,
    tell: Tell = lambda _: None,
) -> None:
    """Run what is missing of all arms with one seed.

    A run that diverges is told of and left: the verdict will be refused by its name.

    Args:
        task: the user's own; None for one of Esper's.
        stop: is asked before every step whether to stop.
        tell: is told of every run that has ended.

    Raises:
        InputError: where a run in the folder is not of this comparison.
        Interrupted: when asked to stop.
        EsperError: where a run fails.
    """
    library = library_of(folder)
    treated = run_folder(folder, "steps", asked.treatment, seed)
    _ensure(treated, treatment_config(asked, seed, library), task, stop, tell)
    outcome = read_outcome(treated, asked.treatment, "steps")
    if not outcome.ended:
        tell(f"seed {seed}: no controls, because {asked.treatment} did not come to its end")
        return
    config = open_run(treated).config
    own = load_task(config.task) if task is None else task
    examples = config.batch_size or len(own.train)
    bare = make_trainee(own, config).cost().flops * examples * FLOPS_PER_STEP
    kept = kept_kernels(treated)
    store = Library(library)
    try:
        fresh = fresh_kernels(kept, store, seed) if "scratch" in asked.controls else []
    finally:
        store.close()
    for budget in asked.budgets:
        for arm in asked.controls:
            wanted = control_config(
                asked,
                arm,
                seed,
                library,
                grafts=outcome.kept + outcome.removed,
                kept=kept,
                fresh=fresh,
                host_step_flops=bare,
                flops=outcome.training_flops if budget == "flops" else None,
            )
            _ensure(run_folder(folder, budget, arm, seed), wanted, task, stop, tell)


def _ensure(
    path: Path, config: GrowConfig, task: Task | None, stop: Callable[[], bool], tell: Tell
) -> None:
    """Have a run of a configuration at its end.

    Raises:
        InputError: where the folder has a run of another one.
    """
    hooks = Hooks(stop=stop)
    name = f"{path.parent.parent.name} · {path.parent.name} · {path.name}"
    try:
        if not has_run(path):
            _clear(path)
            start_run(path, config, task=task, hooks=hooks)
        elif not _is_done(path, config):
            resume_run(path, task=task, hooks=hooks)
    except DivergedError as error:
        tell(f"{name}: {error}")
    else:
        tell(name)


def _is_done(path: Path, config: GrowConfig) -> bool:
    """Whether a run is there whole.

    Raises:
        InputError: where it is one of another configuration.
        LedgerError: where its ledger is damaged.
    """
    folder = open_run(path)
    fields = GrowConfig.model_fields
    differs = [key for key in fields if getattr(folder.config, key) != getattr(config, key)]
    if differs == ["library"]:
        # The comparison was moved, and its library with it; no ledger knows where that was.
        content = json.loads((path / RUN).read_bytes())
        content["config"]["library"] = str(config.library)
        write_atomically(path / RUN, json.dumps(content, sort_keys=True, indent=1).encode())
    elif differs:
        raise InputError(
            f"the run {path} is not of this comparison: {', '.join(differs)} differ; remove it, or"
            " give another --out"
        )
    # The report is what a run writes last.
    return folder.report.exists() and read_outcome(path, path.parent.name, "steps").ended


def _clear(path: Path) -> None:
    """Remove what a kill has left of a run that was never begun."""
    ledger = path / "events.jsonl"
    if ledger.exists() and ledger.stat().st_size == 0:
        ledger.unlink()
