import json
import math

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from esper.errors import InputError
from esper.tamiyo import (
    TRIGGERS,
    GradientBottleneckTrigger,
    HeldOutGainTrigger,
    PlateauTrigger,
    Probe,
    RandomTrigger,
    ScheduleTrigger,
    gradient_scores,
    make_trigger,
)
from esper_functional import init_seeds
from tests.esper.controlled import A, hold, observe


def fired(trigger, observations):
    return [o.step for o in observations if trigger.cue(o) is not None]


# Laws


def probe_of(layer, rng):
    x, g = rng.normal(size=(2, 6, 3)).astype(np.float32)
    return Probe(x, g, g, 1.0)


@pytest.mark.parametrize("kind", sorted(TRIGGERS))
@given(
    losses=st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2) | st.just(math.nan)), min_size=4),
    moves=st.lists(st.sampled_from(["on", "back", "reset"]), min_size=4, max_size=24),
    at=st.integers(0, 23),
)
@example(losses=[(1.0, 1.0)] * 4, moves=["on"] * 8, at=3)
def test_a_trigger_restored_goes_on_as_it_would_have(kind, losses, moves, at):
    straight, other = make_trigger(kind), make_trigger(kind)
    step = 0
    for index, move in enumerate(moves):
        if move == "reset":
            straight.reset()
            other.reset()
        step = max(step - 100, 0) if move == "back" else step + 50
        train, validation = losses[index % len(losses)]
        cues = []
        for trigger in (straight, other):
            rng = np.random.default_rng(step)
            seen = observe(step, train, validation, probe=lambda layer, r=rng: probe_of(layer, r))
            cues.append(trigger.cue(seen))
        assert cues[0] == cues[1]
        if index == at:
            state = json.loads(json.dumps(other.state(), allow_nan=False))
            other = make_trigger(kind)
            other.restore(state)
    assert straight.state() == other.state()


# Plateau


def test_a_plateau_by_hand():
    # Below 0.9 times the best counts: 1.0, 0.8 do; 0.79 and 0.785 are above 0.72.
    trigger = PlateauTrigger(patience=2, min_improvement=0.1)
    losses = [1.0, 0.8, 0.79, 0.785]
    cues = [trigger.cue(observe(50 * i, loss)) for i, loss in enumerate(losses)]
    assert cues[:3] == [None] * 3
    assert cues[3].reason == "training loss 0.785 has not fallen by 10% for 2 boundaries"
    assert (cues[3].layer, cues[3].score) == (None, 2.0)


def test_a_loss_that_is_no_number_is_no_improvement():
    trigger = PlateauTrigger(patience=1)
    assert fired(trigger, [observe(0, math.nan), observe(50, 1.0), observe(100, 0.5)]) == [0]


def test_a_plateau_is_measured_anew_after_a_reset_and_where_the_run_went_back():
    trigger = PlateauTrigger(patience=2)
    assert fired(trigger, [observe(50 * i) for i in range(3)]) == [100]
    trigger.reset()
    assert fired(trigger, [observe(50 * i) for i in range(3, 6)]) == [250]
    # Back to step 100: the loss there is the first of its kind.
    assert fired(trigger, [observe(50 * i) for i in range(2, 5)]) == [200]


# Held-out gain


def test_a_held_out_gain_by_hand():
    # Over two boundaries: (1 - 0.7)/1 = 0.3, (0.8 - 0.65)/0.8 = 0.1875, (0.7 - 0.64)/0.7 = 0.0857.
    trigger = HeldOutGainTrigger(window=2, min_gain=0.1)
    losses = [1.0, 0.8, 0.7, 0.65, 0.64]
    cues = [trigger.cue(observe(50 * i, 1.0, loss)) for i, loss in enumerate(losses)]
    assert cues[:4] == [None] * 4
    assert cues[4].score == pytest.approx(0.06 / 0.7)
    assert "fell by 0.08571 of 0.7 since step 100, less than the gain of 0.1" in cues[4].reason


def test_a_held_out_loss_that_rises_is_said_to():
    trigger = HeldOutGainTrigger(window=1, min_gain=0.0)
    trigger.cue(observe(0, validation=1.0))
    cue = trigger.cue(observe(50, validation=1.5))
    assert "rose by 0.5 of 1 since step 0" in cue.reason


def test_the_training_loss_does_not_concern_the_held_out_gain():
    trigger = HeldOutGainTrigger(window=1, min_gain=0.1)
    falls = [observe(50 * i, 0.5**i, 1.0) for i in range(3)]
    assert fired(trigger, falls) == [50, 100]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite_gives_no_cue(bad):
    trigger = HeldOutGainTrigger(window=1)
    assert fired(trigger, [observe(50 * i, 1.0, v) for i, v in enumerate([1.0, bad, 1.0])]) == []


