"""Runs that ask a service: they do what it says, and train on as they are where nobody says it."""

import pytest
from typer.testing import CliRunner

from esper.cli._app import app
from esper.errors import EsperError, InputError
from esper.oona import MemoryBroker, SqliteBroker
from esper.tamiyo import Action
from esper.tamiyo.service import SHADOW_GROUP, Tamiyo
from esper.tolaria import (
    Hooks,
    WhatIf,
    branch_run,
    make_config,
    open_run,
    replay_run,
    resume_run,
    retrain_run,
    start_run,
)
from esper.tolaria._run_folder import run_name
from esper.urza import Library
from tests.esper.runs import EVENTFUL, config, entries, measured
from tests.esper.service_runs import Prompt, Scripted, graft_each_time, graft_once, serving

TINY = {
    **EVENTFUL, "steps": 40, "decide_every": 10, "checkpoint_every": 20, "safety": {},
    "grow_at": ["layers.0"], "variants": 1, "blueprint_sizes": {"width": 8}, "ramp_steps": 6,
    "loading_steps": 4, "incubation_steps": 0, "accumulate": 1, "initialisation": "as_compiled",
}  # fmt: skip
PROMPT = {"controller": "service", "service": {"wait_seconds": 0.001}}


@pytest.fixture
def asked(tmp_path, artifact):
    library = Library(tmp_path / "library")
    library.put(artifact)
    library.close()

    def made(**changes):
        return config(tmp_path, "torch", TINY, **changes)

    return made


@pytest.fixture
def never(asked, tmp_path):
    start_run(tmp_path / "never", asked(controller="none"))
    return measured(tmp_path / "never")


def notes(run):
    return [entry for entry in entries(run) if entry["kind"] == "note"]


def of_the_seeds(run):
    """What happened to seeds, without what was measured only because somebody was asked."""
    left_out = {"note", "worth", "mark", "decision"}
    return [entry for entry in entries(run) if entry["kind"] not in left_out]


def test_a_service_grafts_as_a_schedule_of_the_same_decisions_does(asked, tmp_path):
    """Through a file on which the service is another thread; and again, without a service."""
    run = tmp_path / "run"
    advisor = Scripted(graft_each_time)
    service = {"bus": f"sqlite:{tmp_path / 'bus.sqlite'}", "wait_seconds": 60.0}
    with (
        SqliteBroker(tmp_path / "bus.sqlite") as broker,
        serving(Tamiyo(advisor), broker) as served,
    ):
        start_run(run, asked(controller="service", service=service))
    assert {news.model for news in advisor.seen} == {run_name(run)}
    # What was measured of the layer that may grow; of the other one nobody asked.
    for grows, other in (news.report.data.follows for news in advisor.seen):
        assert all(share is not None for share in grows)
        assert other == (None, None)
    assert served.traffic.published == 3
    kernel = open_run(run).kernels["layers.0"][0]
    reason = "because the test says so"
    schedule = [
        {"step": step, "action": "graft", "site": "layers.0", "seed": seed, "kernel": kernel}
        for seed, step in enumerate((10, 20, 30))
    ]
    start_run(tmp_path / "direct", asked(controller="fixed", schedule_of_grafts=schedule))
    assert measured(run) == measured(tmp_path / "direct")
    loads = [entry for entry in entries(run) if entry["kind"] == "load"]
    assert [(own["step"], own["layer"], own["seed"], own["reason"]) for own in loads] == [
        (10, 0, 0, reason), (20, 0, 1, reason), (30, 0, 2, reason),
    ]  # fmt: skip

    def without_reasons(path):
        return [{**entry, "reason": ""} for entry in of_the_seeds(path)]

    assert without_reasons(run) == without_reasons(tmp_path / "direct")
    # The record leads to the same, and the bus is gone.
    (tmp_path / "bus.sqlite").unlink()
    assert replay_run(run).lines == len(entries(run))
    again = retrain_run(run, 0, 40)
    assert (again.lines, again.boundaries) == (len(entries(run)), len(measured(run)))
    assert not (tmp_path / "bus.sqlite").exists()
    changed = branch_run(
        run, tmp_path / "branch", WhatIf.model_validate({"from": 20, "decisions": []})
    )
    assert changed.config.service is None


def test_what_a_killed_run_was_told_it_does_again_and_then_it_asks_anew(asked, tmp_path):
    class Killed(Exception):
        pass

    def die(step, _):
        if step == 34:
            raise Killed

    def prompt():
        return Prompt().answered_by(Tamiyo(Scripted(graft_each_time)))

    whole, run = tmp_path / "whole", tmp_path / "run"
    start_run(whole, asked(**PROMPT), broker=prompt())
    with pytest.raises(Killed):
        start_run(run, asked(**PROMPT), hooks=Hooks(on_step=die), broker=prompt())
    found = entries(run)
    assert max(entry["step"] for entry in found) == 34
    resume_run(run, broker=MemoryBroker())
    # Nobody heard of it any more, and step 40 was the next to be decided upon.
    assert entries(run)[: len(found)] == found
    assert [own["step"] for own in notes(whole)] == [10, 20, 30]
    assert entries(run) == entries(whole)


