"""The benchmarks run, agree with what they are compared to, and leave a file of one shape.

Everything is as small as can be; no time is looked at.
"""

import dataclasses
import json
import math

import jax
import pytest

from experiments.bench import active, graft, population, state
from experiments.bench._dormant import Settings as DormantSettings
from experiments.bench._dormant_jax import (
    measure_core,
    measure_equinox,
    measure_flax,
    measure_layers,
    measure_transformer,
)
from experiments.bench._dormant_torch import compare_torch, torch_layer
from experiments.bench._networks import TransformerShape
from experiments.bench._paired import Sampling, compare_all
from experiments.bench._results import Check, Figure, Results, console, finish, machine
from experiments.bench._roofline import measure_roofline

TINY = Sampling(rounds=2, builds=1, sample=1e-6, warmup=0, budget=0.01, least=1)
SHAPE = TransformerShape(blocks=1, features=4, heads=2, hidden=8, length=3, batch=2)


def assert_sound(results):
    """Ratios and figures are numbers, and every check holds."""
    assert all(check.met for check in results.checks), results.checks
    for row in results.rows:
        timings = (row.reference, row.again, row.candidate)
        assert all(timing.microseconds > 0 for timing in timings)
        assert row.reference.ratio == 1.0
        assert row.rounds >= 1
        assert row.repeats >= 1
    assert all(math.isfinite(figure.value) for figure in results.figures)


# ---- what is measured ----


@pytest.mark.parametrize(
    ("measure", "only", "count"),
    [
        (lambda results, settings: measure_core(results, settings, 1), "training step", 2),
        (lambda results, settings: measure_equinox(results, settings, 2), "training step", 1),
        (lambda results, settings: measure_flax(results, settings, 2), "training step", 1),
        (measure_layers, "conv2d 2×2×3×3, forward", 1),
        (measure_layers, "batch norm 4, training step", 1),
        (measure_transformer, "T 3 batch 2, forward", 1),
    ],
    ids=["core", "equinox", "flax", "conv2d", "batch norm", "transformer"],
)
def test_dormant_programs_are_the_bare_ones(measure, only, count):
    settings = DormantSettings(
        TINY, width=4, batch=2, depth=2, seeds_per_layer=2, channels=2, image=4, heads=2,
        length=3, batch_sequences=2, transformer=SHAPE,
    )  # fmt: skip
    results = Results(only=f", {only}")
    measure(results, settings)
    assert_sound(results)
    assert len(results.rows) == len(results.checks) == count


def test_dormant_torch_is_timed_against_its_twin():
    results = Results()
    settings = DormantSettings(TINY, width=4, batch=2, depth=2, seeds_per_layer=2)
    compare_torch(results, settings, "torch eager, 4×4", 1.02, torch_layer)
    assert_sound(results)
    assert [row.name for row in results.rows] == [
        "torch eager, 4×4, forward",
        "torch eager, 4×4, forward + backward",
    ]


CASES = (
    active.Case(4, 2, "low rank", count=2, dynamic=True),
    active.Case(4, 1, blend="sequential"),
)
AT_WORK = active.Settings(
    TINY, CASES, rank=2, seeds_per_layer=2, transformer=SHAPE, grown_blocks=(), peer_widths=(4,),
    peer_batch=2, ramp_width=4,
)  # fmt: skip


def test_kernels_at_work_compute_what_is_written_by_hand():
    results = active.measure(AT_WORK, only="forward")
    assert_sound(results)
    assert len(results.checks) == len(CASES)
    rows = {(row.name, row.variant) for row in results.rows}
    assert {variant for _, variant in rows} == {
        "output", "planned", "dynamic", "module", "functional",
    }  # fmt: skip
    assert any("masked slots" in name for name, _ in rows)


def test_training_steps_are_timed_with_and_without_a_ramp():
    settings = dataclasses.replace(AT_WORK, cases=CASES[1:], peer_widths=())
    results = active.measure(settings, only="training step")
    assert_sound(results)
    first, ramp = results.rows
    assert first.target == 1.05
    assert "on a ramp" in ramp.name


