"""What a change earns: the table of components, its laws, and what must earn nothing."""

import dataclasses
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import InputError
from esper.tamiyo import Cost
from esper.tolaria.worth import (
    DEFAULT_WEIGHTS,
    REWARD_COMPONENTS,
    Measurements,
    components_table,
    measure,
    output_distance,
    reference,
    reward,
)
from tests.esper.worth_networks import Additive

LOWER_IS_BETTER = {
    "loss": ["accuracy"],
    "flops": ["speed"],
    "memory": ["memory"],
    "parameters": ["innovation"],
    "loss_spread": ["stability"],
    "rollbacks": ["stability", "safety"],
    "faults": ["safety"],
    "vetoes": ["safety"],
    "worth_spread": ["consistency"],
    "worth_spread_of_seeds": ["consistency"],
}
HIGHER_IS_BETTER = {"novelty": ["innovation"], "worth": ["innovation", "consistency"]}
COUNTS = ("rollbacks", "faults", "vetoes")

amounts = st.floats(0, 100)
measured = st.builds(
    Measurements,
    loss=amounts, flops=amounts, latency=amounts, memory=amounts,
    parameters=st.floats(1, 100), loss_spread=amounts,
    **{name: st.integers(0, 50).map(float) for name in COUNTS},
    novelty=st.floats(0, 1), worth=st.floats(-10, 10), worth_spread=amounts,
    worth_spread_of_seeds=amounts,
)  # fmt: skip


def earned(before, after, **options):
    return {name: float(v) for name, v in reward(before, after, **options).components.items()}


def test_there_are_the_seven_components_and_one_table_of_them():
    names = ["accuracy", "speed", "memory", "stability", "safety", "innovation", "consistency"]
    assert list(REWARD_COMPONENTS) == names
    assert dict(DEFAULT_WEIGHTS) == dict.fromkeys(names, 1.0)
    header, rule, *rows = components_table().splitlines()
    assert header == "| name | formula | unit | range | sign | source |"
    assert set(rule) == {"|", "-", " "}
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == names
    for row, component in zip(rows, REWARD_COMPONENTS.values(), strict=True):
        assert f"`{component.formula}`" in row
        assert row.count(" | ") == 5


@given(measured, measured, st.sampled_from(["flops", "latency"]))
def test_what_the_table_says_is_what_is_computed(before, after, speed):
    # The formulas are expressions of Python: here they are evaluated as they are printed.
    def said(formula, m):
        counted, _, timed = formula.partition(", in reports ")
        text = timed if timed and speed == "latency" else counted
        return eval(text, {"__builtins__": {"min": min, "max": max}}, m._asdict())

    found = earned(before, after, speed=speed)
    for name, component in REWARD_COMPONENTS.items():
        expected = said(component.formula, after) - said(component.formula, before)
        assert found[name] == pytest.approx(expected, abs=1e-9), name


@given(measured)
def test_nothing_changed_earns_nothing(m):
    assert set(earned(m, m).values()) == {0.0}


@given(measured, measured)
def test_components_are_bounded_and_antisymmetric(before, after):
    there, back = reward(before, after), reward(after, before)
    for name, value in there.components.items():
        assert -1.0 <= value <= 1.0
        assert value == -back.components[name]
    assert -1.0 <= there.total <= 1.0
    assert there.total == pytest.approx(np.mean(list(there.components.values())))


@given(measured, measured, st.data())
def test_components_are_monotone_in_each_measurement(before, after, data):
    for fields, sign in ((LOWER_IS_BETTER, -1), (HIGHER_IS_BETTER, 1)):
        for field, names in fields.items():
            more = after._replace(**{field: getattr(after, field) + data.draw(st.floats(0, 9))})
            first, second = earned(before, after), earned(before, more)
            for name in REWARD_COMPONENTS:
                if name in names:
                    assert sign * (second[name] - first[name]) >= -1e-12, (field, name)
                else:
                    assert second[name] == first[name], (field, name)


@given(st.lists(measured, min_size=2, max_size=5))
def test_rewards_of_many_steps_are_those_of_one(path):
    steps = [reward(a, b) for a, b in pairwise(path)]
    whole = reward(path[0], path[-1])
    for name, value in whole.components.items():
        assert sum(s.components[name] for s in steps) == pytest.approx(value, abs=1e-9)
    # So what comes back to where it was has earned nothing, in however many steps.
    loop = [reward(a, b).total for a, b in zip(path, [*path[1:], path[0]], strict=True)]
    assert sum(loop) == pytest.approx(0.0, abs=1e-9)


def test_speed_is_counted_in_decisions_and_measured_in_reports_and_never_both():
    before, slow = Measurements(), Measurements(latency=3.0)
    assert earned(before, slow)["speed"] == 0.0
    assert earned(before, slow, speed="latency")["speed"] == pytest.approx(1 / 4 - 1 / 2)
    heavy = Measurements(flops=3.0)
    assert earned(before, heavy)["speed"] == pytest.approx(1 / 4 - 1 / 2)
    assert earned(before, heavy, speed="latency")["speed"] == 0.0
    with pytest.raises(InputError, match="`speed` must be 'flops' or 'latency', got 'both'"):
        reward(before, heavy, speed="both")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("field", Measurements._fields)
