"""What kernels are worth: removal costs, Shapley values, and what they cost."""

from functools import cache
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from esper.artifacts import trust
from esper.contracts import KernelSignature
from esper.errors import InputError
from esper.tezzeret import compile_blueprint, load_blueprint
from esper.tolaria import load_task, make_config, make_trainee
from esper.tolaria.worth import (
    PARTS,
    Latency,
    costs,
    interval,
    latencies,
    memory_bytes,
    output_distance,
    removal_costs,
    shapley_values,
)
from esper_functional import Event, EventKind
from tests.esper.worth_networks import Additive, OneByOne

KERNELS = st.lists(st.lists(st.floats(-2, 2), min_size=3, max_size=3), min_size=1, max_size=4).map(
    np.array
)


def places_of(network):
    return [(0, i) for i in range(len(network.kernels))]


# --- removal costs ------------------------------------------------------------------------------


@given(KERNELS, st.integers(2, 9))
def test_removal_costs_are_paired_over_parts(kernels, parts):
    network = Additive(kernels)
    found = removal_costs(network, places_of(network), parts)
    assert network.passes == 1  # all variants in one batched pass
    for place, worth in found.items():
        with_all, without = network.losses_without("validation", [(), (place,)], parts=parts)
        gaps = without.astype(np.float64) - with_all
        assert worth.value == pytest.approx(gaps.mean(), abs=1e-9)
        if gaps.std() > 1e-6:
            low, high = stats.t.interval(0.95, parts - 1, gaps.mean(), stats.sem(gaps))
            assert (worth.low, worth.high) == (pytest.approx(low), pytest.approx(high))


def test_intervals_and_errors_tell_how_far_other_data_differ():
    # Over 100 draws of held-out data the 95 % interval holds what very much data say, about as
    # often as it claims; and the standard error is the spread of Shapley values between draws.
    kernels = [[0.5, 0, 0], [0, 1.5, 0]]
    places = [(0, 0), (0, 1)]
    truth = removal_costs(Additive(kernels, examples=200_000), places)[0, 1].value
    draws = [Additive(kernels, examples=160, seed=seed) for seed in range(100)]
    found = [removal_costs(network, places)[0, 1] for network in draws]
    assert 0.9 < np.mean([worth.low <= truth <= worth.high for worth in found]) < 0.99
    values, errors, _ = zip(*(shapley_values(n, places)[0, 1] for n in draws), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.2)


def test_what_makes_a_part_hard_falls_out_of_the_interval():
    # The losses differ between parts by far more than the kernel makes of a difference.
    network = Additive([[0.02, 0.0, 0.0]], noise=20.0)
    losses = network.losses_without("validation", [()], parts=PARTS)[0]
    worth = removal_costs(network, [(0, 0)])[0, 0]
    assert worth.high - worth.low < losses.std() / 10


def test_a_kernel_that_helps_has_a_positive_cost_and_one_at_alpha_zero_none():
    network = Additive([[0.5, 1.5, 2.5], [0, 0, 1], [0, 0, -1]], noise=0.01, alphas=[1, 0, 0.1])
    found = removal_costs(network, places_of(network))
    assert found[0, 0].low > 0
    assert found[0, 1] == (0.0, 0.0, 0.0)
    assert found[0, 2].high < 0


def test_one_part_has_no_interval_and_no_place_no_pass():
    network = Additive([[1, 0, 0]])
    worth = removal_costs(network, [(0, 0)], parts=1)[0, 0]
    assert np.isfinite(worth.value)
    assert np.isnan([worth.low, worth.high]).all()
    network.passes = 0
    assert removal_costs(network, []) == {}
    assert shapley_values(network, []) == {}
    assert network.passes == 0


def test_losses_that_are_not_finite_are_handed_on():
    worth = interval(np.array([1.0, np.inf, 2.0]))
    assert worth.value == np.inf
    assert np.isnan([worth.low, worth.high]).all()
    assert np.isnan(interval(np.array([1.0, np.nan])).value)
    network = Additive([[1, 0, 0], [0, 1, 0]])
    network.y = network.y * np.inf  # every loss is infinite, and their differences say nothing
    assert all(np.isnan(w.value) for w in removal_costs(network, places_of(network)).values())
    assert all(np.isnan(s.value) for s in shapley_values(network, places_of(network)).values())
    game = Game(1, lambda c: -np.inf if c else 0.0)  # without this kernel the loss is finite again
    assert removal_costs(game, [(0, 0)])[0, 0].value == -np.inf


