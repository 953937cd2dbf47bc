"""Comparisons that are run: every arm is what it is called, and no interruption changes one."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from esper.errors import EsperError, InputError, Interrupted, LedgerError, RunFolderError
from esper.tolaria import open_run
from esper.tolaria.comparison import (
    Compared,
    Comparison,
    Outcome,
    judge_comparison,
    kept_kernels,
    make_comparison,
    run_comparison,
)
from esper.tolaria.comparison._asked import write_asked
from esper.tolaria.tasks import load_task
from esper.urza import Library
from tests.esper.runs import entries, measured

SHORT: dict[str, Any] = {
    "steps": 60,
    "decide_every": 10,
    "loading_steps": 3,
    "ramp_steps": 5,
    "trial_steps": 10,
    "patience": 1,
    "min_improvement": 0.5,
    "checkpoint_every": 30,
    "variants": 2,
    "seeds_per_layer": 2,
    "blueprint_sizes": {"width": 8},
}
"""Grafts two kernels within its steps."""

ALL = make_comparison(
    task="spirals",
    backend="torch",
    controls=("static-small", "static-final", "scratch", "fixed", "random"),
    seeds=(0, 1),
    values=SHORT,
)
FEW = make_comparison(
    task="spirals",
    backend="torch",
    treatment="mine",
    controls=("static-small", "static-final"),
    own_arms={"mine": {"controller": "fixed", "graft_every": 20}},
    seeds=(0, 1),
    budgets=("steps",),
    values=SHORT | {"steps": 40},
)
"""What is interrupted, again and again."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("comparisons")


@pytest.fixture(scope="module")
def compared(place) -> Compared:
    return run_comparison(place / "all", ALL)


@pytest.fixture(scope="module")
def few(place) -> Path:
    run_comparison(place / "few", FEW)
    return place / "few"


def outcome(compared: Compared, budget: str, arm: str, seed: int) -> Outcome:
    [found] = [
        own for own in compared.outcomes if (own.budget, own.arm, own.seed) == (budget, arm, seed)
    ]
    return found


def grafts(one: Outcome) -> list[dict[str, Any]]:
    return [entry for entry in entries(Path(one.folder)) if entry["kind"] == "load"]


def records(folder: Path) -> dict[str, Any]:
    """All that runs of a comparison recorded, but for what is of the process that made them."""
    runs = sorted(path.parent for path in folder.rglob("run.json"))
    return {
        str(run.relative_to(folder)): ((run / "events.jsonl").read_bytes(), measured(run))
        for run in runs
    }


# The arms are what they are called.


def test_every_arm_has_its_runs_and_they_came_to_their_end(compared):
    names = {(own.budget, own.arm, own.seed) for own in compared.outcomes}
    assert names == {(b, arm, seed) for b in ALL.budgets for arm in ALL.arms for seed in ALL.seeds}
    assert len(compared.outcomes) == len(names)
    assert all(own.ended for own in compared.outcomes)
    assert [verdict.design.budget for verdict in compared.verdicts] == ["steps", "flops"]


@pytest.mark.parametrize("seed", ALL.seeds)
def test_static_final_has_the_kernels_that_the_treatment_kept(compared, seed):
    treated = Path(outcome(compared, "steps", "heuristic", seed).folder)
    kept = [tuple(own) for own in kept_kernels(treated)]
    assert len(kept) > 0
    for budget in ALL.budgets:
        final = Path(outcome(compared, budget, "static-final", seed).folder)
        config = open_run(final).config
        assert [(g.site, g.seed, g.kernel) for g in config.initial_grafts] == kept
        assert [tuple(own) for own in kept_kernels(final)] == kept
    one, other = (
        outcome(compared, "steps", arm, seed).parameters for arm in ("heuristic", "static-final")
    )
    assert one == other


@pytest.mark.parametrize("seed", ALL.seeds)
def test_scratch_has_the_same_blueprints_and_sizes_with_other_parameters(place, compared, seed):
    treated = kept_kernels(Path(outcome(compared, "steps", "heuristic", seed).folder))
    fresh = kept_kernels(Path(outcome(compared, "steps", "scratch", seed).folder))
    assert [own[:2] for own in treated] == [own[:2] for own in fresh]
    candidates = {
        kernel
        for ids in open_run(place / "all/equal-steps/heuristic/seed-0").kernels.values()
        for kernel in ids
    }
    library = Library(place / "all/library")
    for was, now in zip(treated, fresh, strict=True):
        assert now.kernel not in candidates
        old, new = library.get(was.kernel), library.get(now.kernel)
        assert old.blueprint == new.blueprint
        assert old.manifest.sizes == new.manifest.sizes
        assert old.manifest.signature == new.manifest.signature
    library.close()