def test_what_is_not_finite_is_the_worst_there_is(field, bad):
    good = Measurements(worth=1.0, novelty=0.5)
    speed = "latency" if field == "latency" else "flops"
    there = earned(good, good._replace(**{field: bad}), speed=speed)
    assert all(np.isfinite(list(there.values())))
    touched = {**LOWER_IS_BETTER, **HIGHER_IS_BETTER, "latency": ["speed"]}[field]
    for name in REWARD_COMPONENTS:
        assert there[name] < 0 if name in touched else there[name] == 0


def test_weights_choose_and_are_checked():
    before, after = Measurements(), Measurements(loss=0.5, memory=3.0)
    assert reward(before, after, {"accuracy": 2.0}).total == pytest.approx(1 / 1.5 - 1 / 2)
    found = reward(before, after, {"accuracy": 3.0, "memory": 1.0})
    assert found.total == pytest.approx(0.75 * (1 / 1.5 - 0.5) + 0.25 * (0.25 - 0.5))
    with pytest.raises(InputError, match="unknown reward component 'acuracy': expected some of"):
        reward(before, after, {"acuracy": 1.0})
    for weights in ({"memory": -1.0}, {"memory": np.nan}, {"memory": 0.0}, {}):
        with pytest.raises(InputError, match="must be finite, not negative, and not all zero"):
            reward(before, after, weights)


def test_a_policy_may_be_trained_on_it_under_vmap_and_grad():
    random = np.random.default_rng(0)
    before, after = (
        Measurements(*random.uniform(1, 3, (len(Measurements._fields), 6)).astype(np.float32))
        for _ in range(2)
    )
    many = jax.jit(jax.vmap(lambda b, a: reward(b, a, {"accuracy": 1.0, "innovation": 2.0})))
    found = many(jax.tree.map(jnp.asarray, before), jax.tree.map(jnp.asarray, after))
    assert found.total.dtype == jnp.float32
    for i in range(6):
        one = reward(
            Measurements(*(v[i] for v in before)), Measurements(*(v[i] for v in after)),
            {"accuracy": 1.0, "innovation": 2.0},
        )  # fmt: skip
        assert float(found.total[i]) == pytest.approx(float(one.total), abs=1e-6)
        for name, value in one.components.items():
            assert float(found.components[name][i]) == pytest.approx(float(value), abs=1e-6)
    # As arrays of numpy it takes all of them at once, too.
    whole = reward(before, after, {"accuracy": 1.0, "innovation": 2.0})
    np.testing.assert_allclose(np.asarray(found.total), whole.total, atol=1e-6)
    slope = jax.grad(lambda loss: reward(Measurements(), Measurements(loss=loss)).total)
    assert float(slope(jnp.float32(1.0))) == pytest.approx(-1 / 4 / 7)


# --- what must earn nothing ---------------------------------------------------------------------


def grafted(kernels, alphas=None, seed=0):
    """A network, its bare host as a reference, and what is measured with and without kernels."""
    network = Additive(kernels, alphas=alphas, seed=seed)
    host = Additive(np.zeros((0, 3)), seed=seed)
    start = reference(host)
    places = [(0, i) for i in range(len(kernels))]
    own, other = network.predict(network.x), network.predict(network.x, places)
    without = measure(
        network, start, without=places, cost=host.cost(), memory=start.memory,
        outputs=other, outputs_of_host=other,
    )  # fmt: skip
    return without, measure(network, start, outputs=own, outputs_of_host=other)


def test_a_kernel_that_helps_earns_something():
    without, with_it = grafted([[0.5, 1.5, 2.5]])
    there = earned(without, with_it)
    assert there["accuracy"] > 0.1
    assert there["innovation"] > 0.1
    assert there["consistency"] > 0.1
    assert there["speed"] < 0
    assert there["memory"] < 0
    assert there["stability"] == there["safety"] == 0.0
    assert reward(without, with_it).total > 0


def test_measurements_of_the_bare_host_are_one_and_nothing():
    host = Additive(np.zeros((0, 3)))
    found = measure(host, reference(host), parts=1)
    assert found._replace(loss=1.0) == Measurements()
    assert found.loss == pytest.approx(1.0)


def test_an_idle_seed_earns_nothing():
    without, with_it = grafted([[0.0, 0.0, 0.0]])
    there = earned(without, with_it)
    assert there["accuracy"] == there["innovation"] == there["consistency"] == 0.0
    assert reward(without, with_it).total < 0  # what it costs is all there is


def test_a_cosmetic_alpha_earns_nothing():
    # Alpha of a kernel that computes nothing goes up and down; and that of one that has been told
    # to be at 0.
    for kernels, alphas in (([[0.0, 0.0, 0.0]], [0.2, 1.0]), ([[1.0, 1.0, 1.0]], [0.0, 0.0])):
        (_, low), (_, high) = (grafted(kernels, [a]) for a in alphas)
        assert reward(low, high).total == 0.0
    # Alpha of one that does something, back where it was.
    path = [grafted([[0.1, 0.5, 1.0]], [a])[1] for a in (0.2, 0.5, 0.9, 0.4, 0.2)]
    assert sum(reward(a, b).total for a, b in pairwise(path)) == pytest.approx(0)