def test_removal_costs_are_those_of_a_network_in_jax():
    # A backend that has no batched pass: one evaluation a variant, and so one part.
    config = make_config(task="spirals", backend="jax")
    own = make_trainee(load_task(config.task), config)
    artifact = compile_blueprint(
        load_blueprint("bottleneck"), KernelSignature.parse("2->8"), sizes={"width": 4}
    )
    trust(artifact)
    for seed, alpha in enumerate((1.0, 0.5)):
        own.apply(Event(0, 0, seed, EventKind.LOAD, artifact.kernel_id, float(seed)))
        own.apply(Event(0, 0, seed, EventKind.ACTIVATE, artifact.kernel_id, alpha), artifact)
    trainee = OneByOne(own)
    found = removal_costs(trainee, [(0, 1), (0, 0)], parts=1)
    whole = own.evaluate("validation").loss
    assert list(found) == [(0, 1), (0, 0)]
    for place, worth in found.items():
        loss = own.evaluate("validation", {place}).loss
        assert worth.value == pytest.approx(loss - whole, abs=1e-6)
        assert worth.value != 0.0
    shares = shapley_values(trainee, [(0, 0), (0, 1)], parts=1)
    both = own.evaluate("validation", {(0, 0), (0, 1)}).loss - whole
    assert sum(share.value for share in shares.values()) == pytest.approx(both, abs=1e-6)


@pytest.mark.parametrize("measure", [removal_costs, shapley_values])
def test_places_and_parts_that_are_none_are_refused(measure):
    network = Additive([[1, 0, 0]])
    with pytest.raises(InputError, match=r"no kernel runs at \(0, 5\).*kernels run at \(0, 0\)"):
        measure(network, [(0, 0), (0, 5)])
    with pytest.raises(InputError, match=r"names \(0, 0\) more than once"):
        measure(network, [(0, 0), (0, 0)])
    for parts in (0, -1, 2.0):
        with pytest.raises(InputError, match="`parts` must be an integer from 1 on"):
            measure(network, [(0, 0)], parts)
    assert network.passes == 0


# --- Shapley values -----------------------------------------------------------------------------


@cache
def active(count):
    return Additive(np.ones((count, 1))).seeds


class Game:
    """A game given by what each coalition is worth, as a trainee shows it: loss = -v."""

    def __init__(self, count, value):
        self.seeds = active(count)
        self.count, self.value = count, value

    def losses_without(self, split, variants, *, parts=1):
        everyone = frozenset(range(self.count))
        worth = [self.value(everyone - {seed for _, seed in muted}) for muted in variants]
        return -np.repeat(np.array(worth, np.float64)[:, None], parts, 1)


def shares(game, **options):
    found = shapley_values(game, [(0, i) for i in range(game.count)], **options)
    return np.array([share.value for share in found.values()])


def drawn(count, seed):
    table: dict = {frozenset(): 0.0}
    random = np.random.default_rng(seed)

    def value(coalition):
        # In a fixed order, so that the table does not depend on who asks first.
        if len(table) == 1:
            for code in range(1, 2**count):
                members = frozenset(i for i in range(count) if code >> i & 1)
                table[members] = float(random.normal())
        return table[frozenset(coalition)]

    return value


def test_the_glove_game_by_hand():
    # One has a left glove, two have a right one, and a pair is worth 1. Of the six orders, the
    # first right-handed one completes the pair in one: 1/6 each, and the left-handed one has 4/6.
    game = Game(3, lambda c: float(0 in c and bool({1, 2} & c)))
    np.testing.assert_allclose(shares(game), [4 / 6, 1 / 6, 1 / 6])


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_shapley_values_are_efficient_and_those_of_the_definition(count, seed):
    game = Game(count, drawn(count, seed))
    found = shares(game)
    everyone = frozenset(range(count))
    assert found.sum() == pytest.approx(game.value(everyone) - game.value(frozenset()))
    total = np.zeros(count)
    orders = list(permutations(range(count)))
    for order in orders:
        for i, player in enumerate(order):
            before = frozenset(order[:i])
            total[player] += game.value(before | {player}) - game.value(before)
    np.testing.assert_allclose(found, total / len(orders), atol=1e-12)


@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_shapley_values_are_symmetric_and_additive_and_leave_null_players_nothing(count, seed):
    base, other = drawn(count, seed), drawn(count, seed + 1)

    def symmetric(c):  # players 0 and 1 are one and the same to it
        return base(c) + base(frozenset({0: 1, 1: 0}.get(i, i) for i in c))

    found = shares(Game(count, symmetric))
    assert found[0] == pytest.approx(found[1])
    found = shares(Game(count, lambda c: base(c - {count - 1})))
    assert found[-1] == pytest.approx(0.0, abs=1e-12)
    both = shares(Game(count, lambda c: base(c) + other(c)))
    np.testing.assert_allclose(both, shares(Game(count, base)) + shares(Game(count, other)))


def test_twins_share_what_removal_does_not_see():
    # Either of the two does for both: without one the other still does, and removal costs nothing.
    game = Game(2, lambda c: float(bool(c)))
    np.testing.assert_allclose(shares(game), [0.5, 0.5])
    found = removal_costs(game, [(0, 0), (0, 1)])
    assert [worth.value for worth in found.values()] == [0.0, 0.0]