def test_static_small_is_the_host_alone(compared):
    for own in compared.outcomes:
        if own.arm == "static-small":
            assert own.parameters == own.setting.host_parameters
            assert grafts(own) == []


def test_fixed_and_random_graft_no_more_often_than_the_treatment(compared):
    for seed in ALL.seeds:
        most = len(grafts(outcome(compared, "steps", "heuristic", seed)))
        assert most > 0
        for arm in ("fixed", "random"):
            for budget in ALL.budgets:
                assert len(grafts(outcome(compared, budget, arm, seed))) <= most
        assert len(grafts(outcome(compared, "steps", "fixed", seed))) == most


def test_under_equal_steps_all_arms_have_as_many(compared):
    assert {own.steps for own in compared.outcomes if own.budget == "steps"} == {60}


def test_under_equal_flops_no_arm_is_more_than_a_step_away(compared):
    for seed in ALL.seeds:
        wanted = outcome(compared, "flops", "heuristic", seed).training_flops
        assert wanted is not None
        for arm in ALL.controls:
            own = outcome(compared, "flops", arm, seed)
            assert own.training_flops is not None
            used = [flops for flops in own.curve.flops if flops is not None]
            steps = own.curve.steps
            step = (used[-1] - used[-2]) / (steps[-1] - steps[-2])
            assert 0.0 <= wanted - own.training_flops <= step * 1.5
    # Other steps than under equal steps: the budget was what ended them.
    assert outcome(compared, "flops", "static-small", 0).steps > 60
    assert outcome(compared, "flops", "static-final", 0).steps < 60


def test_under_equal_flops_the_treatment_is_the_run_of_equal_steps(place, compared):
    assert not (place / "all/equal-flops/heuristic").exists()
    one, other = (outcome(compared, budget, "heuristic", 0) for budget in ALL.budgets)
    assert one.folder == other.folder


def test_a_treatment_that_kept_nothing_has_controls_without_kernels(tmp_path):
    asked = make_comparison(
        task="spirals", backend="torch", controls=("static-final", "fixed", "random"), seeds=(0,),
        budgets=("steps",), values=SHORT | {"steps": 20, "patience": 50},
    )  # fmt: skip
    found = run_comparison(tmp_path / "none", asked)
    assert {(own.arm, own.kept, own.removed) for own in found.outcomes} == {
        (arm, 0, 0) for arm in asked.arms
    }


# Interrupted, and gone on with.


