"""Plans: what they hold, what they are blind to, and what they refuse."""

from dataclasses import FrozenInstanceError, replace

import jax
import numpy as np
import pytest

from esper_functional import (
    BlendError,
    Event,
    EventKind,
    KasminaException,
    SeedIndexError,
    SeedLifecycleState,
    absorb,
    apply_event,
    blend_weights,
    fold_events,
    gather,
    gather_weights,
    init_seeds,
    kernel_from_function,
    plan,
    reweigh,
    running,
    running_seeds,
    scatter,
    transition,
)
from tests.functional.networks import SITES, dense, dense_kernel, fossilise, grafted_state
from tests.tolerance import assert_bitwise

KERNELS = {0: dense_kernel(0), 1: dense_kernel(1), 2: dense_kernel(2, "out")}


def planned(state, **options):
    return plan(state, KERNELS, SITES, **options)


def test_a_plan_does_not_say_which_seed_runs_nor_at_what_alpha():
    first = planned(grafted_state((0, 0, 0, 0.1)))
    other = planned(grafted_state((0, 2, 1, 0.9)))
    assert first == other
    assert hash(first) == hash(other)


def test_a_plan_says_site_program_frozen_blend_and_isolation():
    state = grafted_state((0, 0, 0, 0.5))
    plans = [
        planned(init_seeds(2, 3)),
        planned(state),
        planned(fossilise(state, 0, 0)),
        planned(state, blend="residual"),
        planned(state, isolate=True),
        planned(grafted_state((1, 0, 2, 0.5))),
        planned(grafted_state((0, 0, 0, 0.5), (0, 1, 1, 0.5))),
    ]
    assert len(set(plans)) == len(plans)
    assert [p.dormant for p in plans] == [True] + [False] * 6
    assert plans[2].sites[0][1][0].frozen
    assert plans[1].runs[0].program.apply is dense


def test_a_plan_is_frozen():
    with pytest.raises(FrozenInstanceError, match="blend"):
        planned(init_seeds(2, 3)).blend = "residual"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_dormant_plan_has_nothing_live():
    state = init_seeds(2, 3)
    assert gather(state, {}, planned(state)) is None
    assert [w.shape for w in gather_weights(state, planned(state))] == [(0,), (0,)]


def test_live_data_is_in_plan_order():
    state = grafted_state((1, 0, 2, 0.3), (0, 2, 1, 0.2), (0, 1, 0, 0.1))
    state = fold_events(state, [Event(0, 0, 2, EventKind.ERRORS, value=2.0)])
    live = gather(state, KERNELS, planned(state))
    assert running_seeds(state) == [(0, 1), (0, 2), (1, 0)]
    host, weights = blend_weights("convex", state.alpha, np.asarray(running(state)))
    assert_bitwise(live.host_weights, host)
    assert_bitwise(live.weights, weights[np.asarray(running(state))])
    assert live.errors.tolist() == [0, 2, 0]
    for own, slot in zip(live.params, (0, 1, 2), strict=True):
        assert_bitwise(own, KERNELS[slot].params)


def test_gather_weights_is_the_part_of_gather_that_follows_alpha():
    state = grafted_state((0, 0, 0, 0.3), (1, 1, 2, 0.7))
    live, weights = gather(state, KERNELS, planned(state)), gather_weights(state, planned(state))
    assert_bitwise((live.host_weights, live.weights), tuple(weights))


def test_absorb_counts_only_what_changed():
    state = grafted_state((0, 0, 0, 0.5), (0, 1, 1, 0.5), (1, 0, 2, 0.5))
    live = gather(state, KERNELS, planned(state))
    after = absorb(state, replace(live, errors=np.array([0, 1, 3], np.int32)), step=8)
    assert after.error_count[[0, 0, 1], [0, 1, 0]].tolist() == [0, 1, 3]
    assert after.last_update[[0, 0, 1], [0, 1, 0]].tolist() == [0, 8, 8]
    assert running_seeds(after) == [(0, 0), (0, 1)]
    assert after.stage[1, 0] == SeedLifecycleState.ERROR_RECOVERY
    assert_bitwise(absorb(state, live, step=8), state)
    assert_bitwise(absorb(init_seeds(2, 3), None, step=8), init_seeds(2, 3))


@pytest.mark.parametrize(
    "other",
    [init_seeds(2, 3), grafted_state((1, 0, 2, 0.5)), init_seeds(1, 3), init_seeds(2, 2, 3)],
    ids=["dormant", "elsewhere", "fewer layers", "a population"],
)
def test_a_state_that_runs_other_seeds_than_the_plan_is_refused(other):
    state = grafted_state((0, 0, 0, 0.5))
    own = planned(state)
    live = gather(state, KERNELS, own)
    for refused in (lambda: gather(other, KERNELS, own), lambda: reweigh(live, other, own)):
        with pytest.raises(KasminaException, match=r"the plan runs \[1, 0\] kernels.*plan again"):
            refused()
    with pytest.raises(KasminaException, match=r"gather: the plan runs \[0, 0\]"):
        gather(state, KERNELS, planned(init_seeds(2, 3)))