def test_what_was_taken_back_is_no_part_of_the_window():
    trigger = HeldOutGainTrigger(window=2, min_gain=0.1)
    for step, loss in ((0, 1.0), (50, 0.9), (100, 5.0)):
        trigger.cue(observe(step, 1.0, loss))
    # Step 100 again, with another loss: the gain is from step 0, 0.3.
    assert trigger.cue(observe(100, 1.0, 0.7)) is None
    assert trigger.cue(observe(150, 1.0, 0.69)) is None  # (0.9 - 0.69) / 0.9
    assert trigger.cue(observe(200, 1.0, 0.69)) is not None  # 0.01 / 0.7


# Schedule


def test_a_schedule_by_hand():
    # Due at 100, 300, 500; boundaries every 60 steps meet them at 120, 300 and 540.
    trigger = ScheduleTrigger(first=100, every=200)
    assert fired(trigger, [observe(60 * i) for i in range(11)]) == [120, 300, 540]
    # Back to 240: 300 and 500 are due again, 100 is not.
    assert fired(trigger, [observe(60 * i) for i in range(4, 11)]) == [300, 540]


def test_a_schedule_says_which_time_it_is():
    cue = ScheduleTrigger(first=100, every=200).cue(observe(320))
    assert cue.reason == "step 300 of every 200 from 100"
    assert cue.score == 300.0


@given(
    first=st.integers(0, 300),
    every=st.integers(1, 300),
    steps=st.lists(st.integers(0, 2_000), unique=True).map(sorted),
)
def test_every_time_of_a_schedule_is_met_once_at_the_first_boundary_after_it(first, every, steps):
    due = {next((s for s in steps if s >= t), None) for t in range(first, 2_001, every)}
    trigger = ScheduleTrigger(first=first, every=every)
    assert fired(trigger, [observe(s) for s in steps]) == sorted(due - {None})


# Chance


def test_chance_fires_by_the_observations_generator_alone():
    # The first number of each boundary's generator decides.
    drawn = [float(np.random.default_rng([0, 50 * i]).random()) for i in range(8)]
    expected = [50 * i for i, u in enumerate(drawn) if u < 0.5]
    assert 0 < len(expected) < 8
    assert fired(RandomTrigger(rate=0.5), [observe(50 * i) for i in range(8)]) == expected


@pytest.mark.parametrize(("rate", "times"), [(0.0, 0), (1.0, 10)])
def test_chance_at_its_ends(rate, times):
    assert len(fired(RandomTrigger(rate=rate), [observe(50 * i) for i in range(10)])) == times


# Gradient bottleneck

X = np.eye(2, dtype=np.float32)
PROBES = {
    # M = gᵀ x is diag(3, 1), and diag(4, 0).
    0: Probe(X, X, np.diag([3.0, 1.0]).astype(np.float32), 1.0),
    1: Probe(2.0 * X, X, np.diag([2.0, 0.0]).astype(np.float32), 1.0),
}
BOTH = {0: [A], 1: [A]}


def look(probes, **more):
    return observe(
        0, seeds=more.pop("seeds", init_seeds(2, 2)), candidates=BOTH, probe=probes.__getitem__
    )


def test_a_gradient_bottleneck_by_hand():
    # Squared gradient of the host: 9 + 1 + 16 = 26 over 8 weights, 3.25 for each.
    # One new neuron has 2 + 2 weights: 9/4 = 2.25 and 16/4 = 4 for each.
    assert gradient_scores({0: np.diag([3.0, 1.0]), 1: np.diag([4.0, 0.0])}, 1) == {
        0: pytest.approx(2.25 / 3.25),
        1: pytest.approx(4.0 / 3.25),
    }
    cue = GradientBottleneckTrigger(neurons=1, threshold=1.2).cue(look(PROBES))
    assert cue.layer == 1
    assert cue.score == pytest.approx(4.0 / 3.25)
    assert "1 new neuron in layers.1 would get 1.231 times the squared gradient" in cue.reason
    assert GradientBottleneckTrigger(neurons=1, threshold=1.3).cue(look(PROBES)) is None
    # Two neurons: 10/8 and 16/8, so 0.62 at most.
    assert GradientBottleneckTrigger(neurons=2, threshold=0.7).cue(look(PROBES)) is None


def test_a_layer_without_a_free_seed_is_not_probed():
    full = hold((1, 0), (1, 1), shape=(2, 2))
    trigger = GradientBottleneckTrigger(threshold=0.5)
    cue = trigger.cue(look({0: PROBES[0]}, seeds=full))
    # Alone, layer 0 is its own measure: 2.25 against 10/4.
    assert (cue.layer, cue.score) == (0, pytest.approx(0.9))
    # Not one layer is free: nothing is measured at all.
    assert trigger.cue(observe(0, seeds=hold((0, 0), (0, 1)))) is None


