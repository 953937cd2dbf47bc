"""Outcomes read from run folders: those that the trainer wrote, and those that it would not."""

import json
from pathlib import Path
from typing import Any

import pytest

from esper.artifacts import Artifact
from esper.errors import EsperError, InputError, LedgerError, RunFolderError
from esper.nissa import MeasurementsDigest
from esper.tolaria import make_config, open_run, start_run
from esper.tolaria._ledger import Ledger
from esper.tolaria._run_folder import SCHEMA_VERSION
from esper.tolaria.comparison import Outcome, Word, judge, read_outcome
from esper.urza import Library
from tests.esper.comparison_outcomes import design

KERNEL = "ab" * 32


# Runs that the trainer writes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, artifact: Artifact) -> list[Outcome]:
    """Two arms with three seeds each."""
    folder = tmp_path_factory.mktemp("comparison")
    Library(folder / "library").put(artifact)
    graft = {"site": "layers.0", "seed": 1, "kernel": artifact.kernel_id}
    found: list[Outcome] = []
    for seed in range(3):
        for arm, grafts in (("static-small", []), ("static-final", [graft])):
            config = make_config(
                task="spirals", backend="jax", seed=seed, steps=60, decide_every=20,
                controller="none", initial_grafts=grafts, library=folder / "library",
            )  # fmt: skip
            start_run(folder / arm / f"seed-{seed}", config)
            found.append(read_outcome(folder / arm / f"seed-{seed}", arm, "steps"))
    return found


def test_an_outcome_is_what_the_run_recorded(trained: list[Outcome]):
    for run in trained:
        path = Path(run.folder)
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert (run.ended, run.diverged_at, run.rollbacks) == (True, None, 0)
        assert run.steps == run.setting.planned_steps == 60
        for name in ("test_accuracy", "test_loss", "validation_loss", "parameters", "compilations"):
            assert getattr(run, name) == rows[-1][name]
        assert run.seconds == pytest.approx(sum(rows[-1]["seconds"].values()))
        assert run.curve.steps == (0, 20, 40, 60)
        assert run.curve.test_accuracy == tuple(row["test_accuracy"] for row in rows)
        assert run.curve.test_loss == tuple(row["test_loss"] for row in rows)
        assert run.training_flops == rows[-1].get("flops")
        assert (run.kept, run.removed) == (1 if run.arm == "static-final" else 0, 0)
        assert run.setting.task == "spirals"
        assert run.setting.backend == "jax"
        assert dict(run.setting.recipe)["learning_rate"] == "0.01"
        assert "jax" in dict(run.setting.versions)
    assert [run.seed for run in trained[::2]] == [0, 1, 2]


def test_real_runs_are_judged(trained: list[Outcome]):
    plan = design(3, treatment="static-final", controls=("static-small",), alpha=0.3,
                  smallest_effect=0.3)  # fmt: skip
    pair = judge(plan, trained).pair("static-small")
    ends = {(run.arm, run.seed): run.test_accuracy or 0.0 for run in trained}
    by_hand = [ends["static-final", seed] - ends["static-small", seed] for seed in range(3)]
    assert pair.differences == pytest.approx(tuple(by_hand))
    # Both arms are near chance after 60 steps, and 0.3 is far from that.
    assert pair.word in (Word.EQUIVALENT, Word.BETTER)
    # At the usual alpha three seeds cannot show anything.
    usual = design(3, treatment="static-final", controls=("static-small",))
    (reason,) = judge(usual, trained).refusals
    assert reason == (
        "too few seeds: with 3 no sign-flip test gives a p-value below 0.25, and 1 control at"
        " alpha 0.05 take 0.05 (Holm); expected at least 6 seeds"
    )


