"""A run is a function of its configuration: killed, resumed, trained again, taken back."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from esper.checkpoints import checkpoint_steps, load_checkpoint, tree_digest
from esper.checkpoints._manifest import step_place
from esper.errors import EsperError, InputError, Interrupted, LedgerError
from esper.nissa import MeasurementsDigest, read_metrics
from esper.tolaria import (
    DivergedError,
    Hooks,
    branch_run,
    make_trainee,
    open_run,
    read_what_if,
    replay_run,
    resume_run,
    retrain_run,
    start_run,
)
from esper.tolaria import _grow as growing
from esper.tolaria._ledger import Ledger
from tests.depth import depth
from tests.esper.runs import EVENTFUL, HARMED, UNSTEADY, config, entries, measured

BACKENDS = ["jax", "torch"]


class Killed(BaseException):
    """Ends a run at once: nothing of it may be written any more."""


def arrays(run: Path) -> dict[int, str]:
    """Digests of the arrays in a run's checkpoints, but for those that an interruption wrote."""
    folder = run / "checkpoints"
    every = open_run(run).config.checkpoint_every
    last = max(checkpoint_steps(folder))
    return {
        step: tree_digest(load_checkpoint(folder, step)[0])
        for step in checkpoint_steps(folder)
        if step % every == 0 or step == last
    }


def assert_equal_runs(one: Path, other: Path) -> None:
    assert (one / "events.jsonl").read_bytes() == (other / "events.jsonl").read_bytes()
    assert measured(one) == measured(other)
    assert arrays(one) == arrays(other)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def eventful(place) -> dict[str, Path]:
    for backend in BACKENDS:
        start_run(place / backend, config(place, backend, EVENTFUL))
    return {backend: place / backend for backend in BACKENDS}


@pytest.fixture(scope="module")
def unsteady(place) -> dict[str, Path]:
    for backend in BACKENDS:
        start_run(place / f"unsteady-{backend}", config(place, backend, UNSTEADY))
    return {backend: place / f"unsteady-{backend}" for backend in BACKENDS}


def test_the_runs_have_what_is_tested(eventful, unsteady):
    for run in eventful.values():
        kinds = {entry["kind"] for entry in entries(run)}
        assert {"load", "activate", "incubate", "ramp", "worth", "veto", "fossilize"} <= kinds
    for run in unsteady.values():
        back = [entry for entry in entries(run) if entry["kind"] == "rollback"]
        assert [entry["remedy"] for entry in back[:3]] == [
            "the same steps again",
            "the youngest kernel is unloaded",
            "the batches are left out and learning rates halved",
        ]
        assert "more than 1.5 times the" in back[0]["cause"]
        assert measured(run)[-1]["rollbacks"] == len(back)
        assert {"load", "incubate", "ramp"} <= {entry["kind"] for entry in entries(run)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["eventful", "unsteady"])
def test_killed_at_twenty_steps_and_resumed_is_uninterrupted(request, place, backend, kind):
    whole = request.getfixturevalue(kind)[backend]
    values = {"eventful": EVENTFUL, "unsteady": UNSTEADY}[kind]
    run = place / f"killed-{kind}-{backend}"
    random = np.random.default_rng(7)
    kills = sorted(random.integers(1, 240, 20).tolist())

    def kill(step, loss):
        if step == at:
            raise Killed

    at = kills.pop(0)
    with pytest.raises(Killed):
        start_run(run, config(place, backend, values), hooks=Hooks(on_step=kill))
    while kills:
        at = kills.pop(0)
        with pytest.raises(Killed):
            resume_run(run, hooks=Hooks(on_step=kill))
    resume_run(run)
    assert_equal_runs(run, whole)


def test_kernels_that_harm_are_unloaded_and_a_run_killed_meanwhile_is_uninterrupted(place):
    values = config(place, "torch", HARMED)
    whole, run = place / "harmed", place / "harmed-killed"
    start_run(whole, values)
    record = entries(whole)
    unloads = [entry for entry in record if entry["kind"] == "unload"]
    assert len(unloads) >= 2
    for entry in unloads:
        assert "what is below -0 is unloaded" in entry["reason"]
        measured_here = [
            own
            for own in record
            if own["kind"] == "worth"
            and [own[key] for key in ("step", "layer", "seed")]
            == [entry[key] for key in ("step", "layer", "seed")]
        ]
        assert [own["high"] < 0.0 for own in measured_here] == [True]
    # The schedule knows nothing of it, and goes on with seeds that it finds free.
    emptied = {(entry["layer"], entry["seed"]): entry["step"] for entry in unloads}
    loads = [(e["step"], (e["layer"], e["seed"])) for e in record if e["kind"] == "load"]
    assert any(place in emptied and step > emptied[place] for step, place in loads)
    replay_run(whole)

    def kill(step, loss):
        if step == at:
            raise Killed

    kills = sorted({45, unloads[0]["step"] + 1, unloads[1]["step"] - 1})
    while kills:
        at = kills.pop(0)
        begin = partial(resume_run, run) if run.exists() else partial(start_run, run, values)
        with pytest.raises(Killed):
            begin(hooks=Hooks(on_step=kill))
    resume_run(run)
    assert_equal_runs(run, whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["eventful", "unsteady"])
