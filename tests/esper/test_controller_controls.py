"""The controllers that look at no loss: fixed and random."""

import numpy as np
import pytest

from esper.errors import InputError
from esper.tamiyo import (
    Action,
    Decision,
    FixedController,
    HeuristicController,
    RandomController,
    Scheduled,
    ScheduleTrigger,
)
from esper_functional import SeedLifecycleState, init_seeds
from tests.esper.controlled import A, B, C, World, boundary, hold, observe

GRAFT, FOSSILIZE, UNLOAD, RETARGET = (
    Action.GRAFT,
    Action.FOSSILIZE,
    Action.UNLOAD,
    Action.RETARGET,
)


def lived(controller, world, boundaries):
    """What was done at each boundary, as (step, action, layer, seed)."""
    done = []
    for _ in range(boundaries):
        applied = boundary(controller, world.observe())
        world.obey(applied)
        world.activate()
        done += [(world.step, d.action, d.layer, d.seed) for d in applied]
        world.go_on()
    return done


# Fixed


def test_a_schedule_by_hand():
    tamiyo = FixedController(
        schedule=[
            Scheduled(0, GRAFT, 0, kernel=2, alpha=0.5, initialisation="zero_output"),
            Scheduled(60, GRAFT, 0, seed=0, kernel=B.kernel_id),
            Scheduled(60, GRAFT, 0),
            Scheduled(110, RETARGET, 0, seed=1, alpha=0.25),
            Scheduled(150, UNLOAD, 0),
            Scheduled(150, FOSSILIZE, 0, seed=1),
        ]
    )
    world = World((1, 2), {0: [A, B, C]})
    first = tamiyo.decide(world.observe())
    reason = "scheduled for step 0"
    assert first == [Decision(GRAFT, 0, 0, reason, C.kernel_id, "zero_output", 0.5)]
    # Step 60 is met at 100: seed 0 is taken, so that graft waits; the other takes seed 1. Seed 1
    # is retargeted at 150 and can be fossilised at 200 only: one change of a seed at a boundary.
    # At 150 seed 0 is emptied, and at 200 the graft that waited for it is made.
    assert lived(tamiyo, world, 6) == [
        (0, GRAFT, 0, 0),
        (100, GRAFT, 0, 1),
        (150, RETARGET, 0, 1),
        (150, UNLOAD, 0, 0),
        (200, GRAFT, 0, 0),
        (200, FOSSILIZE, 0, 1),
    ]


def test_a_graft_every_so_many_steps():
    tamiyo = FixedController(every=100, first=50, offset=1)
    world = World((2, 2), {1: [A, B], 0: [C]})
    done = lived(tamiyo, world, 12)
    # Layer 1 is preferred; kernels from candidate 1 on, counted around. Then all are full.
    assert done == [(50, GRAFT, 1, 0), (150, GRAFT, 1, 1), (250, GRAFT, 0, 0), (350, GRAFT, 0, 1)]
    fresh = FixedController(every=100, offset=1)
    grafts = [boundary(fresh, observe(s, seeds=init_seeds(1, 9)))[0] for s in (0, 100, 200)]
    assert [d.kernel_id for d in grafts] == [x.kernel_id for x in (B, C, A)]


def test_what_was_vetoed_is_done_later():
    tamiyo = FixedController(schedule=[Scheduled(0, GRAFT, 0)])
    assert boundary(tamiyo, observe(0), vetoes=[0]) == []
    assert [d.action for d in boundary(tamiyo, observe(50))] == [GRAFT]
    assert boundary(tamiyo, observe(100)) == []


def test_what_was_taken_back_is_done_again():
    for tamiyo in (
        FixedController(schedule=[Scheduled(0, GRAFT, 0), Scheduled(100, GRAFT, 0)]),
        FixedController(every=100),
    ):
        world = World((1, 3), {0: [A, B, C]})
        assert [step for step, *_ in lived(tamiyo, world, 4)] == [0, 100]
        world.go_back(3)
        # From step 50 on: the graft of step 0 stands.
        assert [step for step, *_ in lived(tamiyo, world, 3)] == [100]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Scheduled(0, GRAFT, 5), r"seed 0 of layer 5, and there are 1 layers of 2 seeds"),
        (Scheduled(9, UNLOAD, 0, seed=2), r"seed 2 of layer 0, and there are 1 layers of 2"),
        (Scheduled(0, GRAFT, 0, kernel=3), r"candidate 3 of layers\.0, counted from 0, .* are 3"),
    ],
)
def test_places_and_kernels_that_are_not_there_are_refused(entry, message):
    with pytest.raises(InputError, match=message):
        FixedController(schedule=[entry]).decide(observe(0))


