"""Events: a state is a fold of them, and what the table forbids says why."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_functional import (
    NO_SLOT,
    Event,
    EventKind,
    KasminaException,
    Live,
    SeedIndexError,
    SeedLifecycleError,
    SeedLifecycleState,
    SeedState,
    absorb,
    advance,
    apply_event,
    fault_events,
    fold_events,
    incubate,
    init_seeds,
    kernel_id_words,
    legal_moves,
    observe_health,
    observe_latency,
    record_errors,
    release,
    running,
    running_seeds,
    set_alpha,
    start_ramp,
    state_digest,
    transition,
)
from esper_functional._events import event_kind
from tests.tolerance import assert_bitwise

S, K = SeedLifecycleState, EventKind
ID = "ab" * 32
SHAPE = (2, 3)

MOVERS = {
    K.LOAD: (S.LOADING, {S.DORMANT, S.ERROR_RECOVERY}),
    K.ACTIVATE: (S.ACTIVE, {S.LOADING}),
    K.CANCEL: (S.DORMANT, {S.LOADING}),
    K.FAIL: (S.ERROR_RECOVERY, {S.LOADING}),
    K.UNLOAD: (S.DORMANT, {S.ACTIVE}),
    K.FOSSILIZE: (S.FOSSILIZED, {S.ACTIVE}),
    K.RESET: (S.DORMANT, {S.ERROR_RECOVERY}),
}

event_lists = st.lists(
    st.builds(
        Event,
        step=st.integers(0, 3),
        layer=st.integers(0, 1),
        seed=st.integers(0, 2),
        kind=st.sampled_from(K),
        kernel_id=st.just(ID),
        value=st.sampled_from([0.0, 0.25, 1.0, 2.0, 3.0]),
        span=st.integers(0, 5),
    ),
    max_size=40,
)


def one(event: Event) -> np.ndarray:
    where = np.zeros(SHAPE, np.bool_)
    where[event.layer, event.seed] = True
    return where


def by_hand(state: SeedState, event: Event) -> SeedState | None:
    """The state functions called directly; None where they refuse."""
    state, where, step = advance(state, event.step), one(event), event.step
    if event.kind in MOVERS:
        target, sources = MOVERS[event.kind]
        if S(state.stage[event.layer, event.seed]) not in sources:
            return None
        more = {}
        if event.kind is K.LOAD:
            more = {"slot": int(event.value), "kernel_id": kernel_id_words(event.kernel_id)}
        if event.kind is K.ACTIVATE:
            if event.value > 1.0:
                return None
            more = {"alpha": event.value}
        outcome = transition(state, where, target, step=step, **more)
    elif event.kind is K.ALPHA:
        outcome = set_alpha(state, where, event.value, step=step)
    elif event.kind is K.RAMP:
        outcome = start_ramp(state, where, event.value, event.span, step=step)
    elif event.kind is K.INCUBATE:
        outcome = incubate(state, where, step=step)
    elif event.kind is K.FOLD and state.stage[event.layer, event.seed] == S.FOSSILIZED:
        outcome = release(state, where, step=step)
    elif event.kind is K.FOLD:
        if state.stage[event.layer, event.seed] != S.ACTIVE:
            return None
        outcome = transition(state, where, S.DORMANT, step=step)
    elif not running(state)[event.layer, event.seed]:
        return None
    elif event.kind is K.HEALTH:
        return None if event.value > 1.0 else observe_health(state, where, event.value, step=step)
    elif event.kind is K.LATENCY:
        return observe_latency(state, where, event.value)
    elif event.kind is K.UNCALLED:
        return state
    else:
        if event.value != int(event.value):
            return None
        return record_errors(state, where, int(event.value), step=step)
    return None if outcome.refused.any() else outcome.state


def some_running() -> SeedState:
    """Seeds in several stages from the start: few random lists bring one to run."""
    grafts = [(0, 0), (0, 1), (1, 0), (1, 1)]
    loads = [Event(0, *place, K.LOAD, ID, float(i)) for i, place in enumerate(grafts)]
    begun = [Event(0, *place, K.ACTIVATE, ID, 0.25) for place in grafts[:3]]
    return fold_events(init_seeds(*SHAPE), [*loads, *begun, Event(0, 0, 1, K.FOSSILIZE)])


@given(event_lists)
def test_a_fold_equals_the_state_functions_step_by_step(events):
    state, accepted = some_running(), []
    for i, event in enumerate(events):
        event = Event(**{**vars(event), "step": 2 * i + event.step % 2})
        expected = by_hand(state, event)
        before = state_digest(state)
        if expected is None:
            with pytest.raises(SeedLifecycleError):
                apply_event(state, event)
        else:
            assert_bitwise(apply_event(state, event), expected)
            assert state_digest(state) == before
            accepted.append(event)
            state = expected
    assert state_digest(fold_events(some_running(), accepted)) == state_digest(state)


@given(event_lists)
def test_folding_in_two_parts_equals_folding_at_once(events):
    legal, state = [], init_seeds(*SHAPE)
    for event in events:
        try:
            state = apply_event(state, event)
        except SeedLifecycleError:
            continue
        legal.append(event)
    half = len(legal) // 2
    first = fold_events(init_seeds(*SHAPE), legal[:half])
    assert_bitwise(fold_events(first, legal[half:]), state)


def in_stage(stage: SeedLifecycleState) -> SeedState:
    """All seeds in one stage, with a kernel each."""
    return init_seeds(*SHAPE).replace(
        stage=np.full(SHAPE, int(stage), np.uint8), slot=np.full(SHAPE, 5, np.int32)
    )


@pytest.mark.parametrize("kind", MOVERS)
@pytest.mark.parametrize("stage", S)
def test_every_kind_moves_from_its_sources_alone(kind, stage):
    target, sources = MOVERS[kind]
    event = Event(4, 1, 2, kind, ID, 1.0)
    state = in_stage(stage)
    if stage in sources:
        after = apply_event(state, event)
        assert S(after.stage[1, 2]) is target
        assert (np.delete(after.stage.reshape(-1), 5) == stage).all()
        return
    with pytest.raises(SeedLifecycleError) as caught:
        apply_event(state, event, layers=("first", "second"))
    message = str(caught.value)
    assert f"seed 2 of layer 'second' is {stage.name} and cannot {kind.value}" in message
    offered = re.search(r"it may (.*) \(to ([^)]*)\)", message)
    kinds = [kind.value for kind, (_, own) in MOVERS.items() if stage in own]
    kinds += ["fold"] if stage in (S.ACTIVE, S.FOSSILIZED) else []
    assert offered is not None
    assert offered[1] == (", ".join(kinds) or "do nothing")
    assert offered[2] == (", ".join(s.name for s in legal_moves(stage)) or "no other stage")


@pytest.mark.parametrize("kind", [K.ALPHA, K.RAMP, K.ACTIVATE])
@pytest.mark.parametrize("value", [1.5, -0.5, float("nan")])
def test_a_value_outside_the_unit_interval_is_refused(kind, value):
    stage = S.LOADING if kind is K.ACTIVATE else S.ACTIVE
    with pytest.raises(SeedLifecycleError, match=r"alpha takes values in \[0, 1\]"):
        apply_event(in_stage(stage), Event(1, 0, 0, kind, value=value, span=3))


def test_the_refused_value_is_named():
    with pytest.raises(
        SeedLifecycleError, match=r"seed 0 of layer 0 is ACTIVE.*alpha with value 1\.5"
    ):
        apply_event(in_stage(S.ACTIVE), Event(1, 0, 0, K.ALPHA, value=1.5))


def test_folding_empties_an_active_seed_and_takes_a_fossils_slot():
    state = in_stage(S.ACTIVE)
    emptied = apply_event(state, Event(3, 0, 1, K.FOLD))
    assert_bitwise(emptied, apply_event(state, Event(3, 0, 1, K.UNLOAD)))
    fossil = in_stage(S.FOSSILIZED)
    folded = apply_event(fossil, Event(3, 0, 1, K.FOLD))
    assert S(folded.stage[0, 1]) is S.FOSSILIZED
    assert (folded.slot[0, 1], folded.last_update[0, 1]) == (NO_SLOT, 3)
    assert running_seeds(folded) == [ij for ij in running_seeds(fossil) if ij != (0, 1)]
    rest = {"slot": fossil.slot, "last_update": fossil.last_update}
    assert_bitwise(folded.replace(**rest), fossil)
    with pytest.raises(SeedLifecycleError, match=r"is FOSSILIZED and cannot fold"):
        apply_event(folded, Event(4, 0, 1, K.FOLD))


def test_a_seed_incubates_at_alpha_zero_alone_and_the_refusal_says_so():
    state = in_stage(S.ACTIVE)
    incubating = apply_event(state, Event(2, 1, 1, K.INCUBATE))
    assert incubating.incubating.tolist() == [[False] * 3, [False, True, False]]
    assert incubating.last_update[1, 1] == 2
    blended = apply_event(state, Event(2, 1, 1, K.ALPHA, value=0.25))
    ramping = apply_event(state, Event(2, 1, 1, K.RAMP, value=1.0, span=4))
    for refused in (blended, ramping):
        with pytest.raises(
            SeedLifecycleError, match=r"cannot incubate: .*a seed incubates while ACTIVE at alpha 0"
        ):
            apply_event(refused, Event(2, 1, 1, K.INCUBATE))


@pytest.mark.parametrize("layer", [-1, 2, 7])
def test_a_layer_that_is_not_there(layer):
    with pytest.raises(SeedIndexError, match=f"no layer {layer}: this model has 2, counted from 0"):
        apply_event(init_seeds(*SHAPE), Event(0, layer, 0, K.LOAD))


@pytest.mark.parametrize("seed", [-1, 3])
def test_a_seed_that_is_not_there(seed):
    with pytest.raises(SeedIndexError, match=f"no seed {seed} in layer 'b': it has 3, counted"):
        apply_event(init_seeds(*SHAPE), Event(0, 1, seed, K.LOAD), layers=("a", "b"))


def test_the_errors_share_a_root_and_lookups_are_lookup_errors():
    assert issubclass(SeedLifecycleError, KasminaException)
    assert issubclass(SeedIndexError, KasminaException)
    assert issubclass(SeedIndexError, LookupError)


def test_a_load_notes_slot_and_id():
    state = apply_event(init_seeds(*SHAPE), Event(7, 1, 0, K.LOAD, ID, 4.0))
    assert state.slot[1, 0] == 4
    assert tuple(state.kernel_id[1, 0]) == kernel_id_words(ID)
    assert state.last_update[1, 0] == 7


def test_fault_events_bring_the_counts_in_and_skip_what_is_unchanged():
    state = in_stage(S.ACTIVE).replace(error_count=np.full(SHAPE, 1, np.int32))
    counts = np.array([1, 2, 3, 0, 1, 1], np.int32)
    events = fault_events(state, counts, step=9)
    assert [(e.layer, e.seed, e.value) for e in events] == [(0, 1, 2.0), (0, 2, 3.0), (1, 0, 0.0)]
    assert all(e.kind is K.ERRORS and e.step == 9 for e in events)
    after = fold_events(state, events)
    assert after.error_count.tolist() == [[1, 2, 3], [0, 1, 1]]
    assert running_seeds(after) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert fault_events(init_seeds(*SHAPE), (), step=9) == []


@pytest.mark.parametrize("kind", K)
def test_a_kind_may_be_given_as_text_and_a_value_as_a_whole_number(kind):
    assert event_kind(kind.value) is event_kind(kind) is kind
    event = Event(1, 0, 0, kind, value=1)
    assert event == Event(1, 0, 0, kind, value=1.0)
    assert type(event.value) is float


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(KasminaException, match=r"unknown kind of event 'lod': .*mean 'load'"):
        event_kind("lod")


@pytest.mark.parametrize(
    ("stage", "kind", "value", "rule"),
    [
        (S.DORMANT, K.LOAD, -3.0, "a slot is a whole number, from 0"),
        (S.DORMANT, K.LOAD, 0.5, "a slot is a whole number, from 0"),
        (S.DORMANT, K.ERRORS, 1.0, "failures are counted from 0, of seeds that run"),
        (S.ACTIVE, K.ERRORS, -5.0, "failures are counted from 0, of seeds that run"),
        (S.ACTIVE, K.ERRORS, float("inf"), "failures are counted from 0, of seeds that run"),
        (S.ACTIVE, K.HEALTH, 9.0, r"health takes values in \[0, 1\], of seeds that run"),
        (S.ACTIVE, K.LATENCY, -1.0, "latency is counted in µs from 0, of seeds that run"),
        (S.DORMANT, K.LATENCY, 1.0, "latency is counted in µs from 0, of seeds that run"),
        (S.ERROR_RECOVERY, K.HEALTH, 0.5, r"health takes values in \[0, 1\], of seeds that run"),
    ],
)
def test_values_that_a_kind_does_not_take_are_refused_by_their_rule(stage, kind, value, rule):
    state = in_stage(stage)
    with pytest.raises(
        SeedLifecycleError, match=f"cannot {kind.value} with value {value}.*; {rule}"
    ):
        apply_event(state, Event(4, 0, 0, kind, value=value))


def test_a_ramp_without_steps_is_refused_by_its_rule():
    with pytest.raises(SeedLifecycleError, match=r"1\.0 over 0 steps: .*a ramp at least 1 step"):
        apply_event(in_stage(S.ACTIVE), Event(4, 0, 0, K.RAMP, value=1.0))


def test_failures_of_other_seeds_make_no_events():
    with pytest.raises(KasminaException, match=r"fault_events: the state runs 6 seeds .* has 2"):
        fault_events(in_stage(S.ACTIVE), np.array([1, 2]), step=0)


def test_absorbing_is_what_its_events_are():
    state = apply_event(in_stage(S.ACTIVE), Event(4, 0, 0, K.RAMP, value=1.0, span=100))
    errors = np.array([3, 0, 1, 0, 0, 2], np.int32)
    live = Live(None, None, errors, ())
    told = fold_events(state, fault_events(state, errors, step=50))
    assert state_digest(absorb(state, live, step=50)) == state_digest(told)


def test_a_later_step_is_not_overwritten_by_a_ramps_end():
    state = apply_event(in_stage(S.ACTIVE), Event(4, 0, 0, K.RAMP, value=1.0, span=10))
    where = one(Event(0, 0, 0, K.HEALTH))
    assert advance(observe_health(state, where, 0.5, step=50), 50).last_update[0, 0] == 50