def test_without_a_gpu_one_line_says_so():
    if active.gpu() is not None:
        pytest.skip("there is a GPU")
    results = Results()
    active.on_gpu(results, active.Settings(TINY), "")
    assert len(results.notes) == 1
    assert "No GPU" in results.notes[0]
    assert not results.rows


def test_the_roofline_of_a_step():
    settings = active.Settings(TINY, rank=2, seeds_per_layer=1)
    work = active.make_work(settings, active.Case(8, 2))
    figures = measure_roofline(
        active.work_step(settings, work), "device", size=16, megabytes=1, tries=1
    )
    assert_sound(Results(figures=figures))
    assert {figure.unit for figure in figures} == {"µs", "TFLOP/s", "GB/s", "%"}


def test_the_state_step_is_that_by_hand_and_a_seed_takes_52_bytes():
    results = state.measure(state.Settings(TINY, seeds=(4, 1000), seeds_per_layer=2))
    assert_sound(results)
    assert results.figures[0] == Figure("a seed", 52.0, "bytes", 100.0)
    assert len(results.rows) == 4


def test_a_mapped_population_trains_as_a_loop_does():
    settings = population.Settings(
        TINY, populations=(3,), width=4, depth=1, seeds_per_layer=1, batch=2, rank=2
    )
    results = population.measure(settings)
    assert_sound(results)
    (row,) = results.rows
    assert {"loop networks/s", "vmap networks/s", "compile s"} <= set(row.extra)


def test_a_life_compiles_three_programs_and_a_second_none():
    settings = graft.Settings(
        lives=1, shape=SHAPE, seeds_per_layer=1, rank=2, steps_before=2, loading_steps=2,
        steps_after=2, ramp_steps=3,
    )  # fmt: skip
    results = graft.measure(settings, only="programs compiled")
    assert [(check.expected, check.found) for check in results.checks] == [("3", "3"), ("0", "0")]


@pytest.mark.parametrize("name", ["in the background", "by jax.jit"])
def test_training_goes_on_over_a_graft(name):
    settings = graft.Settings(
        lives=1, shape=SHAPE, seeds_per_layer=1, rank=2, steps_before=2, loading_steps=2,
        steps_after=2, ramp_steps=3,
    )  # fmt: skip
    results = Results()
    graft.measure_stalls(results, settings, name, graft.WAYS[name])
    assert len(results.figures) == 6
    assert all(figure.value > 0 for figure in results.figures)


# ---- how it is timed and reported ----


def test_the_first_variant_is_the_reference():
    found = compare_all(lambda: {"a": list, "b": list, "c": list}, TINY)
    assert list(found.timings) == ["a", "b", "c"]
    assert found.timings["a"].ratio == 1.0
    assert found.rounds == 2


def test_the_file_holds_settings_machine_and_everything_found(tmp_path, capsys):
    results = state.measure(state.Settings(TINY, seeds=(4,)), only="jax")
    results.checks.append(Check("one", "yes", "no"))
    results.notes.append("a note")
    path = tmp_path / "folder" / "state.json"
    finish(
        console(), results, benchmark="state", title="T", names=("by hand", "ours"),
        settings=state.Settings(TINY), machine=machine(None, ("jax", "no-such-package")),
        path=path, started=0.0,
    )  # fmt: skip
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content) == {
        "benchmark", "settings", "machine", "notes", "rows", "figures", "checks",
    }  # fmt: skip
    assert content["settings"]["sampling"] == dataclasses.asdict(TINY)
    assert content["machine"]["versions"] == {"jax": jax.__version__, "no-such-package": None}
    (row,) = content["rows"]
    assert {"name", "variant", "target", "met", "rounds", "repeats", "extra"} <= set(row)
    assert set(row["candidate"]) == {"microseconds", "ratio", "quartiles"}
    assert row["met"] is None
    assert content["checks"][-1]["met"] is False
    assert content["notes"] == ["a note"]
    printed = capsys.readouterr().out
    assert "not met" in printed
    assert "a note" in printed