def test_positions_of_a_sequence_are_examples():
    flat = look(PROBES)
    sequence = {
        layer: Probe(p.inputs[None], p.outputs[None], p.gradients[None], p.loss)
        for layer, p in PROBES.items()
    }
    trigger = GradientBottleneckTrigger(threshold=1.0)
    cue = trigger.cue(flat)
    assert cue is not None
    assert trigger.cue(look(sequence)) == cue


def test_a_host_at_rest_gives_no_cue():
    # TINY's residual: what least squares by x leaves of g is uncorrelated with x.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3))
    g = rng.normal(size=(64, 2))
    left = g - x @ np.linalg.lstsq(x, g, rcond=None)[0]
    rest = Probe(x.astype(np.float32), g, left.astype(np.float32), 1.0)
    still = Probe(X, X, np.zeros((2, 2), np.float32), 1.0)
    trigger = GradientBottleneckTrigger(threshold=0.0)
    assert trigger.cue(look({0: rest, 1: still})) is None


def test_gradients_that_are_not_finite_give_no_cue():
    bad = Probe(X, X, np.full((2, 2), np.nan, np.float32), 1.0)
    assert GradientBottleneckTrigger(threshold=0.0).cue(look({0: bad, 1: PROBES[1]})) is None


def test_the_matrix_is_the_gradient_of_a_linear_layers_weights():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
    w = rng.normal(size=(2, 3)).astype(np.float32)

    def loss(out):
        return ((out - y) ** 2).mean()

    out = x @ w.T
    g = np.asarray(jax.grad(loss)(out))
    weights = np.asarray(jax.grad(lambda w: loss(x @ w.T))(w))
    np.testing.assert_allclose(g.T @ x, weights, rtol=1e-5)


@given(
    seed=st.integers(0, 1_000),
    out=st.integers(1, 6),
    size=st.integers(1, 6),
    neurons=st.integers(1, 6),
)
def test_no_directions_get_more_gradient_than_the_singular_vectors(seed, out, size, neurons):
    rng = np.random.default_rng(seed)
    m = rng.normal(size=(out, size))
    (score,) = gradient_scores({0: m}, neurons).values()
    k = min(neurons, out, size)
    # The score times what it was divided by is GradMax's squared gradient norm.
    best = score * k * (size + out) * np.square(m).mean()
    for _ in range(10):
        q, _ = np.linalg.qr(rng.normal(size=(out, k)))
        assert np.square(q.T @ m).sum() <= best * (1 + 1e-9)
    # One layer alone: between an even spectrum and one direction.
    even, one = max(out, size) / (out + size), out * size / (out + size) / k
    assert even * (1 - 1e-9) <= score <= one * (1 + 1e-9)
    assert gradient_scores({0: 1e3 * m}, neurons)[0] == pytest.approx(score)


@pytest.mark.parametrize(
    ("x", "g"),
    [((4, 2), (4, 2, 2)), ((2, 3, 8, 8), (2, 3, 8, 8)), ((4,), (4,)), ((2, 5, 3), (2, 4, 3))],
)
def test_layers_that_are_not_linear_by_their_shapes_are_refused(x, g):
    odd = Probe(np.ones(x, np.float32), np.ones(g, np.float32), np.ones(g, np.float32), 1.0)
    with pytest.raises(InputError, match=r"layers\.0 takes .*choose another trigger"):
        GradientBottleneckTrigger().cue(look({0: odd, 1: PROBES[1]}))


# Making them


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("plateu", {}, r"one of plateau, .* got 'plateu'; did you mean 'plateau'"),
        ("plateau", {"pacience": 2}, r"plateau trigger does not take 'pacience': .*'patience'"),
        ("plateau", {"patience": 0}, r"patience of the plateau trigger .* of at least 1, got 0"),
        ("plateau", {"patience": 1.5}, r"a whole number of at least 1, got 1\.5"),
        ("plateau", {"min_improvement": math.nan}, r"min_improvement .* at most 1, got nan"),
        ("held_out_gain", {"window": True}, r"window .* whole number of at least 1, got True"),
        ("held_out_gain", {"min_gain": 2.0}, r"min_gain .* a finite number of at most 1, got 2"),
        ("schedule", {"every": 0}, r"every of the schedule trigger .* at least 1, got 0"),
        ("schedule", {"first": -1}, r"first of the schedule trigger .* at least 0, got -1"),
        ("random", {"rate": 1.1}, r"rate of the random trigger .* at most 1, got 1\.1"),
        ("gradient_bottleneck", {"neurons": 0}, r"neurons .* at least 1, got 0"),
        ("gradient_bottleneck", {"threshold": -1.0}, r"threshold .* at least 0, got -1"),
    ],
)
def test_what_is_not_known_is_refused(kind, values, message):
    with pytest.raises(InputError, match=message):
        make_trigger(kind, **values)
