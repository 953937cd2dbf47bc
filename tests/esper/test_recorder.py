"""Readings of a run: what controllers are shown, as policies see it."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from esper.errors import InputError
from esper.tamiyo import Action, Cost, Decision, ReadingsRecorder, SiteNorms, Worth
from esper.tamiyo.graph import (
    KERNEL,
    PAST,
    Node,
    describe_kernel,
    legal_choices,
    make_topology,
    model_graph,
)
from esper.tamiyo.graph import Flow as DataFlow
from esper.tezzeret import load_blueprint
from esper_functional import Event, EventKind, SeedLifecycleState, apply_event, init_seeds
from tests.esper.controlled import HOST, World, hold, observe, record

A, B = record("a", parameters=40), record("b", parameters=40)
WIDE = record("wide", parameters=90)
OTHER = record("other", "gated", parameters=40)
OWN = record("own", "somebodys")
CANDIDATES = {1: [A, OTHER, B], 0: [WIDE, A, OWN]}
NODES = [
    Node("layers.0", "linear", (2,), (8,), 24),
    Node("layers.1", "convolution", (8, 4), (3, 4), 27),
    Node("layers.2", "other", (), (), 0),
]
TOPOLOGY = make_topology(NODES, DataFlow((0, 1, 2), frozenset({(0, 1), (1, 2)})))
NORMS = SiteNorms(np.array([1, 2, 0], np.float32), np.array([3, 4, 0], np.float32))


def seen(step=50, train=1.0, validation=1.0, *, seeds=None, **more):
    own = observe(
        step,
        train,
        validation,
        seeds=init_seeds(3, 2) if seeds is None else seeds,
        candidates=more.pop("candidates", CANDIDATES),
        worth=more.pop("worth", lambda *_: Worth(0.1, 0.05, 0.2)),
        **{name: more.pop(name) for name in ("now", "rollbacks") if name in more},
    )
    given = {"topology": lambda: TOPOLOGY, "norms": lambda: NORMS, "first_loss": 2.0, **more}
    return dataclasses.replace(own, **given)


def f32(values):
    return np.array(values, np.float32)


def healthy(seeds, place, score):
    health = np.array(seeds.health)
    health[place] = score
    return seeds.replace(health=health)


def same(one, other):
    for name, value in one._asdict().items():
        np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


def test_the_first_boundary_is_exact_by_hand():
    own = ReadingsRecorder()
    observation = seen(50, 1.5, 1.25, now=Cost(150, 300.0), rollbacks=(7,), loss_spread=0.5)
    got = own.read(observation)
    nan = np.float32(np.nan)
    assert got.progress == np.float32(50 / 10_000)
    np.testing.assert_array_equal(got.train_loss, f32([1.5, nan, nan, nan]))
    # The loss before training is known, and was measured at the boundary before.
    np.testing.assert_array_equal(got.validation_loss, f32([1.25, 2.0, nan, nan]))
    assert (got.first_loss, got.loss_spread, got.rollbacks) == (2.0, 0.5, 1.0)
    assert (got.parameters, got.flops) == (1.5, 1.5)
    nodes = len(own.edges(observation).there)
    assert nodes == 8
    assert got.kind.tolist() == [0, 1, 6, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(got.sizes[:3], f32([[24, 2, 8], [27, 32, 12], [0, 0, 0]]))
    assert got.depth.tolist() == [0, 1, 2, 0, 0, 0, 0, 0]
    assert got.grows.tolist() == [True, True, False, False, False, False, False, False]
    assert got.gradient_norm.tolist()[:3] == [1, 2, 0]
    assert got.weight_norm.tolist()[:3] == [3, 4, 0]
    assert np.isnan(got.follows).all()
    assert got.stage.shape == (nodes, 2)
    assert np.isnan(got.health).all()
    assert np.isnan(got.worth).all()
    assert not got.held.any()
    assert not got.age.any()


def test_what_maps_follow_is_asked_of_the_layers_that_may_grow_alone():
    asked = []

    def follows(layers):
        asked.append(sorted(layers))
        return f32([(0.1, 0.5), (-0.2, np.nan), (np.nan, np.nan)])

    got = ReadingsRecorder().read(seen(follows=follows))
    assert asked == [[0, 1]]
    np.testing.assert_array_equal(got.follows[:2], f32([(0.1, 0.5), (-0.2, np.nan)]))
    assert np.isnan(got.follows[2:]).all()


def test_kernels_of_one_description_are_one_row():
    own, observation = ReadingsRecorder(offset=1), seen()
    got = own.read(observation)
    # low_rank of 40, gated of 40, low_rank of 90, and one that nobody knows: filled up to a bucket.
    assert got.kernels.shape == (4, KERNEL)
    wanted = [
        describe_kernel(A, HOST, load_blueprint("low_rank")),
        describe_kernel(OTHER, HOST, load_blueprint("gated")),
        describe_kernel(WIDE, HOST, load_blueprint("low_rank")),
        describe_kernel(OWN, HOST, None),
    ]
    np.testing.assert_array_equal(got.kernels, np.stack(wanted))
    assert got.fits[:3].tolist() == [
        [True, False, True, True], [True, True, False, False], [False] * 4,
    ]  # fmt: skip
    assert [own.kernel(observation, row, 1).kernel_id for row in (0, 1)] == [
        B.kernel_id, OTHER.kernel_id,
    ]  # fmt: skip
    graft = Decision(Action.GRAFT, 1, 0, "a test", B.kernel_id)
    own.told([graft])
    assert own.kernel(observation, 0, 1) == A
    own.told([dataclasses.replace(graft, action=Action.UNLOAD), graft])
    assert own.kernel(observation, 0, 1) == B
    with pytest.raises(KeyError):
        own.kernel(observation, 2, 1)
    # Another run meets other kernels.
    assert ReadingsRecorder().kernel(observation, 0, 1) == A


def test_seeds_are_followed_from_graft_to_end():
    own = ReadingsRecorder()
    own.read(seen(50))
    seeds = hold((0, 1), kernel=WIDE, shape=(3, 2), step=50)
    seeds = apply_event(seeds, Event(50, 1, 0, EventKind.LOAD, B.kernel_id))
    got = own.read(seen(100, seeds=seeds))
    assert got.age[:2].tolist() == [[0, 1], [1, 0]]
    np.testing.assert_array_equal(
        got.held[0, 1], describe_kernel(WIDE, HOST, load_blueprint("low_rank"))
    )
    assert got.held[1, 0].any()
    assert not got.held[0, 0].any()
    # What loads has neither health nor worth.
    assert np.isnan(got.worth[1, 0])
    assert got.worth[0, 1] == np.float32(0.1)
    assert got.worth_half[0, 1] == np.float32(0.075)
    own.read(seen(150, seeds=healthy(seeds, (0, 1), 0.25)))
    got = own.read(seen(200, seeds=healthy(seeds, (0, 1), 0.75)))
    assert (got.health[0, 1], got.health_before[0, 1], got.age[0, 1]) == (0.75, 0.25, 3)
    seeds = apply_event(seeds, Event(200, 0, 1, EventKind.UNLOAD))
    got = own.read(seen(250, seeds=seeds))
    assert not got.held[0].any()
    assert not got.age[0].any()
    # Another kernel in the same place begins anew.
    seeds = hold((0, 1), kernel=A, seeds=seeds, step=250)
    assert own.read(seen(300, seeds=seeds)).age[0, 1] == 1


def test_an_incubating_kernel_is_not_judged():
    seeds = hold((0, 0), kernel=A, shape=(3, 2))
    seeds = apply_event(seeds, Event(60, 0, 0, EventKind.INCUBATE))
    got = ReadingsRecorder().read(seen(100, seeds=seeds))
    assert np.isnan(got.worth).all()
    assert np.isnan(got.health).all()
    assert got.age[0, 0] == 1


def test_worths_are_measured_in_one_pass():
    asked = []

    def worths(places):
        asked.append(list(places))
        return {place: Worth(float(sum(place)), -math.inf, math.inf) for place in places}

    def alone(layer, seed):
        raise AssertionError("measured one by one")

    seeds = hold((0, 0), (1, 1), kernel=A, shape=(3, 2))
    got = ReadingsRecorder().read(seen(100, seeds=seeds, worths=worths, worth=alone))
    assert asked == [[(0, 0), (1, 1)]]
    assert (got.worth[0, 0], got.worth[1, 1]) == (0.0, 2.0)
    assert np.isinf(got.worth_half[0, 0])
    ReadingsRecorder().read(seen(100, worths=lambda places: pytest.fail("nothing runs")))


def test_losses_are_the_newest_first():
    own = ReadingsRecorder()
    for i in range(5):
        own.read(seen(50 * (i + 1), float(i), math.nan if i == 4 else i + 0.5))
    got = own.read(seen(300, 5.0, 5.5))
    np.testing.assert_array_equal(got.train_loss, f32([5, 4, 3, 2]))
    np.testing.assert_array_equal(got.validation_loss, f32([5.5, np.nan, 3.5, 2.5]))
    assert len(got.train_loss) == PAST
    # Without the loss of the run's beginning, the first that was seen stands for it.
    late = ReadingsRecorder().read(seen(700, 1.0, 0.75, first_loss=math.nan))
    assert late.first_loss == 0.75
    assert np.isnan(late.validation_loss[1])


def test_what_is_not_measured_is_nan():
    got = ReadingsRecorder().read(seen(norms=None, loss_spread=math.nan))
    assert np.isnan(got.gradient_norm[:3]).all()
    assert got.loss_spread == 0.0
    with pytest.raises(InputError, match="came without the model's topology"):
        ReadingsRecorder().read(seen(topology=None))


def test_a_policy_sees_what_lifecycle_and_candidates_allow():
    own = ReadingsRecorder()
    observation = seen(seeds=hold((0, 0), (1, 0), (1, 1), kernel=A, shape=(3, 2)))
    readings, edges = own.read(observation), own.edges(observation)
    legal = legal_choices(readings, np.asarray(edges.there), np)
    assert legal.free.tolist()[:3] == [1, -1, 0]
    assert legal.graft[:3].any(axis=1).tolist() == [True, False, False]
    assert legal.unload[:3].tolist() == [[True, False], [True, True], [False, False]]
    graph = model_graph(readings, edges, np)
    assert all(np.isfinite(own).all() for own in graph[:4])


class Machine(RuleBasedStateMachine):
    """One recorder goes straight on, another is restored, a third never saw what was undone."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World((3, 2), CANDIDATES)
        self.straight, self.other = ReadingsRecorder(), ReadingsRecorder()
        self.shown = []

    @rule(
        train=st.floats(0.0, 2.0) | st.just(math.nan),
        validation=st.floats(0.0, 2.0),
        graft=st.integers(0, 5),
        forget=st.booleans(),
    )
    def boundary(self, train, validation, graft, forget) -> None:
        if forget:
            state = json.loads(json.dumps(self.other.state(), allow_nan=False))
            self.other = ReadingsRecorder()
            self.other.restore(state)
            assert self.other.state() == self.straight.state()
        observation = seen(
            self.world.step, train, validation, seeds=self.world.seeds,
            rollbacks=tuple(self.world.rollbacks),
        )  # fmt: skip
        self.world.observe(train, validation)
        got = self.straight.read(observation)
        same(self.other.read(observation), got)
        same(self.straight.read(observation), got)
        self.shown = [own for own in self.shown if own.step < observation.step] + [observation]
        fresh = ReadingsRecorder()
        for own in self.shown[:-1]:
            fresh.read(own)
        same(fresh.read(observation), got)
        layer, seed = divmod(graft, 2)
        if layer < 2 and self.world.seeds.stage[layer, seed] == SeedLifecycleState.DORMANT:
            self.world.obey([Decision(Action.GRAFT, layer, seed, "", A.kernel_id)])
            self.world.activate()
        self.world.go_on()

    @rule(boundaries=st.integers(1, 2))
    def goes_back(self, boundaries) -> None:
        # The trainer never goes back by more than what is kept.
        self.world.go_back(boundaries)


def test_what_was_taken_back_was_never_seen():
    Machine.TestCase.settings = settings(stateful_step_count=25, max_examples=12)
    Machine.TestCase().runTest()
