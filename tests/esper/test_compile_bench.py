"""The compile benchmark runs, its variants are what they are called, and a false one is told of.

Real worker processes, and fresh processes that load a kernel; no time is looked at.
"""

import contextlib
import json
import math
import os

import pytest

from esper.urza import Library
from experiments.bench import _first_step_process as process
from experiments.bench._command import run
from experiments.bench._first_step import KEPT, REMEMBERED, report_first_step, session
from experiments.bench._paired import Sampling
from experiments.bench._results import Results
from experiments.bench._throughput import (
    Batch,
    distinct_jobs,
    environment,
    report_throughput,
    rotated,
    seeded_jobs,
    started,
)
from experiments.bench.compile import BENCHMARK, Settings, measure
from tests.depth import some

SETTINGS = Settings(
    sampling=Sampling(rounds=1, builds=1),
    blueprints=("low_rank", "bottleneck"),
    examples=((),),
    features=6,
    seeds=3,
    starts=1,
)
DISTINCT = "compile 2 kernels with programs of their own"
SEEDED = "compile 3 kernels that share programs"


def verdicts(results):
    return {check.name: check.met for check in results.checks}


def test_kernels_are_compiled_here_and_in_pools_alike():
    results = measure(SETTINGS, "compile")
    assert [name for name in results.offered if "compile" in name] == [
        DISTINCT, SEEDED, f"{DISTINCT}, workers started for it",
    ]  # fmt: skip
    assert verdicts(results) == dict.fromkeys(
        [
            f"{DISTINCT}: the same bytes everywhere",
            f"{DISTINCT}: 2 workers at work at once",
            f"{SEEDED}: the same bytes everywhere",
            f"{DISTINCT}, workers started for it: the same bytes everywhere",
            f"{DISTINCT}, in this process: programs compiled, all rounds",
        ],
        True,
    )
    pools = ["1 worker", "2 workers", "2 workers against 1"]
    assert [figure.name for figure in results.figures] == [
        *[f"{DISTINCT}: {variant}" for variant in ["in this process", *pools]],
        *[f"{SEEDED}: {variant}" for variant in ["in this process", *pools]],
        *[f"{DISTINCT}, workers started for it: {variant}" for variant in pools],
    ]
    assert all(figure.value > 0 for figure in results.figures)
    assert any(note.startswith("Not pinned: ") for note in results.notes)
    assert any(note.startswith("Of the earlier attempt") for note in results.notes)


@pytest.mark.parametrize("face", some(["torch", "jax"], "jax"))
def test_the_first_step_in_fresh_processes(face, tmp_path):
    """From the command to the file."""
    file = tmp_path / "found.json"
    argv = ["--rounds", "1", "--only", f"first step, {face}", "--json", str(file)]
    with environment(XLA_FLAGS=os.environ.get("XLA_FLAGS"), TORCHINDUCTOR_COMPILE_THREADS=None):
        assert run(BENCHMARK, argv) == 0
    found = json.loads(file.read_text())
    checks = {check["name"]: (check["found"], check["met"]) for check in found["checks"]}
    assert all(met for _, met in checks.values()), checks
    name = f"first step, {face}"
    assert checks[f"{name}, cold: a child verified it"][0] == "{True}"
    assert checks[f"{name}, {REMEMBERED}: a child verified it"][0] == "{False}"
    assert checks[f"{name}, program known: programs that jax compiles"][0] == "0"
    if face == "jax":
        assert int(checks[f"{name}, {KEPT}: programs that jax had kept"][0]) > 0
        assert checks[f"{name}, {REMEMBERED}: programs that jax had kept"][0] == "0"
    variants = ["cold", REMEMBERED, *([KEPT] if face == "jax" else [])]
    figures = {figure["name"]: figure["value"] for figure in found["figures"]}
    timed = [figure for figure in found["figures"] if figure["unit"] != "programs"]
    assert len(timed) == 6 * len(variants) + 3
    assert all(math.isfinite(figure["value"]) and figure["value"] > 0 for figure in timed)
    for variant in variants:
        whole = figures[f"{name}, {variant}: whole, to the first result"]
        labels = "start and imports", "host and data", "open, verify and load", "first step"
        parts = [figures[f"{name}, {variant}: {label}"] for label in labels]
        assert math.isclose(whole, sum(parts))


def test_what_nobody_asked_for_is_not_measured():
    results = measure(SETTINGS, "zzz")
    assert results.nothing_wanted
    assert len(results.offered) == 5
    assert [*results.rows, *results.figures, *results.checks] == []
    assert results.notes == []


# ---- what is false is told of ----