class StopAt:
    """Asks to stop at the n-th look."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def with_kernels(few: Path, folder: Path) -> Path:
    """A comparison of which nothing was run, with the kernels that it would compile."""
    folder.mkdir()
    shutil.copy(few / "comparison.json", folder)
    shutil.copytree(few / "library", folder / "library")
    return folder


def test_stopped_while_compiling_and_gone_on_with_is_equal_to_the_bit(few, tmp_path):
    folder = tmp_path / "again"
    with pytest.raises(Interrupted, match=f"^stopped; go on with esper compare --resume {folder}$"):
        run_comparison(folder, FEW, stop=StopAt(1))
    assert not list(folder.rglob("run.json"))
    run_comparison(folder)
    assert records(folder) == records(few)
    assert outcomes_equal(folder, few)


def test_stopped_at_every_turn_it_still_comes_to_the_same_end(few, tmp_path):
    folder, turns = with_kernels(few, tmp_path / "again"), 0
    while True:
        try:
            run_comparison(folder, stop=StopAt(37))
        except Interrupted:
            turns += 1
        else:
            break
    # In every run once, at other steps: in a treatment, in a control, before a first step.
    assert turns >= len(FEW.seeds) * len(FEW.arms)
    assert records(folder) == records(few)


def outcomes_equal(one: Path, other: Path) -> bool:
    def told(folder: Path) -> list[dict[str, Any]]:
        found = judge_comparison(folder).outcomes
        left_out = {"folder", "seconds", "compilations"}
        return [
            {key: value for key, value in vars(own).items() if key not in left_out} for own in found
        ]

    return told(one) == told(other)


def test_a_second_worker_changes_no_outcome(few, tmp_path):
    folder, told = with_kernels(few, tmp_path / "shared"), list[str]()
    run_comparison(folder, workers=2, tell=told.append)
    assert "with 2 seeds and 2 controls there will be no verdict" in told[0]
    assert sorted(told[1:]) == sorted(
        f"equal-steps · {arm} · seed-{seed}" for arm in FEW.arms for seed in FEW.seeds
    )
    assert records(folder) == records(few)
    assert outcomes_equal(folder, few)


def test_a_worker_that_is_killed_or_fails_is_told_of_and_nothing_is_lost(few, tmp_path):
    # One seed takes one process.
    folder = tmp_path / "one"
    write_asked(folder, FEW.model_copy(update={"seeds": (0,)}))
    shutil.copytree(few / "library", folder / "library")

    def kill(text: str) -> None:
        for child in multiprocessing.active_children()[:1]:
            os.kill(child.pid or 0, signal.SIGKILL)

    with pytest.raises(
        EsperError, match=f"(?s)a worker ended .* go on with --resume {folder}, and"
    ):
        run_comparison(folder, workers=2, tell=kill)
    assert not multiprocessing.active_children()
    begun = records(folder)
    assert 0 < len(begun) < 3
    ledger = folder / "equal-steps/mine/seed-0/events.jsonl"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole.replace(b'"seed":0', b'"seed":1', 1))
    with pytest.raises(LedgerError, match=r"seed-0/events.jsonl is damaged at line 1"):
        run_comparison(folder, workers=2)
    ledger.write_bytes(whole)
    run_comparison(folder)
    wanted = records(few)
    found = records(folder)
    assert len(found) == 3
    assert found == {name: wanted[name] for name in found}


def test_what_has_ended_is_left_as_it_is(few):
    before = {path: path.stat().st_mtime_ns for path in few.rglob("equal-*/**/*")}
    run_comparison(few, FEW)
    assert {path: path.stat().st_mtime_ns for path in few.rglob("equal-*/**/*")} == before


def test_what_a_kill_leaves_of_a_run_that_was_not_begun_is_cleared(few, tmp_path):
    folder = tmp_path / "killed"
    shutil.copytree(few, folder)
    run = folder / "equal-steps/mine/seed-1"
    shutil.rmtree(run)
    run.mkdir()
    (run / "events.jsonl").touch()
    (run / "run.json.partial").write_text("{")
    run_comparison(folder)
    assert records(folder) == records(few)


def test_a_comparison_moves_with_its_library(few, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(few, moved)
    shutil.rmtree(moved / "equal-steps/static-small/seed-0")
    run = moved / "equal-steps/static-final/seed-1"
    (run / "report.html").unlink()
    run_comparison(moved)
    assert records(moved) == records(few)
    assert open_run(run).library == moved / "library"
    assert open_run(few / "equal-steps/static-final/seed-1").library == few / "library"


def test_a_run_that_diverges_is_told_of_and_the_others_are_run(tmp_path):
    asked = make_comparison(
        task="spirals", backend="torch", treatment="fixed", controls=("static-small", "wild"),
        own_arms={
            "wild": {"controller": "none", "learning_rate": 10.0, "optimizer": "sgd",
                     "divergence": 1.01, "max_rollbacks": 0},
        },
        seeds=(0,), budgets=("steps",), values=SHORT | {"steps": 20},
    )  # fmt: skip
    told: list[str] = []
    found = run_comparison(tmp_path / "wild", asked, tell=told.append)
    assert any("wild · seed-0: training diverged" in text for text in told)
    assert any("wild, seed 0 did not end" in reason for reason in found.verdicts[0].refusals)
    assert (tmp_path / "wild/report.html").exists()


# What cannot be.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controls": ("static-smal",)}, "unknown arm 'static-smal'.*did you mean 'static-small'"),
        ({"treatment": "scratch"}, "the treatment 'scratch' does not grow"),
        ({"own_arms": {"random": {}}}, "the arm 'random' is Esper's own"),
        ({"own_arms": {"../up": {}}, "controls": ("../up",)}, "names a folder of runs"),
        ({"own_arms": {"idle": {}}}, "'idle' is neither the treatment nor a control"),
        ({"own_arms": {"a": {"steps": 3}}, "controls": ("a",)}, "arm 'a' have 'steps'"),
        ({"own_arms": {"a": {"seed": 3}}, "controls": ("a",)}, "arm 'a' have 'seed'"),
        ({"values": {"controller": "none"}}, "keys of all arms have 'controller'"),
        ({"values": {"library": "x"}}, "keys of all arms have 'library'"),
        ({"values": {"early_stopping": 2}}, "arms that end where each likes"),
        ({"sedes": (0,)}, "unknown key 'sedes'; did you mean 'seeds'"),
        ({"seeds": (-1,)}, "seeds.0: Input should be greater than or equal to 0"),
        ({"seeds": (1, 1)}, "expected seeds that differ, got 1 twice"),
        ({"budgets": ()}, "`budgets` must name steps, flops, or both"),
        ({"budgets": ("time",)}, "budgets.0: Input should be 'steps' or 'flops'"),
        ({"controls": ("fixed", "fixed")}, "got 'fixed' as two arms"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        make_comparison(**{"task": "spirals", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "spirlas"}, "did you mean 'spirals'"),
        ({"values": {"stpes": 3}}, "unknown key 'stpes'; did you mean 'steps'"),
        ({"values": {"batch_size": 1_000}}, "batch_size is 1000, and the training part"),
        ({"values": {"grow_at": ["layers.7"]}}, "path matches 'layers.7'"),
        (
            {"values": {"schedule": "cosine"}},
            "'static-small' cannot be run under equal flops: .*write `schedule: constant`",
        ),
        (
            {"own_arms": {"a": {"patiense": 1}}, "controls": ("a",)},
            "the arm 'a' cannot be run .*unknown key 'patiense'; did you mean 'patience'",
        ),
        (
            {"own_arms": {"a": {"grow_at": ["layers.7"]}}, "controls": ("a",)},
            "path matches 'layers.7'",
        ),
    ],
)
def test_nothing_is_written_for_arms_that_could_not_be_run(tmp_path, changes, message):
    asked = make_comparison(**{"task": "spirals", "backend": "torch", **changes})
    with pytest.raises(InputError, match=message):
        run_comparison(tmp_path / "c", asked)
    assert list(tmp_path.iterdir()) == []


def test_another_comparison_in_the_folder_is_refused_by_name(few):
    before = (few / "comparison.json").read_bytes()
    other = Comparison.model_validate({**FEW.model_dump(), "smallest_effect": 0.3, "seeds": (0,)})
    with pytest.raises(InputError, match="another comparison, of which seeds, smallest_effect"):
        run_comparison(few, other)
    assert (few / "comparison.json").read_bytes() == before


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and holds no comparison"):
        run_comparison(tmp_path, FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunFolderError, match="holds no comparison: there is no"):
        run_comparison(tmp_path)
    with pytest.raises(RunFolderError, match="cannot be written"):
        run_comparison(tmp_path / "thesis.tex" / "c", FEW)


def test_a_run_of_another_comparison_is_refused_by_what_differs(few, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(few, folder)
    for name in ("comparison.json", "equal-steps/mine"):
        path = folder / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    shutil.copy(few / "comparison.json", folder)
    shutil.copytree(few / "equal-steps/static-small/seed-0", folder / "equal-steps/mine/seed-0")
    with pytest.raises(InputError, match=r"is not of this comparison: .*controller.* differ"):
        run_comparison(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held | {"schema_version": 9}, "has schema version 9, this Esper reads 1"),
        (lambda held: {"schema_version": 1}, "comparison.json is damaged"),
        (lambda held: [held], "comparison.json is damaged"),
    ],
)
def test_a_comparison_that_cannot_be_read(few, tmp_path, change, message):
    held = json.loads((few / "comparison.json").read_bytes())
    (tmp_path / "comparison.json").write_text(json.dumps(change(held)))
    with pytest.raises(RunFolderError, match=message):
        run_comparison(tmp_path)


def test_workers_are_counted_and_a_task_of_your_own_has_one(tmp_path):
    with pytest.raises(InputError, match="expected at least 1 worker, got 0"):
        run_comparison(tmp_path / "c", FEW, workers=0)
    task = load_task("spirals")
    with pytest.raises(InputError, match="run in one process: give workers=1"):
        run_comparison(tmp_path / "c", FEW, workers=2, task=task)
    assert list(tmp_path.iterdir()) == []
