"""The replay store, against a list that does the same the long way."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from esper.checkpoints import load_checkpoint, save_checkpoint
from esper.errors import InputError
from esper.tamiyo.learning import ReplayStore, Transition
from esper.tamiyo.learning._sum_tree import SumTree
from tests.depth import depth


class Pair(NamedTuple):
    number: np.ndarray
    row: np.ndarray


def pairs(*numbers):
    column = np.array(numbers, np.int32)
    return Pair(column, np.stack([column, -column], axis=-1).astype(np.float32))


def store_of(capacity=4, **given):
    return ReplayStore(Pair(np.int32(0), np.zeros(2, np.float32)), capacity, **given)


@given(st.lists(st.sampled_from([0.0, 0.1, 1.0, 1e-9, 1e9]), min_size=1, max_size=9), st.data())
def test_a_sum_tree_finds_what_running_sums_find(values, data):
    tree = SumTree(len(values))
    order = data.draw(st.permutations(range(len(values))))
    for place in order:
        tree.set(np.array([place]), values[place])
    at_once = SumTree(len(values))
    at_once.set(np.arange(len(values)), np.array(values))
    assert at_once._sums.tobytes() == tree._sums.tobytes()
    assert tree.values.tolist() == values
    assert tree.total == pytest.approx(sum(values))
    masses = np.linspace(0, tree.total, 30)
    found = tree.find(masses)
    if tree.total:
        assert all(values[place] > 0 for place in found)
        assert (np.diff(found) >= 0).all()
    small = [0.5, 0.0, 2.0, 0.25]
    exact = SumTree(4)
    exact.set(np.arange(4), np.array(small))
    assert exact.find(np.array([0.0, 0.49, 0.5, 2.49, 2.5, 2.75])).tolist() == [0, 0, 2, 2, 3, 3]


class Kept(RuleBasedStateMachine):
    """A store beside a dictionary of what it should hold."""

    @initialize(capacity=st.integers(1, 5), seed=st.integers(0, 3))
    def begin(self, capacity, seed):
        self.seed = seed
        self.store = store_of(capacity, seed=seed, exponent=0.5)
        self.kept, self.count, self.largest = {}, 0, 1.0

    @rule(priorities=st.lists(st.floats(0, 100), max_size=7), told=st.booleans())
    def add(self, priorities, told):
        numbers = range(self.count, self.count + len(priorities))
        given = np.array(priorities) if told else None
        serials = self.store.add(pairs(*numbers), given)
        assert serials.tolist() == list(numbers)
        for number, priority in zip(numbers, priorities, strict=True):
            self.kept[number] = priority if told else self.largest
        self.count += len(priorities)
        self.kept = dict(list(self.kept.items())[-self.store.capacity :])
        self.largest = max([self.largest, *self.kept.values()])

    @precondition(lambda self: self.count)
    @rule(data=st.data(), priority=st.floats(0, 100))
    def update(self, data, priority):
        serial = data.draw(st.integers(0, self.count - 1))
        self.store.update(np.array([serial]), np.array([priority]))
        if serial in self.kept:
            self.kept[serial] = priority
            self.largest = max(self.largest, priority)

    @precondition(lambda self: self.count)
    @rule(size=st.integers(1, 9), correction=st.floats(0, 1))
    def draw(self, size, correction):
        drawn = self.store.draw(size, correction=correction)
        numbers = drawn.transitions.number
        assert drawn.serials.tolist() == numbers.tolist()
        assert (drawn.transitions.row == np.stack([numbers, -numbers], -1)).all()
        chances = {n: (p + 1e-6) ** 0.5 for n, p in self.kept.items()}
        total, count = sum(chances.values()), len(chances)
        weights = {n: (count * p / total) ** -correction for n, p in chances.items()}
        most = max(weights.values())
        np.testing.assert_allclose(drawn.weights, [weights[n] / most for n in numbers], rtol=1e-5)

    @rule()
    def save_and_go_on(self):
        other = store_of(self.store.capacity, seed=9, exponent=0.5)
        other.restore(self.store.state())
        if self.count:
            ours, theirs = self.store.draw(5), other.draw(5)
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                assert a.tobytes() == b.tobytes()
        self.store = other

    @invariant()
    def holds_the_newest(self):
        assert len(self.store) == len(self.kept)
        assert self.store.all().number.tolist() == list(self.kept)


TestKept = Kept.TestCase
TestKept.settings = settings(
    max_examples=depth(15, 200), stateful_step_count=depth(15, 50), deadline=None
)


def test_draws_are_in_proportion_and_weights_take_that_back():
    store = store_of(3, exponent=1.0)
    store.add(pairs(0, 1, 2), np.array([1.0, 2.0, 5.0]))
    drawn = store.draw(8000, correction=1.0)
    counts = np.bincount(drawn.transitions.number, minlength=3)
    # One is drawn from each of 8,000 equal parts, so only parts on a border may go either way.
    np.testing.assert_allclose(counts, [1000, 2000, 5000], atol=2)
    of_each = np.bincount(drawn.transitions.number, drawn.weights)
    np.testing.assert_allclose(of_each / of_each[0], 1.0, rtol=5e-3)


def test_one_seed_draws_one_thing():
    def numbers(seed):
        store = store_of(50, seed=seed)
        store.add(pairs(*range(50)))
        return store.draw(20).transitions.number.tolist()

    assert numbers(1) == numbers(1) != numbers(2)


def test_a_checkpoint_holds_a_store(tmp_path):
    store = store_of(4, seed=3)
    store.add(pairs(*range(7)), np.arange(7.0))
    store.draw(3)
    save_checkpoint(tmp_path, 1, store.state(), {})
    other = store_of(4)
    other.restore(load_checkpoint(tmp_path, 1, like=other.state())[0])
    assert other.draw(9).serials.tolist() == store.draw(9).serials.tolist()


EXAMPLE = Transition(np.zeros(2), {"at": np.int32(0)}, np.float32(0), np.bool_(False), np.zeros(2))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: store_of(0), "at least 1 transition; its capacity is 0"),
        (lambda: store_of(exponent=2), "exponent of priorities is from 0 to 1, and not 2"),
        (lambda: store_of(seed=-1), "the seed is a whole number from 0, and not -1"),
        (lambda: store_of().draw(1), "the store is empty: add transitions"),
        (lambda: filled().draw(0), "at least 1 transition is drawn, and not 0"),
        (lambda: filled().draw(1, correction=2), "the correction is from 0 to 1, and not 2"),
        (lambda: filled().add((1, 2)), "transitions have the structure"),
        (
            lambda: filled().add(Pair(np.int32([1]), np.zeros((2, 2)))),
            r"row is float64\[2, 2\]; 1 ",
        ),
        (lambda: filled().add(pairs(1), np.array([np.nan])), "finite and from 0; one is nan"),
        (lambda: filled().update([0], [-1.0]), "finite and from 0; one is -1.0"),
        (lambda: filled().update([0], [1.0, 2.0]), r"the shape \(2,\); \(1,\) is expected"),
        (
            lambda: filled().update([5], [1.0]),
            "serials are from 0 to 1, those that `add` gave; the",
        ),
        (lambda: filled().restore(store_of(5).state()), r"number is int32\[5\] in the state and i"),
        (
            lambda: filled().restore(ReplayStore(EXAMPLE, 4).state()),
            "the state has 5 leaves, and transitions of this store have 2",
        ),
    ],
)
def test_what_cannot_be_is_refused(act, message):
    with pytest.raises(InputError, match=message):
        act()


def filled():
    store = store_of()
    store.add(pairs(1, 2))
    return store


def test_what_is_refused_changes_nothing():
    store = filled()
    before = store.state()
    with pytest.raises(InputError):
        store.add(Pair(np.int32([1]), np.zeros((1, 3), np.float32)))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(store.state()), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