def test_absorb_refuses_counts_of_another_state():
    state = grafted_state((0, 0, 0, 0.5), (0, 1, 1, 0.5))
    live = gather(state, KERNELS, planned(state))
    with pytest.raises(KasminaException, match="the state runs 1 seeds and the live part has 2"):
        absorb(grafted_state((0, 0, 0, 0.5)), live, step=0)
    with pytest.raises(KasminaException, match="the state runs 2 seeds and the live part has 0"):
        absorb(state, None, step=0)


@pytest.mark.parametrize("kernels", [{}, [], KERNELS], ids=["mapping", "sequence", "other slots"])
def test_a_slot_without_a_kernel_is_refused(kernels):
    with pytest.raises(
        SeedIndexError,
        match=r"seed 2 of site 'hidden' runs the kernel in slot 9.*no kernel is there",
    ):
        plan(grafted_state((0, 2, 9, 0.5)), kernels, SITES)


def test_a_seed_without_a_slot_is_refused_by_a_sequence_too():
    where = np.array([[True, False, False], [False, False, False]])
    state = transition(init_seeds(2, 3), where, SeedLifecycleState.LOADING, step=0).state
    state = transition(state, where, SeedLifecycleState.ACTIVE, step=0, alpha=0.5).state
    with pytest.raises(SeedIndexError, match="no kernel is there"):
        plan(state, list(KERNELS.values()), SITES)


@pytest.mark.parametrize("axes", [(3, 3), (2, 2, 3), (1, 3)])
def test_a_state_of_other_sites_is_refused(axes):
    with pytest.raises(SeedIndexError, match=r"each of the 2 sites \('hidden', 'out'\); got shape"):
        plan(init_seeds(*axes), {}, SITES)


def test_an_unknown_blend_is_refused():
    with pytest.raises(BlendError, match="did you mean 'residual'"):
        planned(init_seeds(2, 3), blend="residul")


def test_a_traced_state_is_refused():
    with pytest.raises(KasminaException, match="this state is traced: call it outside"):
        jax.jit(lambda s: planned(s).dormant)(init_seeds(2, 3))


@pytest.mark.parametrize("change", ["incubation ends", "a fossil"])
def test_a_plan_from_before_a_seed_changed_its_part_is_refused(change):
    state = grafted_state((0, 0, 0, 0.0), (0, 1, 1, 0.5))
    before = apply_event(state, Event(2, 0, 0, EventKind.INCUBATE))
    after = apply_event(before, Event(3, 0, 0, EventKind.ALPHA, value=0.5))
    if change == "a fossil":
        before, after = after, apply_event(after, Event(3, 0, 0, EventKind.FOSSILIZE))
    own = planned(before)
    live = gather(before, KERNELS, own)
    for refused in (lambda: gather(after, KERNELS, own), lambda: reweigh(live, after, own)):
        with pytest.raises(KasminaException, match=r"and the state \[2, 0\].*plan again after"):
            refused()


def test_kernels_of_other_programs_than_the_plans_are_refused():
    state = grafted_state((0, 0, 0, 0.5))
    other = {0: kernel_from_function(lambda p, x: x @ p, np.ones((3, 4), np.float32))}
    with pytest.raises(
        KasminaException, match=r"seed 0 of layer 0, whose slot 0 holds.*plan again"
    ):
        gather(state, other, planned(state))


def test_gather_after_scatter_gives_the_trained_parameters():
    state = grafted_state((0, 0, 0, 0.5), (1, 1, 2, 0.5))
    live = gather(state, KERNELS, planned(state))
    trained = jax.tree.map(lambda p: p * 2, live.params)
    for kernels in (KERNELS, list(KERNELS.values())):
        table = scatter(state, kernels, trained)
        assert_bitwise(gather(state, table, planned(state)).params, trained)
        assert_bitwise(table[1], KERNELS[1])
        assert plan(state, table, SITES) == planned(state)


def test_scatter_refuses_parameters_of_other_seeds_and_slots_of_two():
    state = grafted_state((0, 0, 0, 0.5), (0, 1, 0, 0.5))
    live = gather(state, KERNELS, planned(state))
    with pytest.raises(KasminaException, match="runs 2 seeds and there are parameters of 1"):
        scatter(state, KERNELS, live.params[:1])
    with pytest.raises(KasminaException, match="another one run the kernel in slot 0"):
        scatter(state, KERNELS, live.params)


def test_a_state_that_is_traced_in_part_is_refused():
    state = grafted_state((0, 0, 0, 0.5))
    own = planned(state)

    def swept(alpha):
        return gather(state.replace(alpha=alpha), KERNELS, own)

    with pytest.raises(KasminaException, match=r"gather\(\) reads .* this state is traced"):
        jax.jit(swept)(state.alpha)
