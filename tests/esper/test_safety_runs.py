"""Safety in whole runs: what it refuses, what it takes back, and what is recorded of it."""

from functools import partial
from pathlib import Path

import pytest

from esper.nissa import read_run, write_report
from esper.tamiyo import Action, Decision
from esper.tolaria import (
    Hooks,
    _build,
    decisions_of,
    open_run,
    replay_run,
    resume_run,
    start_run,
)
from tests.esper.runs import EVENTFUL, config, entries, measured

PLAIN = {
    "task": "spirals",
    "steps": 80,
    "decide_every": 20,
    "checkpoint_every": 20,
    "batch_size": 64,
    "loading_steps": 5,
    "ramp_steps": 5,
    "variants": 1,
    "seeds_per_layer": 2,
    "controller": "fixed",
}


class Killed(BaseException):
    """Ends a run at once: nothing of it may be written any more."""


def told(run: Path, *kinds: str):
    return [entry for entry in entries(run) if entry["kind"] in kinds]


def test_a_kernel_that_vanishes_from_the_library_is_not_grafted(tmp_path):
    plain = partial(config, tmp_path, "torch", PLAIN)
    # Another run's kernel: it fits, and is none of those that this run holds in memory.
    start_run(tmp_path / "first", plain(variants=2, steps=20))
    site, (_, kernel) = next(iter(open_run(tmp_path / "first").kernels.items()))
    files = [path for path in (tmp_path / "library").rglob(f"*{kernel}*") if path.is_file()]

    def vanish(step, loss):
        if step == 30:
            for file in files:
                file.unlink()

    graft = {"step": 40, "action": "graft", "site": site}
    own = plain(schedule_of_grafts=[graft | {"seed": 0, "kernel": kernel}, graft | {"seed": 1}])
    start_run(tmp_path / "run", own, hooks=Hooks(on_step=vanish))
    vetoes = told(tmp_path / "run", "veto")
    assert [(veto["rule"], veto["step"], veto["seed"]) for veto in vetoes] == [
        ("legal", 40, 0),
        ("legal", 60, 0),
    ]
    assert kernel[:12] in vetoes[0]["reason"]
    # Nothing is done by half, and what else was asked for is done.
    assert [entry["seed"] for entry in told(tmp_path / "run", "load", "activate")] == [1, 1]
    assert told(tmp_path / "run", "fail") == []
    assert replay_run(tmp_path / "run").rollbacks == 0


def test_a_run_that_unloads_what_does_harm_is_resumed_to_the_same_record(tmp_path):
    own = config(
        tmp_path, "torch", PLAIN, steps=160, graft_every=20, learning_rate=0.05,
        blueprints=["low_rank"], safety={"unload_below_worth": 0.0, "judge_after_steps": 20},
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start_run(whole, own)
    # Every kernel is measured 20 steps after it came, and again; which do harm is a matter of
    # rounding elsewhere.
    assert {(own["layer"], own["seed"]) for own in told(whole, "worth")} >= {(0, 0), (0, 1)}
    unloads = told(whole, "unload")
    assert all(entry["reason"].startswith("it does harm: ") for entry in unloads)

    def kill(step, loss):
        if step == at:
            raise Killed

    kills = [91, 151]
    at = kills.pop(0)
    with pytest.raises(Killed):
        start_run(killed, own, hooks=Hooks(on_step=kill))
    while kills:
        at = kills.pop(0)
        with pytest.raises(Killed):
            resume_run(killed, hooks=Hooks(on_step=kill))
    resume_run(killed)
    assert (killed / "events.jsonl").read_bytes() == (whole / "events.jsonl").read_bytes()
    assert measured(killed) == measured(whole)
    assert replay_run(whole).rollbacks == 0


def test_a_decision_is_joined_with_what_was_measured_of_its_kernel():
    def at(kind, step, seed=0, **more):
        return {"kind": kind, "step": step, "layer": 0, "seed": seed, **more}

    first, again = at("decision", 20, action="graft"), at("decision", 100, action="graft")
    leaves, undone = at("decision", 80, action="unload"), at("decision", 120, seed=1)
    worths = [at("worth", step, value=0.1, low=0.0, high=0.2) for step in (40, 60, 120)]
    back = {"kind": "rollback", "step": 140, "to": 100, "lines": 11}
    ledger = [
        first, at("load", 20), at("worth", 40, seed=1), *worths[:2], leaves, at("unload", 80),
        at("worth", 90), again, at("load", 100), worths[2], undone, back,
    ]  # fmt: skip
    assert decisions_of(ledger) == [
        (first, (worths[0], worths[1])),
        (leaves, ()),
        (again, (worths[2],)),
    ]


class Wild:
    """Asks for anything anywhere, several times over, and for what is there not at all."""

    def decide(self, observation):
        random, kernels = observation.random, observation.candidates[0]
        every = [record.kernel_id for record in kernels] + ["f" * 64, ""]
        return [
            Decision(
                list(Action)[random.integers(len(Action))],
                int(random.choice([-1, 0, 0, 0, 2])),
                int(random.integers(-1, 4)),
                "who knows",
                every[random.integers(len(every))],
                alpha=float(random.uniform(-0.25, 1.25)),
            )
            for _ in range(40)
        ]

    def told(self, observation, applied, vetoed):
        assert len(applied) + len(vetoed) == 40

    def state(self):
        return {}

    def restore(self, state):
        pass


def test_no_controller_brings_a_run_down(tmp_path, monkeypatch):
    monkeypatch.setattr(_build, "controller_of", lambda config, sites, **_: Wild())
    asked = config(
        tmp_path, "torch", EVENTFUL, safety={}, steps=120, loading_steps=3, incubation_steps=0,
        ramp_steps=5, initialisation="as_compiled",
    )  # fmt: skip
    start_run(tmp_path / "run", asked)
    found = entries(tmp_path / "run")
    assert {"load", "unload", "veto"} <= {entry["kind"] for entry in found}
    vetoes = [entry for entry in found if entry["kind"] == "veto"]
    assert {entry["rule"] for entry in vetoes} == {"legal"}
    assert replay_run(tmp_path / "run").lines == len(found)
    run = read_run(tmp_path / "run")
    write_report(tmp_path / "page.html", {"runs": {"wild": [run]}}, title="wild")
    told = f"decisions refused, by rule: legal {len(vetoes):,}."
    assert told in (tmp_path / "page.html").read_text()
