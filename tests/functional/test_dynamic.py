"""The dynamic mode: the planned mode's meaning, with the stages as data of one program."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_functional import (
    BLENDS,
    Event,
    EventKind,
    SeedLifecycleState,
    absorb,
    advance,
    apply_event,
    bare,
    execute,
    fold_events,
    forward_dynamic,
    gather,
    init_seeds,
    make_bank,
    plan,
    record_faults,
    run,
    running,
    state_digest,
)
from tests.functional.lives import KERNELS, STORIES, bank, lived, pasts, state_of
from tests.functional.networks import SITES, batch, compilations, host_params, mlp
from tests.tolerance import assert_bitwise, assert_close, assert_tree_close

PARAMS, X, BANK = host_params(), batch(), bank()
S, K = SeedLifecycleState, EventKind


def executed(params, state, kernels, x, step, *, blend="convex", isolate=False):
    return execute(
        mlp, params, state, kernels, x, sites=SITES, blend=blend, isolate=isolate, step=step
    )


dynamic = jax.jit(executed, static_argnames=("blend", "isolate"))
host = jax.jit(partial(mlp, site=bare))


def planned(params, state, x, step, **options):
    """The four parts of the planned mode, eagerly, so that no plan is compiled."""
    own = plan(state, KERNELS, SITES, **options)
    y, live = run(mlp, own, params, gather(state, KERNELS, own), x)
    return y, absorb(state, live, step=step)


def assert_same(ours, theirs):
    assert_close(ours[0], theirs[0])
    assert state_digest(ours[1]) == state_digest(theirs[1])


@pytest.mark.parametrize("blend", BLENDS)
@settings(max_examples=30)
@given(pasts(), st.booleans(), st.integers(0, 3))
def test_it_is_the_planned_mode_in_output_and_next_state(blend, past, isolate, seed):
    options = {"blend": blend, "isolate": isolate}
    state, x, step = lived(past), batch(seed), np.int32(9)
    assert_same(
        dynamic(PARAMS, state, BANK, x, step, **options), planned(PARAMS, state, x, 9, **options)
    )


@pytest.mark.parametrize("story", STORIES)
def test_every_story_of_one_seed_beside_an_active_one(story):
    for slot in (0, 2, 3):
        state = state_of((0, 0, story, slot), (0, 1, "active", 1))
        assert_same(dynamic(PARAMS, state, BANK, X, np.int32(9)), planned(PARAMS, state, X, 9))


@pytest.mark.parametrize("blend", BLENDS)
def test_eager_equals_jitted(blend):
    # Two programs only: eagerly each branch of each seed is compiled by itself.
    state = state_of((0, 0, "active", 0), (0, 1, "failed twice", 1))
    own = make_bank([KERNELS[0], KERNELS[2]])
    y, faults = forward_dynamic(mlp, PARAMS, state, own, X, sites=SITES, blend=blend)
    assert faults.tolist() == [[False, True], [False, False]]
    assert_same(
        (y, record_faults(state, faults, step=9)),
        dynamic(PARAMS, state, own, X, np.int32(9), blend=blend),
    )


def test_a_whole_life_compiles_one_program():
    # A batch size of its own, so that no other test has compiled this program.
    params, x, state = host_params(1), batch(size=9), init_seeds(2, 2)
    own = make_bank(KERNELS)
    life = [
        Event(1, 0, 0, K.LOAD, value=0.0),
        Event(2, 0, 0, K.ACTIVATE, value=0.0),
        Event(3, 0, 0, K.INCUBATE),
        Event(4, 0, 0, K.RAMP, value=1.0, span=3),
        Event(5, 1, 1, K.LOAD, value=4.0),
        Event(6, 1, 1, K.ACTIVATE, value=0.5),
        Event(8, 0, 0, K.FOSSILIZE),
        Event(9, 1, 1, K.ERRORS, value=3.0),
        Event(10, 1, 1, K.RESET),
        Event(11, 0, 0, K.FOLD),
    ]
    seen = set()
    with compilations() as count:
        for event in life:
            state = apply_event(state, event)
            y, _ = dynamic(params, state, own, x, np.int32(event.step))
            seen.add(np.asarray(y).tobytes())
            assert count() == 1
    # Dormant, loading, waiting, incubating and folded are the host; all others differ.
    assert len(seen) == 5


def test_failures_are_counted_and_stop_the_seed_inside_the_program():
    state = state_of((0, 0, "active", 3), (0, 1, "active", 0))
    counts = []
    for step in range(4):
        _, state = dynamic(PARAMS, state, BANK, X, np.int32(step))
        counts.append(int(state.error_count[0, 0]))
    assert counts == [1, 2, 3, 3]
    assert S(int(state.stage[0, 0])) is S.ERROR_RECOVERY
    assert state.last_update[0, 0] == 2
    assert bool(state.fallback[0, 0])
    assert np.asarray(running(state)).tolist() == [[False, True], [False, False]]
    alone = state_of((0, 1, "active", 0))
    assert_bitwise(
        dynamic(PARAMS, state, BANK, X, np.int32(9))[0],
        dynamic(PARAMS, alone, BANK, X, np.int32(9))[0],
    )


def test_a_scan_over_steps_equals_planned_steps():
    """The state is carried: its types do not change, and a ramp runs on the device."""
    state = state_of((0, 0, "ramping", 0), (0, 1, "failed twice", 2), (1, 0, "active", 5))
    xs = jnp.stack([batch(i) for i in range(6)])

    def step(carried, x):
        now, state = carried
        y, state = executed(PARAMS, advance(state, now), BANK, x, now)
        return (now + 1, state), y

    scanned = jax.jit(lambda state, xs: jax.lax.scan(step, (jnp.int32(3), state), xs))
    (_, after), ys = scanned(state, xs)
    for i, x in enumerate(xs):
        y, state = planned(PARAMS, advance(state, 3 + i), x, 3 + i)
        assert_close(ys[i], y)
    assert_tree_close(after, state)
    assert S(int(state.stage[0, 1])) is S.ERROR_RECOVERY
    assert 0.0 < state.alpha[0, 0] < 0.8


def test_where_nothing_runs_the_output_is_the_hosts_bit_by_bit():
    resting = [name for name in STORIES if name not in {"active", "active at 1", "ramping"}]
    for story in resting:
        state = state_of((0, 0, story, 3), (1, 1, story, 6))
        if np.asarray(running(state) & ~state.incubating).any():
            continue
        y, _ = dynamic(PARAMS, state, BANK, X, np.int32(9))
        assert_bitwise(y, host(PARAMS, x=X))


def test_a_hosts_negative_zero_keeps_its_sign_where_nothing_runs():
    """Blending at weight 0 would add a positive one."""

    def net(params, site, x):
        return site("out", lambda p, x: jnp.minimum(x, 0.0) * p, params, jnp.abs(x) - 0.0)

    zero = jax.jit(lambda state: forward_dynamic(net, -jnp.ones(3), state, BANK, X, sites=SITES)[0])
    for story in ("dormant", "loading", "fallback", "incubating"):
        y = np.asarray(zero(state_of((1, 0, story, 4))))
        assert not y.any()
        assert np.signbit(y).all()


def test_execute_is_one_call_in_both_modes():
    state = state_of((0, 0, "active", 2), (1, 0, "active", 4))
    concrete = executed(PARAMS, state, KERNELS, X, 9)
    assert isinstance(concrete[1].stage, np.ndarray)
    for kernels in (KERNELS, BANK):
        traced = jax.jit(lambda state, own=kernels: executed(PARAMS, state, own, X, 9))(state)
        assert isinstance(traced[1].stage, jax.Array)
        assert_same(traced, concrete)
    assert_same(executed(PARAMS, state, BANK, X, 9), concrete)
    on_device = jax.tree.map(jnp.asarray, state)
    assert_same(executed(PARAMS, on_device, KERNELS, X, 9), concrete)


def test_execute_takes_kernels_in_a_sequence_in_both_modes():
    listed = [KERNELS[slot] for slot in range(len(KERNELS))]
    state = state_of((0, 0, "active", 1))
    concrete = executed(PARAMS, state, listed, X, 9)
    assert_same(jax.jit(lambda s: executed(PARAMS, s, listed, X, 9))(state), concrete)


def test_a_plan_in_a_state_that_changed_on_the_device_is_that_of_the_host():
    """What the dynamic mode returns can be planned with, and goes on."""
    state = state_of((0, 0, "failed twice", 3), (1, 0, "active", 4))
    _, after = dynamic(PARAMS, state, BANK, X, np.int32(9))
    after = jax.tree.map(np.asarray, after)
    recovered = fold_events(after, [Event(9, 0, 0, K.RESET)])
    assert len(plan(recovered, KERNELS, SITES).runs) == 1
    assert_same(planned(PARAMS, after, X, 10), dynamic(PARAMS, after, BANK, X, np.int32(10)))