def test_graft_and_drop_earns_nothing_and_incidents_are_not_earned_back():
    without, with_it = grafted([[0.5, 1.5, 2.5]])
    there, back = reward(without, with_it), reward(with_it, without)
    assert there.total + back.total == 0.0
    # Nor does a network that was taken back once earn it by behaving from then on.
    fallen = without._replace(rollbacks=1.0, faults=3.0)
    assert reward(without, fallen).total + reward(fallen, fallen).total < 0


def test_noise_that_is_new_but_pays_nothing_is_no_innovation():
    without, with_it = grafted([[-1.0, 1.0, -2.0]])
    assert with_it.novelty > 0.2
    assert with_it.worth < 0
    assert earned(without, with_it)["innovation"] == 0.0
    assert earned(without, with_it)["accuracy"] < 0


def test_many_parameters_for_the_same_behaviour_are_less_of_an_innovation():
    _, small = grafted([[0.5, 1.5, 2.5]])
    _, large = grafted([[0.5, 1.5, 2.5], [0, 0, 0], [0, 0, 0]])
    assert (small.worth, small.novelty) == (large.worth, large.novelty)
    there = earned(small, large)
    assert there["innovation"] < 0
    assert there["accuracy"] == there["consistency"] == 0.0


def test_worth_that_differs_between_data_is_less_consistent():
    steady = Measurements(worth=0.5, worth_spread=0.01)
    assert earned(steady, steady._replace(worth_spread=0.5))["consistency"] < -0.3
    assert earned(steady, steady._replace(worth_spread_of_seeds=0.5))["consistency"] < -0.3
    # A trifle, however steady, is not consistent worth.
    trifle = Measurements(worth=1e-4)
    assert earned(Measurements(), trifle)["consistency"] < 0.01


# --- measuring ----------------------------------------------------------------------------------


def test_what_is_measured_is_in_units_of_the_host():
    network = Additive([[0.5, 1.5, 2.5]], alphas=[1.0])
    start = reference(Additive(np.zeros((0, 3))), latency=50.0)
    losses = network.losses_without("validation", [(), [(0, 0)]], parts=4).astype(np.float64)
    own, other = network.predict(network.x), network.predict(network.x, [(0, 0)])
    found = measure(
        network, start, latency=75.0, outputs=own, outputs_of_host=other,
        train_losses=[1.0, 2.0, 3.0], rollbacks=1, faults=2, vetoes=3,
        worth_spread_of_seeds=0.25, parts=4,
    )  # fmt: skip
    assert found.loss == pytest.approx(losses[0].mean() / start.loss)
    assert (found.flops, found.latency, found.parameters) == (2.0, 1.5, 2.0)
    assert found.memory == 4.0  # kernels have two moments here, and the host has none
    assert found.loss_spread == pytest.approx(np.std([1, 2, 3]) / 2)
    assert (found.rollbacks, found.faults, found.vetoes) == (1.0, 2.0, 3.0)
    assert found.novelty == output_distance(own, other)
    worth = (losses[1] - losses[0]) / start.loss
    assert found.worth == pytest.approx(worth.mean())
    assert found.worth_spread == pytest.approx(worth.std(ddof=1))
    assert found.worth_spread_of_seeds == 0.25


def test_a_network_that_diverged_is_measured_and_earns_the_worst():
    network = Additive([[0.5, 1.5, 2.5]])
    start = reference(Additive(np.zeros((0, 3))))
    before = measure(network, start)
    network.y = network.y * np.inf
    after = measure(network, start, train_losses=[1.0, np.inf, 2.0])
    there = earned(before, after)
    assert there["accuracy"] == pytest.approx(-1 / (1 + before.loss))
    assert there["stability"] == -1.0
    assert there["consistency"] < 0


def test_a_reference_is_of_a_bare_host_with_a_loss():
    with pytest.raises(InputError, match=r"kernels run at \(0, 0\): take it before the first"):
        reference(Additive([[1, 0, 0]]))
    perfect = Additive(np.zeros((0, 3)))
    perfect.y = perfect.predict(perfect.x)
    with pytest.raises(InputError, match=r"validation loss is 0.0.*finite and greater than 0"):
        reference(perfect)
    perfect.y = perfect.y * np.nan
    with pytest.raises(InputError, match=r"validation loss is nan"):
        reference(perfect)


def test_a_latency_needs_one_to_be_divided_by():
    host = Additive(np.zeros((0, 3)))
    start = reference(host)
    assert (start.cost, start.memory, start.latency) == (Cost(3, 6.0), 24, None)
    assert dataclasses.astuple(reference(host, memory=72, latency=5.0))[2:] == (72, 5.0)
    with pytest.raises(InputError, match=re.escape("the reference has none: give `reference`")):
        measure(host, start, latency=3.0)
