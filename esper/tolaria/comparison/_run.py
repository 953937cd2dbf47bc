"""Running a comparison: every arm with every seed, under every budget, and the verdict on it."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from esper.errors import InputError, Interrupted
from esper.tolaria._build import check_batch, growing_rows, make_trainee, task_of
from esper.tolaria._grow import compile_kernels
from esper.tolaria._run_folder import has_run
from esper.tolaria.comparison._arm_config import check_configs, treatment_config
from esper.tolaria.comparison._asked import Comparison, read_asked, write_asked
from esper.tolaria.comparison._judge import judge
from esper.tolaria.comparison._outcome import Outcome
from esper.tolaria.comparison._read import read_outcome
from esper.tolaria.comparison._seed import Tell, library_of, run_folder, run_seed
from esper.tolaria.comparison._sign_flip import fewest_pairs
from esper.tolaria.comparison._verdict import Verdict
from esper.tolaria.comparison._workers import share_seeds
from esper.tolaria.comparison._write import write_comparison
from esper.tolaria.tasks import Task
from esper.urza import Library


class Compared(NamedTuple):
    """What a comparison came to."""

    verdicts: tuple[Verdict, ...]
    """One for each budget."""
    outcomes: tuple[Outcome, ...]


def run_comparison(
    folder: Path,
    asked: Comparison | None = None,
    *,
    workers: int = 1,
    task: Task | None = None,
    stop: Callable[[], bool] = lambda: False,
    tell: Tell = lambda _: None,
) -> Compared:
    """Run what is missing of a comparison, judge it, and write its report.

    The treatment is run first, at equal steps; what it kept, and what it cost, make the controls
    of the same seed. Runs that have ended are left as they are, others are gone on with.

    Args:
        folder: of the comparison; `equal-BUDGET/ARM/seed-N` are its runs.
        asked: None goes on with the one that is there.
        workers: processes, which share the seeds among them.
        task: the user's own, in one process.
        stop: is asked before every step whether to stop.
        tell: is told of every run that has ended.

    Raises:
        InputError: for a comparison or configuration that cannot be; nothing is written.
        Interrupted: when asked to stop; it can be gone on with.
        EsperError: where a run fails.
    """
    if asked is None:
        asked = read_asked(folder)
    if workers < 1:
        raise InputError(f"expected at least 1 worker, got {workers}")
    if task is not None and workers > 1:
        raise InputError("a task of your own is run in one process: give workers=1")
    library = library_of(folder)
    _check(asked, library, task)
    write_asked(folder, asked)
    fewest = max(fewest_pairs(asked.design(budget).level) for budget in asked.budgets)
    if len(asked.seeds) < fewest:
        seeds, controls = len(asked.seeds), len(asked.controls)
        tell(
            f"with {seeds} {'seed' if seeds == 1 else 'seeds'} and {controls}"
            f" {'control' if controls == 1 else 'controls'} there will be no verdict: expected at"
            f" least {fewest} seeds"
        )
    try:
        store = Library(library)
        try:
            first = treatment_config(asked, asked.seeds[0], library)
            compile_kernels(first, store, task=task, tell=tell, stop=stop)
        finally:
            store.close()
        if workers == 1:
            for seed in asked.seeds:
                run_seed(folder, asked, seed, task=task, stop=stop, tell=tell)
        else:
            share_seeds(folder, asked, workers, stop, tell)
    except Interrupted as error:
        # A run says how to go on with that one, which would leave out the others.
        raise Interrupted(f"stopped; go on with esper compare --resume {folder}") from error
    return judge_comparison(folder, asked)


def _check(asked: Comparison, library: Path, task: Task | None) -> None:
    """Refuse what would fail in the middle."""
    configs = check_configs(asked, library)
    for arm in dict.fromkeys((asked.treatment, *asked.own_arms)):
        own = task_of(configs[arm], task)
        check_batch(configs[arm], own)
        growing_rows(configs[arm], own, make_trainee(own, configs[arm]))


def judge_comparison(folder: Path, asked: Comparison | None = None) -> Compared:
    """Judge the runs that a comparison's folder holds, and write its report."""
    asked = read_asked(folder) if asked is None else asked
    outcomes = tuple(_outcomes(folder, asked))
    verdicts = tuple(judge(asked.design(budget), outcomes) for budget in asked.budgets)
    write_comparison(folder, verdicts, outcomes)
    return Compared(verdicts, outcomes)


def _outcomes(folder: Path, asked: Comparison) -> Iterable[Outcome]:
    for budget in asked.budgets:
        for arm in asked.arms:
            for seed in asked.seeds:
                # The treatment sets the number of FLOPs: under both budgets it is one run.
                of = "steps" if arm == asked.treatment else budget
                path = run_folder(folder, of, arm, seed)
                if has_run(path):
                    yield read_outcome(path, arm, budget)