def test_a_ledger_that_was_changed_is_found(trained: list[Outcome], tmp_path: Path):
    source = Path(trained[1].folder)
    for name in ("run.json", "metrics.jsonl", "events.jsonl"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    ledger = tmp_path / "events.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"seed":1', b'"seed":2', 1))
    with pytest.raises(LedgerError, match="is damaged at line 1"):
        read_outcome(tmp_path, "static-final", "steps")


def test_measurements_that_were_changed_are_found(trained: list[Outcome], tmp_path: Path):
    source = Path(trained[1].folder)
    for name in ("run.json", "metrics.jsonl", "events.jsonl"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    assert read_outcome(tmp_path, "static-final", "steps").ended
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # What is of the process that trained is no part of the run.
    rows[-1]["seconds"]["train"] += 1.0
    written = "".join(json.dumps(own) + "\n" for own in rows)
    (tmp_path / "metrics.jsonl").write_text(written)
    assert read_outcome(tmp_path, "static-final", "steps").ended
    rows[-1]["test_accuracy"] += 0.01
    written = "".join(json.dumps(own) + "\n" for own in rows)
    (tmp_path / "metrics.jsonl").write_text(written)
    with pytest.raises(EsperError, match="was changed after the run had ended: the SHA-256"):
        read_outcome(tmp_path, "static-final", "steps")


# Runs as they may be written


def row(step: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "step": step,
        "train_loss": 0.5 if step else None,
        "validation_loss": 0.5, "validation_accuracy": 0.5, "test_loss": 0.5,
        "test_accuracy": 0.5 + step / 1_000,
        "stages": [[0, 0, 0]], "alphas": [[0.0, 0.0, 0.0]], "parameters": 42, "compilations": 1,
        "seconds": {"train": step / 100, "evaluate": 0.5},
        "flops": 1e3 * step, "health": [[None]], "learning_rate": 0.01, "rollbacks": 0,
    }  # fmt: skip
    return values | changes


def entry(step: int, kind: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "kind": kind, "step": step, "layer": 0, "seed": seed, "kernel": KERNEL, "value": 0.0,
        "span": 0, "shape": "linear", "reason": "",
    } | changes  # fmt: skip


def mark(step: int, name: str = "end") -> dict[str, Any]:
    return {"kind": "mark", "step": step, "name": name, "seeds": "0" * 64}


def rollback(step: int, to: int, lines: int) -> dict[str, Any]:
    return {"kind": "rollback", "step": step, "to": to, "lines": lines,
            "cause": "loss not finite", "remedy": "smaller steps"}  # fmt: skip


ROWS = [row(0), row(50), row(100)]


def write_run(
    path: Path,
    rows: list[dict[str, Any]],
    events: list[dict[str, Any]],
    **content: Any,
) -> Path:
    """A run's folder with a ledger that verifies."""
    path.mkdir()
    config = make_config(task="spirals", backend="jax", seed=7, steps=100)
    host = {"sites": ["layers.0", "layers.1"], "parameters": 42}
    described = {
        "schema_version": SCHEMA_VERSION, "config": config.model_dump(mode="json"), "kernels": {},
        "versions": {"jax": "0.10.2"}, "host": host,
        "task": {"name": "spirals", "digest": "cd" * 32},
    }  # fmt: skip
    described = {k: v for k, v in (described | content).items() if v is not None}
    (path / "run.json").write_text(json.dumps(described))
    (path / "events.jsonl").touch()
    ledger = Ledger(path / "events.jsonl", open_run(path).genesis)
    ledger.append(events)
    ledger.close()
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def read(path: Path, rows: list[dict[str, Any]], events: list[dict[str, Any]], **content: Any):
    return read_outcome(write_run(path / "run", rows, events, **content), "grown", "flops")


def test_host_task_and_flops_are_read(tmp_path: Path):
    run = read(tmp_path, ROWS, [mark(100)])
    assert (run.arm, run.seed, run.budget, run.ended) == ("grown", 7, "flops", True)
    assert run.setting.task_digest == "cd" * 32
    assert run.setting.host_sites == ("layers.0", "layers.1")
    assert run.setting.host_parameters == 42
    assert run.training_flops == 1e5
    assert run.curve.flops == (0.0, 5e4, 1e5)
    assert run.seconds == 1.5


def test_runs_of_old_are_read_without_them(tmp_path: Path):
    newer = ("flops", "health", "learning_rate", "rollbacks")
    rows = [{k: v for k, v in r.items() if k not in newer} for r in ROWS]
    config = {
        "task": "spirals", "backend": "jax", "seed": 7, "steps": 100, "batch_size": None,
        "optimizer": "adam", "learning_rate": 0.01, "blueprint": "residual_mlp", "decide_every": 50,
    }  # fmt: skip
    old = {"schema_version": 1, "config": config, "host": None, "task": None}
    run = read(tmp_path, rows, [mark(100)], **old)
    assert run.setting.recipe == (
        ("batch_size", "None"), ("optimizer", "adam"), ("learning_rate", "0.01")
    )  # fmt: skip
    assert (run.setting.task, run.setting.task_digest) == ("spirals", None)
    assert (run.setting.host_sites, run.setting.host_parameters) == (None, None)
    assert run.training_flops is None
    assert run.curve.flops == (None, None, None)


@pytest.mark.parametrize(
    ("rows", "events"),
    [
        (ROWS, []),
        (ROWS, [mark(50, "half")]),
        (ROWS[:2], [mark(100)]),
        ([], []),
        # The end was taken back.
        ([*ROWS[:2]], [mark(100), rollback(100, 50, 0)]),
    ],
)
def test_a_run_that_did_not_end_says_so(tmp_path: Path, rows, events):
    assert not read(tmp_path, rows, events).ended


def test_a_run_that_stopped_early_ended(tmp_path: Path):
    run = read(tmp_path, ROWS[:2], [mark(50)])
    assert run.ended
    assert (run.steps, run.setting.planned_steps) == (50, 100)


def test_a_branch_of_another_run_says_so(tmp_path: Path):
    assert not read(tmp_path, ROWS, [mark(100)]).setting.branched
    (tmp_path / "more").mkdir()
    assert read(tmp_path / "more", ROWS, [mark(100)], branch={"step": 50}).setting.branched


def test_a_run_that_did_not_begin_has_nothing(tmp_path: Path):
    run = read(tmp_path, [], [])
    assert (run.steps, run.test_accuracy, run.seconds, run.curve.steps) == (0, None, None, ())


@pytest.mark.parametrize("name", ["train_loss", "validation_loss", "test_loss"])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_divergence(tmp_path: Path, name, value):
    rows = [ROWS[0], row(50, **{name: value}), ROWS[2]]
    run = read(tmp_path, rows, [mark(100)])
    assert run.diverged_at == 50
    assert run.ended


def test_no_training_loss_before_the_first_step_is_none(tmp_path: Path):
    assert ROWS[0]["train_loss"] is None
    assert read(tmp_path, ROWS, [mark(100)]).diverged_at is None


def test_a_host_may_diverge_before_the_first_step(tmp_path: Path):
    assert read(tmp_path, [row(0, test_loss=None), *ROWS[1:]], [mark(100)]).diverged_at == 0


def test_what_a_rollback_took_back_is_no_divergence(tmp_path: Path):
    events = [entry(20, "load"), rollback(100, 50, 0), entry(60, "load"), mark(100)]
    rows = [*ROWS[:2], row(100, train_loss=None, flops=1e5), row(50, flops=1.5e5),
            row(100, flops=2e5)]  # fmt: skip
    run = read(tmp_path, rows, events)
    assert (run.diverged_at, run.rollbacks, run.ended) == (None, 1, True)
    assert run.curve.steps == (0, 50, 100)
    # The work was done all the same.
    assert run.curve.flops == (0.0, 1.5e5, 2e5)
    assert run.training_flops == 2e5
    # One load was taken back with what followed it; the other is not there at the end.
    assert (run.kept, run.removed) == (0, 1)


def test_what_the_ledger_saw_are_all_measurements(tmp_path: Path):
    rows = [*ROWS, row(50), row(100, test_loss=0.4)]
    end = mark(100) | {"measurements": str(MeasurementsDigest(rows))}
    run = read(tmp_path, rows, [rollback(100, 50, 0), end])
    assert (run.ended, run.test_loss) == (True, 0.4)


def test_measurements_that_go_back_by_themselves_are_damage(tmp_path: Path):
    with pytest.raises(
        EsperError, match="step 50 follows step 100, and the ledger beside it records no rollback"
    ):
        read(tmp_path, [*ROWS, row(50)], [mark(100)])


@pytest.mark.parametrize("lines", [3, -1, None, "1"])
def test_a_rollback_to_nowhere_is_damage(tmp_path: Path, lines):
    with pytest.raises(
        EsperError, match=f"the rollback at line 1 to go back to a line before it, got {lines!r}"
    ):
        read(tmp_path, ROWS, [rollback(100, 50, lines), mark(100)])


def test_kernels_kept_and_removed(tmp_path: Path):
    seeds = {
        0: ["load", "activate", "fossilize"],
        1: ["load", "activate", "unload", "load", "cancel", "load", "fail"],
        2: ["load", "activate", "fold", "load"],
        3: ["load", "activate", "fossilize", "fold"],
        4: ["load", "activate"],
    }
    events = [entry(10, kind, seed) for seed, kinds in seeds.items() for kind in kinds]
    # What other entries say moves no kernel.
    others = [
        {"kind": "veto", "step": 20, "layer": 0, "seed": 0, "action": "graft", "kernel": KERNEL,
         "rule": "budget", "reason": "too many parameters"},
        {"kind": "worth", "step": 30, "layer": 0, "seed": 0, "value": 0.1, "low": None,
         "high": None},
    ]  # fmt: skip
    rows = [*ROWS[:2], row(100, stages=[[4, 0, 1, 4, 2, 0]])]
    run = read(tmp_path, rows, [*events, *others, mark(100)])
    # Kept: 0, 3 and 4, and the one of 2 that was folded; its second one is still loading.
    assert (run.kept, run.removed) == (4, 3)


# What cannot be read


def test_a_folder_without_a_run(tmp_path: Path):
    with pytest.raises(RunFolderError, match="holds no run"):
        read_outcome(tmp_path, "grown", "steps")


def test_a_run_that_is_the_folder_above_is_told(trained: list[Outcome]):
    # With one seed the folder that was asked for is the run, and not a folder of runs.
    run = Path(trained[1].folder)
    with pytest.raises(RunFolderError, match=rf"seed-0 holds no run: .*; {run} is a run itself$"):
        read_outcome(run / "seed-0", "static-final", "steps")


def test_an_unknown_budget(tmp_path: Path):
    with pytest.raises(InputError, match="expected the budget to be one of steps, flops, got 'h'"):
        read_outcome(tmp_path, "grown", "h")  # pyright: ignore[reportArgumentType]


def test_measurements_that_are_damaged(tmp_path: Path):
    with pytest.raises(EsperError, match="is damaged at line 2"):
        read(tmp_path, [ROWS[0], {"step": 50}], [mark(100)])


def test_a_host_that_is_no_mapping(tmp_path: Path):
    with pytest.raises(RunFolderError, match=r"run\.json is damaged"):
        read(tmp_path, ROWS, [mark(100)], host=["layers.0"])
