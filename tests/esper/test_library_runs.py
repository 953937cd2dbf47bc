"""What runs tell the library: which kernels they need, and what became of them."""

import contextlib

import pytest

from esper.contracts import KernelState, RetentionPolicy
from esper.nissa import RunRecord, read_run
from esper.tolaria import start_run
from esper.tolaria._outcomes import outcomes_of
from esper.urza import Library
from tests.esper.runs import EVENTFUL, config

ALL = tuple(KernelState)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("told")
    return start_run(place / "run", config(place, "jax", EVENTFUL | {"steps": 100}))


def test_the_kernels_of_a_run_are_not_collected_before_it_is_released(run):
    chosen = {kernel_id for ids in run.kernels.values() for kernel_id in ids}
    policy = RetentionPolicy(states=ALL, grace_seconds=0.0)
    with contextlib.closing(Library(run.library)) as library:
        assert {kernel_id: library.references(kernel_id) for kernel_id in chosen} == {
            kernel_id: [run.genesis] for kernel_id in chosen
        }
        report = library.collect_garbage(policy)
        assert (report.removed, report.referenced) == ((), len(chosen))
        library.release_run(run.genesis)
        dry = library.collect_garbage(policy.model_copy(update={"dry_run": True}))
        assert set(dry.removed) == chosen
        library.refer(run.genesis, chosen)


def test_the_library_knows_what_the_kernels_of_a_run_did(run):
    record = read_run(run.path)
    measured = [entry for entry in record.events if entry["kind"] == "worth"]
    assert measured
    told = list(outcomes_of(run, record))
    assert told
    with contextlib.closing(Library(run.library, create=False)) as library:
        found = [o for kernel in {o.kernel_id for o in told} for o in library.outcomes(kernel)]
    assert sorted(o.model_copy(update={"at": 0.0}).model_dump_json() for o in found) == sorted(
        o.model_dump_json() for o in told
    )
    for outcome in told:
        assert (outcome.run_id, outcome.task, outcome.backend) == (run.genesis, "spirals", "jax")
        assert outcome.site == run.host.sites[outcome.layer]
        assert outcome.kernel_id in run.kernels[outcome.site]
        assert any(
            (entry["step"], entry["layer"], entry["seed"], entry["value"])
            == (outcome.step, outcome.layer, outcome.seed, outcome.gain)
            for entry in measured
        )


def entry(kind, step, kernel="", value=None, layer=0, seed=1):
    found = {"kind": kind, "step": step, "layer": layer, "seed": seed}
    if kind == "worth":
        return found | {"value": value, "low": None, "high": value}
    return found | {"kernel": kernel}


def test_a_stay_of_a_kernel_is_one_outcome(run):
    a, b, c = (f"{number:064x}" for number in range(3))
    events = [
        entry("load", 0, a),
        entry("worth", 5, value=1.0),
        entry("worth", 10, value=2.0),
        entry("worth", 15, value=None),
        entry("unload", 20),
        entry("load", 20, b),
        # Of this stay nothing was measured.
        entry("unload", 25),
        entry("worth", 25, value=9.0),
        entry("load", 30, a),
        entry("worth", 35, value=3.0),
        entry("fossilize", 40),
        entry("load", 50, b, layer=1),
        entry("worth", 55, value=-1.0, layer=1),
        entry("load", 50, c, seed=2),
        entry("worth", 55, value=7.0, seed=2),
    ]
    record = RunRecord(run.path, {}, [], events, {}, frozenset({13, 14}))
    found = [
        (o.kernel_id, o.layer, o.seed, o.step, o.gain, o.kept) for o in outcomes_of(run, record)
    ]
    assert found == [
        (a, 0, 1, 10, 2.0, False),
        (a, 0, 1, 35, 3.0, True),
        (b, 1, 1, 55, -1.0, True),
    ]