def test_shapley_values_of_a_network_sum_to_what_its_kernels_do_and_have_errors_over_parts():
    network = Additive([[0.5, 0, 0], [0, 1.5, 0], [0, 1.0, 2.0]])
    found = shapley_values(network, places_of(network))
    full = network.losses_without("validation", [places_of(network), ()], parts=PARTS)
    assert sum(s.value for s in found.values()) == pytest.approx((full[0] - full[1]).mean(), 1e-5)
    assert all(s.error > 0 and s.sampling_error == 0 for s in found.values())
    single = shapley_values(network, places_of(network), 1)
    assert all(np.isnan(s.error) for s in single.values())


def test_more_than_eight_are_refused_or_sampled():
    game = Game(9, drawn(9, 0))
    places = [(0, i) for i in range(9)]
    with pytest.raises(InputError, match=r"would take 512 evaluations.*at most 8.*`permutations`"):
        shapley_values(game, places)
    for options in ({"permutations": 1, "random": np.random.default_rng(0)}, {"permutations": 5}):
        with pytest.raises(InputError, match="`permutations` must be an integer from 2 on"):
            shapley_values(game, places, **options)


def test_sampled_orders_are_unbiased_efficient_and_tell_their_error():
    game = Game(5, drawn(5, 3))
    exact = shares(game)
    places = [(0, i) for i in range(5)]
    found = shapley_values(game, places, permutations=400, random=np.random.default_rng(1))
    value = np.array([share.value for share in found.values()])
    error = np.array([share.sampling_error for share in found.values()])
    assert (np.abs(value - exact) < 4 * error).all()
    assert value.sum() == pytest.approx(exact.sum())
    # Four times as many halve the error, more or less.
    fewer = shapley_values(game, places, permutations=100, random=np.random.default_rng(2))
    ratio = np.array([share.sampling_error for share in fewer.values()]) / error
    assert 1.7 < np.exp(np.log(ratio).mean()) < 2.3
    again = shapley_values(game, places, permutations=400, random=np.random.default_rng(1))
    assert again == found


# --- costs --------------------------------------------------------------------------------------


def test_costs_are_counted_and_bytes_are_those_of_the_arrays():
    network = Additive([[1, 0, 0], [0, 1, 0]])
    found = costs(network)
    assert (found.parameters, found.flops) == (9, 18.0)
    assert found.latency is None
    assert found.memory == 8 * 3 + 3 * 8 * 6  # host; kernels and their two moments, in f64
    assert (
        memory_bytes({"host": {"w": np.zeros(5, np.float32)}, "seeds": {"a": np.zeros(99)}}) == 20
    )


class Ticking:
    """A clock that calls move by hand."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now

    def takes(self, *nanoseconds):
        steps = iter(nanoseconds)

        def call():
            self.now += next(steps)

        return call


def test_latency_is_the_median_with_its_quartiles_and_the_first_call_is_left_out():
    clock = Ticking()
    found = latencies(
        {"a": clock.takes(10**9, 1000, 2000, 3000, 4000, 50_000), "b": clock.takes(*[7000] * 6)},
        repeats=5, clock=clock,
    )  # fmt: skip
    assert found["a"] == Latency(3.0, 2.0, 4.0, 5)
    assert found["b"] == Latency(7.0, 7.0, 7.0, 5)


def test_calls_are_timed_in_turns():
    order = []
    latencies({n: lambda n=n: order.append(n) for n in "ab"}, repeats=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


def test_a_forward_pass_is_timed_and_no_repeats_are_refused():
    network = Additive([[1, 0, 0]])
    found = costs(network, network.x, repeats=3)
    assert found.latency is not None
    assert found.latency.repeats == 3
    assert 0 < found.latency.low <= found.latency.median <= found.latency.high
    with pytest.raises(InputError, match="`repeats` must be an integer from 1 on, got 0"):
        costs(network, network.x, repeats=0)


# --- how differently two networks behave --------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
def test_output_distance_is_symmetric_bounded_and_without_a_unit(seed):
    a, b = np.random.default_rng(seed).standard_normal((2, 7, 3)).astype(np.float32)
    distance = output_distance(a, b)
    assert 0.0 < distance <= 1.0
    assert output_distance(b, a) == distance
    assert output_distance(a, a) == 0.0
    assert output_distance(a, -a) == pytest.approx(1.0)
    assert output_distance(a, 0 * a) == pytest.approx(1.0)
    assert output_distance(4 * a, 4 * b) == pytest.approx(distance)
    assert output_distance(0 * a, 0 * a) == 0.0


def test_outputs_of_two_shapes_are_refused():
    with pytest.raises(InputError, match=r"shapes \(2, 3\) and \(2, 4\) cannot be compared"):
        output_distance(np.zeros((2, 3)), np.zeros((2, 4)))