def test_stopped_between_boundaries_and_resumed_is_uninterrupted(request, place, backend, kind):
    """What it would be taken back to is saved with it."""
    whole = request.getfixturevalue(kind)[backend]
    values = {"eventful": EVENTFUL, "unsteady": UNSTEADY}[kind]
    run = place / f"stopped-{kind}-{backend}"
    now = -1

    def count(step, loss):
        nonlocal now
        now = step

    for stop in (27, 33, 34, 61, 100, 139, 175, 239):
        hooks = Hooks(stop=lambda stop=stop: now + 1 >= stop, on_step=count)
        begin = partial(start_run, run, config(place, backend, values))
        with pytest.raises(Interrupted, match="go on with --resume"):
            (begin if now < 0 else partial(resume_run, run))(hooks=hooks)
    resume_run(run)
    assert_equal_runs(run, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_stretch_trained_again_is_the_record(eventful, unsteady, backend):
    random = np.random.default_rng(11)
    for run in (eventful[backend], unsteady[backend]):
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        stretches = [(0, 240), (0, 5), (239, 240), (40, 80)]
        while len(stretches) < depth(5, 20):
            first, last = sorted(random.integers(0, 241, 2).tolist())
            if first < last:
                stretches.append((first, last))
        for first, last in stretches:
            found = retrain_run(run, first, last)
            assert found.began == first - first % 40 if first < 240 else 200
            assert found.last == last
        whole = retrain_run(run, 0, 240)
        assert whole.checkpoints == (40, 80, 120, 160, 200, 240)
        assert whole.boundaries == 13
        assert whole.lines == len(entries(run))
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_record_that_was_changed_consistently_is_found_by_training_again(eventful, place):
    run = place / "changed"
    shutil.copytree(eventful["jax"], run)
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    metrics[4] = metrics[4].replace('"train_loss": 0.', '"train_loss": 1.')
    (run / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
    with pytest.raises(EsperError, match="was changed after the run had ended"):
        retrain_run(run, 60, 100)
    # And the digest with it, in a chain that is whole.
    folder, record = open_run(run), entries(run)
    record[-1]["measurements"] = str(MeasurementsDigest(read_metrics(folder.metrics)))
    folder.ledger.unlink()
    ledger = Ledger(folder.ledger, folder.genesis)
    ledger.append(record)
    ledger.close()
    with pytest.raises(LedgerError, match="differs from the record at step 80: train_loss was 1"):
        retrain_run(run, 60, 100)
    assert retrain_run(run, 120, 140).boundaries == 1


@pytest.mark.parametrize(("first", "last"), [(10, 10), (20, 10), (-1, 10), (0, 241)])
def test_a_stretch_that_is_not_there_is_refused(eventful, first, last):
    with pytest.raises(InputError, match=r"expected FROM\.\.TO within the steps 0 to 240"):
        retrain_run(eventful["torch"], first, last)


def test_the_order_of_preference_is_kept_by_the_record(place):
    run = place / "order"
    values = EVENTFUL | {"grow_at": ["layers.1", "layers.0"], "steps": 120}
    values |= {"controller": "heuristic"}
    start_run(run, config(place, "torch", values))
    loads = [entry for entry in entries(run) if entry["kind"] == "load"]
    assert loads[0]["layer"] == 1
    assert retrain_run(run, 0, 120).lines == len(entries(run))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fault_is_taken_back_and_training_goes_on_as_if_it_had_never_been(
    place, eventful, backend, monkeypatch
):
    """Parameters, moments, averages, seeds and cursor; the ledger tells of it, and nothing else."""
    values = EVENTFUL
    run = place / f"fault-{backend}"
    made = []

    def poisoned(task, wanted):
        own = make_trainee(task, wanted)
        made.append(_poison(own, at=131))
        return own

    monkeypatch.setattr(growing, "make_trainee", poisoned)
    start_run(run, config(place, backend, values))
    monkeypatch.undo()
    assert made == [[131]]
    back = [entry for entry in entries(run) if entry["kind"] == "rollback"]
    assert [(e["step"], e["to"], e["remedy"]) for e in back] == [(140, 120, "the same steps again")]
    assert back[0]["cause"] == "the training loss is nan at step 131"
    assert arrays(run)[240] == arrays(eventful[backend])[240]
    assert [row | {"rollbacks": 0} for row in measured(run)] == measured(eventful[backend])
    replay_run(run)
    # The machine's fault does not come again; what was recorded of it is followed.
    found = retrain_run(run, 100, 200)
    assert found.checkpoints == (120, 160, 200)
    killed = place / f"fault-killed-{backend}"
    shutil.copytree(run, killed)
    for step in (160, 200, 240):
        shutil.rmtree(step_place(killed / "checkpoints", step))
    resume_run(killed)
    assert_equal_runs(killed, run)


def _poison(own, at: int) -> list[int]:
    """Let a trainee's own arithmetic go wrong once, so that one step's loss is not finite."""
    done: list[int] = []
    whole = own.train

    def train(batches, rates, first, after):
        wrong, given = at - 1 - first, list(rates)
        if 0 <= wrong < len(given) and not done:
            done.append(at)
            given[wrong] = given[wrong]._replace(host=float("nan"))
        return whole(batches, given, first, after)

    own.train = train
    return done


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_that_goes_on_diverging_gives_up_and_says_what_was_tried(place, backend):
    wild = UNSTEADY | {"max_rollbacks": 2}
    run = place / f"wild-{backend}"
    with pytest.raises(DivergedError, match=r"taken back 2 times in a row \(the same steps again;"
                       r" the youngest kernel is unloaded\).*clip_norm") as told:  # fmt: skip
        start_run(run, config(place, backend, wild))
    assert "training diverged: the training loss is" in str(told.value)
    replay_run(run)
    with pytest.raises(DivergedError):
        resume_run(run)


def test_a_byte_of_a_ledger_that_was_changed_is_found_at_its_line(eventful, place):
    whole = (eventful["jax"] / "events.jsonl").read_bytes()
    run = place / "flipped"
    shutil.copytree(eventful["jax"], run)
    lines = whole.count(b"\n")
    random = np.random.default_rng(3)
    for at in random.integers(0, len(whole) - 1, 40).tolist():
        changed = bytearray(whole)
        changed[at] ^= 1 << int(random.integers(0, 7))
        (run / "events.jsonl").write_bytes(changed)
        line = whole[:at].count(b"\n") + 1
        # A new line that is none, or that is gone, shifts what follows.
        told = f"line {line}\\b" if changed.count(b"\n") == lines else "damaged"
        with pytest.raises(LedgerError, match=told):
            replay_run(run)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_branch_without_another_decision_is_the_run(eventful, place, backend, tmp_path):
    file = tmp_path / "same.yaml"
    file.write_text("from: 90\nchange: {patience: 1}\n")
    out = place / f"same-{backend}"
    branch_run(eventful[backend], out, read_what_if(file))
    assert measured(out) == measured(eventful[backend])
    final = arrays(out)
    assert {step: final[step] for step in (120, 160, 200, 240)} == {
        step: arrays(eventful[backend])[step] for step in (120, 160, 200, 240)
    }
    assert (79, "branch") in replay_run(out).verified


def test_a_branch_decides_otherwise_from_its_step_on(eventful, place, tmp_path):
    file = tmp_path / "other.yaml"
    file.write_text("from: 120\ndecisions:\n- {step: 140, action: graft, site: layers.0}\n")
    out = place / "other"
    branch_run(eventful["jax"], out, read_what_if(file))
    ours, theirs = measured(out), measured(eventful["jax"])
    assert ours[:6] == theirs[:6]
    assert ours[-1]["test_loss"] != theirs[-1]["test_loss"]
    late = [e for e in entries(out) if e["step"] >= 120 and e["kind"] == "load"]
    assert [(e["step"], e["layer"]) for e in late] == [(140, 0)]
    replay_run(out)
    assert retrain_run(out, 160, 200).checkpoints == (200,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from: 90\n", "changes nothing: give `decisions:`"),
        ("- 1\n", "must be a mapping with `from: STEP`"),
        ("from: 90\ndecisions: [{step: 80, action: graft, site: layers.0}]\n",
         "decides at step 80, before the branch begins at 90"),
        ("from: 90\ndecisions: [{step: 95, action: grow, site: layers.0}]\n", "decisions.0.action"),
        ("from: 90\nchange: {seed: 3}\n", "cannot change 'seed'"),
        ("from: 10\nchange: {patience: 3}\n", "none up to step 10: its first is of step 40"),
        ("from: 90\nchange: {stepps: 3}\n", "unknown key 'stepps'.*did you mean 'steps'"),
        ("from: 90\nchange: {steps: 80}\n", "begins at step 90 and ends at 80"),
    ],
)  # fmt: skip
def test_a_branch_that_cannot_be_is_refused(eventful, tmp_path, text, message):
    file = tmp_path / "what.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        branch_run(eventful["jax"], tmp_path / "out", read_what_if(file))
    assert not (tmp_path / "out").exists()
