"""Steps that jax trains in one call are those that it trains one by one, to the last bit."""

# A program that gives other bits is not used, and which do depends on the compiler: what must be
# equal is equal for all, and linear layers are among those that must be used.

import numpy as np
import pytest

from esper.errors import Interrupted
from esper.tolaria import (
    Hooks,
    _jax_stretch,
    _jax_trainee,
    resume_run,
    retrain_run,
    start_run,
)
from esper.tolaria._jax_programs import PROGRAMS
from esper.tolaria._jax_stretch import Exactness
from esper.tolaria._trainee import Batch, Optimisation, Rates
from esper.tolaria.tasks import Split
from tests.esper.jax_hosts import BATCH, RATES, TASKS, graft, kernel_for, make
from tests.esper.runs import EVENTFUL, config, entries, measured
from tests.esper.test_exact_runs import assert_equal_runs
from tests.esper.trainee_life import bits

HOW = {
    "adam": Optimisation(),
    "sgd": Optimisation("sgd", momentum=0.9, weight_decay=0.01),
    "adamw": Optimisation("adamw", weight_decay=0.01, clip_norm=0.5, accumulate=2, ema_decay=0.9),
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(_jax_trainee, "EXACT", Exactness())


def both_ways(own, batches, rates, step):
    """Arrays and losses of steps one by one, of the trial of their program, and of its use."""
    held, found = own.hold(), []
    for together in (False, True, True):
        own.take_back(held)
        if together:
            losses = own.steps(batches, rates, step)
        else:
            losses = [own.step(b, rates[i], step + i) for i, b in enumerate(batches)]
        found.append((bits(own.snapshot()), own.read_losses(losses).tobytes()))
    assert found[0][0] != bits(own.snapshot(held))
    return found


def exact(own):
    """Whether the program was used."""
    return _jax_trainee.EXACT.known((own._key("steps", own._now.plan), own._running[1]))


@pytest.mark.parametrize("how", sorted(HOW))
@pytest.mark.parametrize("name", ["dropped", "normed", "grammar", "shapes"])
def test_the_steps_are_the_same(name, how):
    build, site, of = TASKS[name]
    own = make(build(), optimisation=HOW[how])
    row = own.sites.index(site)
    graft(own, row, kernel_for(own, row, of), 0, 0.7)
    rates = [Rates(0.01 / (i + 1), {0: 0.002 * i}) for i in range(6)]
    one, *others = both_ways(own, [np.roll(BATCH, i) for i in range(6)], rates, 3)
    assert one == others[0] == others[1]
    if name in ("dropped", "normed"):
        assert exact(own)


def test_the_steps_on_a_whole_part_are_the_same():
    own = make(TASKS["normed"][0]())
    one, *others = both_ways(own, [None] * 5, [RATES] * 5, 0)
    assert one == others[0] == others[1]
    assert exact(own)


def test_a_program_that_was_exact_is_tried_again_on_another_batch():
    own = make(TASKS["normed"][0]())
    for size in (16, 8):
        both_ways(own, [BATCH[:size]] * 5, [RATES] * 5, 0)
        assert exact(own)
    assert len(_jax_trainee.EXACT._found) == 2


def test_a_program_that_gives_other_bits_is_not_used(soon, monkeypatch):
    own = make(TASKS["normed"][0]())
    for step in range(4):
        own.step(BATCH, RATES, step)
    assert own.at_once == 5
    get = PROGRAMS.get

    def other(key, *arguments):
        program = get(key, *arguments)
        if key.kind != "steps":
            return program
        return lambda *a: (*(result := program(*a))[:-1], result[-1] + 1e-6)

    monkeypatch.setattr(PROGRAMS, "get", other)
    one, trial, _ = both_ways(own, [BATCH] * 5, [RATES] * 5, 4)
    assert one == trial
    for step in range(4):
        own.step(BATCH, RATES, step)
    assert own.at_once == 1


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(_jax_stretch, "STILL_STEPS", 3)
    monkeypatch.setattr(_jax_trainee, "AT_ONCE", 5)
    monkeypatch.setattr(_jax_stretch, "SHORT_STEP", 60.0)


def test_several_steps_are_trained_at_once_where_nothing_has_changed_for_long(soon, monkeypatch):
    build, site, of = TASKS["normed"]
    own = make(build())

    def trained(count):
        before = own.at_once
        for step in range(count):
            own.step(BATCH, RATES, step)
        return before, own.at_once

    assert trained(2) == (1, 1)
    assert trained(1) == (1, 5)
    held = own.hold()
    row = own.sites.index(site)
    graft(own, row, kernel_for(own, row, of), 0, 1.0)
    assert trained(3) == (1, 5)
    own.take_back(held)
    monkeypatch.setattr(_jax_stretch, "SHORT_STEP", 0.0)
    assert trained(3) == (1, 1)
    monkeypatch.setattr(_jax_stretch, "SHORT_STEP", 60.0)
    assert trained(1) == (5, 5)


def test_given_examples_and_mapped_files_are_trained_on_one_by_one(soon, tmp_path):
    task = TASKS["normed"][0]()
    own = make(task)
    for step in range(4):
        own.step(Batch(task.train.x[:8], task.train.y[:8]), RATES, step)
    assert own.at_once == 1
    np.save(tmp_path / "x.npy", task.train.x)
    mapped = Split(np.load(tmp_path / "x.npy", mmap_mode="r"), task.train.y)
    own = make(task.__class__(**{**vars(task), "train": mapped}))
    for step in range(4):
        own.step(BATCH, RATES, step)
    assert own.at_once == 1


@pytest.fixture
def one_by_one(tmp_path):
    return start_run(
        tmp_path / "one", config(tmp_path, "jax", EVENTFUL), hooks=Hooks(on_step=lambda *_: None)
    ).path


def test_a_run_is_the_same(one_by_one, tmp_path, soon, monkeypatch):
    calls = []
    steps = _jax_trainee.JaxTrainee.steps
    monkeypatch.setattr(
        _jax_trainee.JaxTrainee, "steps", lambda self, *a: calls.append(a[2]) or steps(self, *a)
    )
    own = start_run(tmp_path / "own", config(tmp_path, "jax", EVENTFUL)).path
    assert len(calls) > 5
    assert_equal_runs(one_by_one, own)
    # A retrained stretch is looked at step by step.
    assert retrain_run(own, 50, 130).checkpoints


def test_a_run_is_the_same_when_stopped_between_calls(one_by_one, tmp_path, soon):
    asked = iter([*[False] * 40, True])
    path = tmp_path / "own"
    hooks = Hooks(stop=lambda: next(asked))
    with pytest.raises(Interrupted):
        start_run(path, config(tmp_path, "jax", EVENTFUL), hooks=hooks)
    resume_run(path)
    assert_equal_runs(one_by_one, path)


def test_a_budget_of_flops_ends_a_run_at_the_same_step(tmp_path, soon):
    values = {"task": "spirals", "controller": "none", "steps": 100, "decide_every": 40} | {
        "checkpoint_every": 40
    }
    bare = start_run(tmp_path / "whole", config(tmp_path, "jax", values)).path
    budget = measured(bare)[-1]["flops"] * 0.733
    ends = []
    for name, hooks in (("one", Hooks(on_step=lambda *_: None)), ("own", Hooks())):
        limited = config(tmp_path, "jax", values, max_training_flops=budget)
        ends.append(entries(start_run(tmp_path / name, limited, hooks=hooks).path)[-1])
    assert ends[0] == ends[1]
    assert ends[0]["step"] == 73