def stages(verified=0.0, kept=0, anew=0, loss=1.0):
    """What a process could have found in which jax compiled three programs."""

    def stage(programs, **more):
        hits = programs if kept else 0
        events = {process.PROGRAMS: programs, process.REQUESTS: programs, process.HITS: hits}
        return {"seconds": 1.0, "loss": loss, "in children": 0.0, **events, **more}

    return {
        "start": {"seconds": 1.0},
        "imports": stage(0),
        "host": stage(1),
        "load": stage(1, **{"in children": verified}),
        "first step": stage(1),
        "second step": stage(0),
        "load, program known": stage(0),
        "first step, program known": stage(anew),
    }


TRUE = {"cold": [stages(2.0)], REMEMBERED: [stages()], KEPT: [stages(kept=1)]}


def reported(**changes):
    results = Results()
    given = {"cold": "cold", "remembered": REMEMBERED, "kept": KEPT}
    report_first_step(results, "jax", TRUE | {given[name]: [s] for name, s in changes.items()})
    return [check.name for check in results.checks if not check.met], results


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"cold": stages()}, ["first step, jax, cold: a child verified it"]),
        ({"remembered": stages(2.0)}, [f"first step, jax, {REMEMBERED}: a child verified it"]),
        ({"kept": stages()}, [f"first step, jax, {KEPT}: programs that jax had kept"]),
        ({"cold": stages(2.0, kept=1)}, ["first step, jax, cold: programs that jax had kept"]),
        (
            {"remembered": stages(anew=1)},
            ["first step, jax, program known: programs that jax compiles"],
        ),
        (
            {"remembered": stages(loss=2.0)},
            ["first step, jax: the losses are the same in all processes"],
        ),
    ],
)
def test_a_variant_that_is_not_what_it_is_called_is_told_of(changes, told):
    assert reported(**changes)[0] == told


def test_the_medians_are_those_of_the_stages():
    figures = {figure.name: figure.value for figure in reported()[1].figures}
    assert figures["first step, jax, cold: whole, to the first result"] == 5.0
    assert figures["first step, jax, cold: start and imports"] == 2.0
    assert figures["first step, jax, program known: whole, to the first result"] == 2000.0
    assert figures["first step, jax: compiled again in the second step"] == 0


@pytest.mark.parametrize(
    ("two", "told"),
    [
        (Batch(1.0, 1.9, frozenset("ab")), []),
        (Batch(1.0, 0.9, frozenset("ab")), ["batch: 2 workers at work at once"]),
        (Batch(1.0, 1.9, frozenset("ac")), ["batch: the same bytes everywhere"]),
    ],
)
def test_pools_that_do_other_work_or_none_are_told_of(two, told):
    results = Results()
    one = Batch(2.0, 1.9, frozenset("ab"))
    report_throughput(
        results, "batch", {"in this process": [one], "1 worker": [one], "2 workers": [two]}
    )
    assert [check.name for check in results.checks if not check.met] == told
    assert [figure.value for figure in results.figures] == [1.0, 1.0, 2.0, 2.0]


# ---- its parts ----


def test_batches_have_no_signature_in_common_but_those_that_share_programs():
    batches = [
        jobs(SETTINGS, number) for jobs in (distinct_jobs, seeded_jobs) for number in range(20)
    ]
    programs = [{(job.blueprint.name, str(job.signature)) for job in batch} for batch in batches]
    assert [len(batch) for batch in programs] == [2] * 20 + [1] * 20
    assert len(set().union(*programs)) == 60
    assert {job.init_seed for job in batches[-1]} == {0, 1, 2}


def test_each_variant_is_the_first_in_turn():
    assert [rotated(["a", "b", "c"], turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]
    assert sorted(rotated(["a", "b", "c"], 2)) == ["a", "b", "c"]


def test_rounds_are_few():
    assert Settings(sampling=Sampling(rounds=200)).rounds == 9
    assert Settings(sampling=Sampling(rounds=2)).rounds == 2


def test_the_environment_is_as_it_was_afterwards(monkeypatch):
    monkeypatch.setenv("ESPER_A", "before")
    monkeypatch.delenv("ESPER_B", raising=False)
    with environment(ESPER_A=None, ESPER_B="now"):
        assert "ESPER_A" not in os.environ
        assert os.environ["ESPER_B"] == "now"
    assert os.environ["ESPER_A"] == "before"
    assert "ESPER_B" not in os.environ


def test_a_process_that_fails_is_told_of_with_what_it_said(tmp_path):
    Library(tmp_path).close()
    said = rf"ended with status 1: (.|\n)*the library in {tmp_path} holds no kernel 0000"
    with pytest.raises(RuntimeError, match=f"the process with a kernel in torch {said}"):
        session("torch", tmp_path, ["0" * 64, "1" * 64])


def test_workers_of_whom_none_or_one_works_are_told_of():
    idle = Settings(sampling=SETTINGS.sampling, blueprints=())
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(RuntimeError, match="of 2 workers one did all the work, ten times over"),
    ):
        started(2, stack, idle)
