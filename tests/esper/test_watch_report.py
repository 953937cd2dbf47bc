"""The report and the progress line know vetoes, rollbacks, worths and shapes of ramps."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from esper.nissa import ProgressView, read_growth, read_run, write_report
from esper.oona import InProcessBus, Topic
from esper_functional import SeedLifecycleState
from tests.esper.watch_runs import Plan, RunMaker, make_run


def text_of(run: Path, tmp_path: Path) -> str:
    write_report(tmp_path / "report.html", {"spirals": {"grown": [read_run(run)]}}, title="Esper")
    return (tmp_path / "report.html").read_text()


def test_a_history_with_rollbacks_is_that_of_the_state(tmp_path):
    maker = RunMaker(tmp_path / "run", Plan(layers=6, steps=1_500))
    for i in range(1, 90):
        if i in (30, 45, 46):
            maker.go_back(min(i // 4, 9))
        maker.boundary()
    maker.close()
    run = read_run(tmp_path / "run")
    growth = read_growth(run)
    assert growth.trouble == ""
    steps = [row["step"] for row in run.metrics]
    assert steps == list(range(0, maker.step, 20))
    last = {(h.layer, h.seed): h.spans[-1][2] for h in growth.histories}
    for layer in range(6):
        for seed in range(2):
            stage = SeedLifecycleState(int(maker.state.stage[layer, seed]))
            assert last.get((layer, seed), SeedLifecycleState.DORMANT) in (
                stage, SeedLifecycleState.ACTIVE,
            )  # fmt: skip
    # A stage of no length at the end is not drawn; all that has lasted is.
    ends = {h.spans[-1][1] for h in growth.histories}
    assert ends == {maker.step - 20}
    kept = int(((maker.state.stage == 2) | (maker.state.stage == 4)).sum())
    assert growth.kept == kept


def test_the_report_lists_vetoes_and_rollbacks_among_decisions(tmp_path):
    maker = RunMaker(tmp_path / "run", Plan(layers=6, steps=1_000, busy=0.1))
    for _ in range(30):
        maker.boundary()
    maker.go_back(10)
    maker.finish()
    page = text_of(tmp_path / "run", tmp_path)
    assert "its events cannot be told" not in page
    assert "vetoed: graft" in page
    assert "cooldown: layer" in page
    assert "rolled back to step 400" in page
    assert "the training loss is not finite; half the learning rate" in page
    assert "graft asked for, taken back" in page
    assert "random seed 0: was taken back to an earlier step once." in page


def test_a_run_that_took_nothing_back_says_nothing_of_it(tmp_path):
    page = text_of(make_run(tmp_path / "run", steps=300), tmp_path)
    assert "taken back" not in page


def test_shaped_ramps_are_drawn_as_they_were_measured(tmp_path):
    path = make_run(tmp_path / "run", steps=600, busy=0.3)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    curved = [i for i, row in enumerate(rows) if 0.0 < row["alphas"][1][0] < 1.0]
    for i in curved:
        # As if by a cosine: not where a straight line would be.
        rows[i]["alphas"][1][0] = 0.5 - 0.5 * math.cos(math.pi * rows[i]["alphas"][1][0])
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (history,) = [h for h in read_growth(read_run(path)).histories if (h.layer, h.seed) == (1, 0)]
    drawn = dict(history.alpha)
    assert curved
    for i in curved:
        assert drawn[rows[i]["step"]] == rows[i]["alphas"][1][0]
    (straight,) = [h for h in read_growth(read_run(path)).histories if (h.layer, h.seed) == (0, 0)]
    assert len(straight.alpha) != len(history.alpha)


def measured(step: int) -> dict[str, Any]:
    return {"step": step, "train_loss": 0.5, "test_accuracy": 0.75, "stages": [[0, 2]]}


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        ([], "loss 0.5000  test accuracy 75.0%  1 dormant, 1 active"),
        (["veto", "worth", "ramp", "veto"], "1 dormant, 1 active, 2 vetoed"),
        (["rollback"], "1 dormant, 1 active, 1 rolled back"),
    ],
)
def test_progress_counts_vetoes_and_rollbacks(kinds, told):
    bus, out = InProcessBus(), io.StringIO()
    with ProgressView(bus, "spirals", 100, Console(file=out, width=200)):
        for kind in kinds:
            bus.publish(Topic.SEED_EVENT, {"kind": kind, "step": 20})
        bus.publish(Topic.METRICS, measured(20))
    assert out.getvalue().endswith(told + "\n")