def test_without_waiting_what_was_decided_is_done_at_the_next_boundary(asked, tmp_path):
    run = tmp_path / "run"
    start_run(
        run, asked(controller="service"),
        broker=Prompt().answered_by(Tamiyo(Scripted(graft_once))),
    )  # fmt: skip
    loads = [entry for entry in entries(run) if entry["kind"] == "load"]
    assert [own["step"] for own in loads] == [20]
    # The service asked again while the first was on its way, and that was not legal any more.
    (veto,) = [entry for entry in entries(run) if entry["kind"] == "veto"]
    assert (veto["step"], veto["rule"], veto["action"]) == (30, "legal", Action.GRAFT)
    assert replay_run(run).lines == len(entries(run))


def test_a_shadow_changes_nothing_and_what_it_would_have_done_is_recorded(asked, never, tmp_path):
    run = tmp_path / "run"
    tamiyo = Tamiyo(Scripted(graft_once), shadow=True)
    bus = Prompt().answered_by(tamiyo)
    start_run(run, asked(**PROMPT), broker=bus)
    assert measured(run) == never
    # At its end it has left the bus.
    assert {own.group for own in bus.statistics().groups} == {SHADOW_GROUP}
    assert [own["step"] for own in notes(run)] == [10, 20, 30]
    assert notes(run)[0]["reason"].startswith("in shadow, the service would have: graft kernel ")
    assert notes(run)[0]["reason"].endswith(
        " in seed 0 of layers.0, about step 10 (because the test says so)"
    )
    assert retrain_run(run, 0, 40).lines == len(entries(run))


class Down(MemoryBroker):
    """A bus that takes nothing."""

    def publish(self, messages) -> None:
        raise EsperError("it is down")


def test_a_boundary_waits_for_the_answer_which_may_be_that_nothing_is_to_be_done(
    asked, never, tmp_path
):
    """Were it not answered, each boundary would take a quarter of an hour."""
    bus = Prompt().answered_by(Tamiyo(Scripted(lambda news: ())))
    run = tmp_path / "run"
    start_run(run, asked(controller="service", service={"wait_seconds": 900.0}), broker=bus)
    assert measured(run) == never
    assert notes(run) == []
    assert bus.service.traffic.published == 3


@pytest.mark.parametrize("broker", [MemoryBroker, Down])
def test_a_run_that_nobody_answers_is_one_that_never_grows(asked, never, tmp_path, broker):
    run = tmp_path / "run"
    start_run(run, asked(**PROMPT), broker=broker())
    assert measured(run) == never
    told = [(own["step"], own["reason"]) for own in notes(run)]
    wrong = "the service could not be asked, and is at later boundaries: it is down"
    assert told == ([(10, wrong)] if broker is Down else [])
    # Nobody says of such a run that a policy waited.
    shown = CliRunner().invoke(app, ["tamiyo", "explain", str(run)], env={"COLUMNS": "200"})
    assert "nothing else was likelier" not in shown.output
    assert shown.exit_code == (0 if broker is Down else 2)
    assert ("it is down" if broker is Down else "nothing was decided") in shown.output


@pytest.mark.parametrize(
    ("service", "match"),
    [
        (None, "needs the bus that the service is on: write `service: {bus: redis://"),
        ({"bus": "http://x"}, "http: names no bus: expected memory:, sqlite:PATH or redis://"),
        ({"bus": "memory:"}, "a bus in memory is in one process, where no service hears it"),
        ({"bus": "sqlite:no-such-folder/bus"}, "there is no folder"),
    ],
)
def test_a_bus_that_is_none_is_said_before_anything_is_written(asked, tmp_path, service, match):
    with pytest.raises(InputError, match=match):
        start_run(tmp_path / "run", asked(controller="service", service=service))
    assert not (tmp_path / "run").exists()


def test_a_run_of_the_command_line_asks_nobody_in_its_own_memory(tmp_path):
    run = tmp_path / "run"
    told = CliRunner().invoke(
        app,
        [
            "grow", "--task", "xor-4", "--controller", "service", "--bus", "memory:",
            "--out", str(run),
        ],
    )  # fmt: skip
    assert told.exit_code == 2
    assert "a bus in memory is in one process, where no service hears it" in told.stderr
    assert not run.exists()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"service": {"wait_seconds": -1.0}}, "service.wait_seconds: Input should be greater"),
        ({"service": {"buss": "x"}}, "unknown key 'service.buss'; did you mean 'bus'"),
        ({"service": {"bus": "redis://u:secret@h/0"}}, "`service.bus` holds a password"),
        ({"service": {}, "controller": "heuristic"}, "`service` is for runs with `controller: s"),
    ],
)
def test_what_a_configuration_cannot_ask_for_is_said(values, match):
    with pytest.raises(InputError, match=match) as caught:
        make_config(**{"task": "spirals", "backend": "jax", "controller": "service"} | values)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "arguments", "match"),
    [
        ("", [], "needs the bus that the service is on"),
        ("service: {bus: 'http://x'}", [], "http: names no bus"),
        ("service: {wait_seconds: -1}", [], "service.wait_seconds: Input should be greater than"),
        ("", ["--bus", "http://x"], "http: names no bus"),
    ],
)
def test_grow_says_what_is_missing_with_status_2(text, arguments, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asks.yaml").write_text(text)
    asked = ["grow", "--task", "spirals", "--backend", "torch", "--controller", "service"]
    done = CliRunner().invoke(app, [*asked, "--config", "asks.yaml", *arguments])
    assert done.exit_code == 2, done.output
    assert match in " ".join((done.stdout + done.stderr).split())
    assert not (tmp_path / "runs").exists()