def test_a_graft_where_nothing_may_grow_is_refused():
    tamiyo = FixedController(schedule=[Scheduled(0, GRAFT, 1)])
    with pytest.raises(InputError, match=r"layer 1 \(layers\.1\), which may not grow: .* 0 \("):
        tamiyo.decide(observe(0, seeds=init_seeds(2, 1)))


# Random


def test_chance_by_hand():
    # The first number decides whether to graft, the next two where and what.
    rng = np.random.default_rng([0, 50])
    drawn = rng.random()
    layer, kernel = int(rng.integers(2)), int(rng.integers(3))
    candidates = {0: [A, B, C], 1: [C, B, A]}
    seen = {"seeds": init_seeds(2, 1), "candidates": candidates}
    tamiyo = RandomController(grafts=np.nextafter(drawn, 1.0).item())
    (decision,) = tamiyo.decide(observe(50, **seen))
    assert (decision.layer, decision.kernel_id) == (layer, candidates[layer][kernel].kernel_id)
    assert f"drew {drawn:.4g}, below" in decision.reason
    assert RandomController(grafts=drawn).decide(observe(50, **seen)) == []


def test_chance_is_as_often_as_it_is_asked_to_be():
    here, grafts, kept = hold((0, 0)), 0, 0
    for run in range(1_000):
        tamiyo = RandomController(grafts=0.25, keep=0.75, trial_steps=50)
        for step in (0, 50):
            actions = [d.action for d in boundary(tamiyo, observe(step, seeds=here, run=run))]
            grafts += GRAFT in actions
            kept += FOSSILIZE in actions
    # Four standard errors: 4 sqrt(0.25 · 0.75 / 2000) and 4 sqrt(0.75 · 0.25 / 1000).
    assert grafts / 2_000 == pytest.approx(0.25, abs=0.0388)
    assert kept / 1_000 == pytest.approx(0.75, abs=0.0548)


def test_a_verdict_by_chance_is_drawn_once():
    tamiyo = RandomController(grafts=0.0, keep=0.5, trial_steps=50)
    here = hold((0, 0))
    for run in range(20):
        boundary(tamiyo, observe(0, seeds=here, run=run))
        asked = [tamiyo.decide(observe(step, seeds=here, run=run)) for step in (50, 100, 150)]
        assert asked[0] == asked[1] == asked[2]


def test_chance_spends_the_grafts_of_another_controller():
    def world():
        return World((2, 4), {0: [A, B], 1: [A, C]})

    tamiyo = HeuristicController(trigger=ScheduleTrigger(every=100), trial_steps=100)
    spent = sum(action is GRAFT for _, action, *_ in lived(tamiyo, world(), 40))
    assert spent > 4
    control = RandomController(grafts=0.7, trial_steps=100, max_grafts=spent)
    there = world()
    assert sum(a is GRAFT for _, a, *_ in lived(control, there, 40)) == spent


def test_grafts_that_were_taken_back_are_not_spent():
    control = RandomController(grafts=1.0, max_grafts=1, trial_steps=1_000)
    world = World((1, 2), {0: [A]})
    assert [s for s, *_ in lived(control, world, 3)] == [0]
    world.go_back(3)
    assert [s for s, *_ in lived(control, world, 3)] == [0]
    assert (world.seeds.stage == SeedLifecycleState.ACTIVE).sum() == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grafts": 1.1}, r"grafts must be a finite number of at least 0 and at most 1, got 1\.1"),
        ({"keep": -0.1}, r"keep must be .* at least 0 and at most 1, got -0\.1"),
        ({"trial_steps": 0}, r"trial_steps must be a whole number of at least 1, got 0"),
        ({"trials": 0}, r"trials must be a whole number of at least 1, got 0"),
        ({"max_grafts": -1}, r"max_grafts must be a whole number of at least 0, got -1"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        RandomController(**values)
