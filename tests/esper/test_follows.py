"""How much of a gradient maps of a layer's input follow: laws, and cases that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper.tamiyo import Probe, probe_follows
from esper.tamiyo.graph import MOST_ROWS, follows
from esper.tamiyo.gym import Environment
from esper.tamiyo.policy import Choice, Kind
from esper_functional import difference


def drawn(rows=512, inputs=3, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, inputs)).astype(np.float32)


def bent(x):
    return np.abs(x[:, :1]) - np.abs(x).mean()


@pytest.mark.parametrize("inputs", [1, 3, 16, 40])
def test_numpy_and_jax_find_the_same(inputs):
    x = drawn(inputs=inputs)
    g = np.concatenate([bent(x), 0.3 * x[:, -1:] + 0.1 * drawn(inputs=1, seed=1)], axis=1)
    by_hand = follows(x.astype(np.float64), g.astype(np.float64), np)
    assert by_hand.dtype == np.float32
    assert by_hand.shape == (2,)
    compiled = jax.jit(lambda x, g: follows(x, g, jnp))
    assert difference(np.asarray(compiled(x, g)), by_hand).within
    many = jax.vmap(lambda x, g: follows(x, g, jnp))(np.stack([x, -x]), np.stack([g, g]))
    assert difference(np.asarray(many[0]), by_hand).within


def test_what_can_be_followed_and_what_cannot():
    x = drawn(inputs=2)
    linear, any_map = follows(x, 2.0 * x[:, :1] - 0.5, np)
    assert linear > 0.99
    assert any_map > 0.99
    linear, any_map = follows(x, bent(x), np)
    assert linear < 0.1
    assert any_map > 0.8
    # Labels by lot: what fits one half says nothing of the other.
    lots = np.random.default_rng(5).choice([-0.5, 0.5], (512, 1)).astype(np.float32)
    assert follows(x, lots, np).max() < 0.02


@pytest.mark.parametrize("xp", [np, jnp])
def test_it_has_no_units_and_no_use_for_inputs_that_say_nothing(xp):
    x, g = drawn(inputs=2), bent(drawn(inputs=2))
    found = np.asarray(follows(x, g, xp))
    scaled = np.asarray(follows(x * np.float32([100.0, 0.01]), g * np.float32(1e-3), xp))
    assert difference(scaled, found).within
    assert (np.abs(found) <= 1.0).all()
    assert np.asarray(follows(x, 0.0 * g, xp)).tolist() == [0.0, 0.0]
    assert np.isfinite(np.asarray(follows(0.0 * x, g, xp))).all()
    assert np.isnan(np.asarray(follows(x, np.where(g == g[0], np.nan, g), xp))).all()


def probed(x, g):
    return Probe(x, np.zeros_like(g), g, 1.0)


def test_rows_are_positions_of_sequences_and_examples_of_all_else():
    x, g = drawn(96, 5), drawn(96, 2, seed=1)
    flat = probe_follows(probed(x, g), "linear")
    assert np.array_equal(flat, follows(x, g, np))
    folded = probed(x.reshape(24, 4, 5), g.reshape(24, 4, 2))
    assert np.array_equal(probe_follows(folded, "linear"), flat)
    by_example = follows(x.reshape(24, -1), g.reshape(24, -1), np)
    assert np.array_equal(probe_follows(folded, "convolution"), by_example)
    pooled = probed(x.reshape(24, 4, 5), g.reshape(24, 8))
    assert np.array_equal(probe_follows(pooled, "other"), by_example)
    long = probed(drawn(3 * MOST_ROWS), drawn(3 * MOST_ROWS, 2, seed=1))
    rows = np.linspace(0, 3 * MOST_ROWS - 1, MOST_ROWS).astype(int)
    few = probed(long.inputs[rows], long.gradients[rows])
    assert np.array_equal(probe_follows(long, "linear"), probe_follows(few, "linear"))


@pytest.mark.parametrize("x", [np.arange(8)[:, None], drawn(3), drawn(8, 0)])
def test_of_tokens_and_of_next_to_nothing_nothing_is_known(x):
    assert np.isnan(probe_follows(probed(x, drawn(len(x), 2)), "other")).all()


def test_the_gym_measures_what_a_probe_of_its_network_has():
    """With a kernel that runs: its part is in what comes out, and the gradient goes around it."""
    env = Environment(
        families=("ring",), depth=2, seeds=1, boundaries=3, steps=3, ramp=2, batch=8, examples=64,
        validation=16,
    )  # fmt: skip
    state, _ = jax.jit(env.reset)(jax.random.key(3))
    choice = Choice(*(jnp.asarray(own) for own in (Kind.GRAFT, 0, 0, 1, 0)))
    state, _ = jax.jit(env.step)(state, choice)
    state, step = jax.jit(env.step)(state, Choice(*[jnp.asarray(0)] * 5))
    growing, data, shape = state.growing, state.episode.data, state.episode.shape
    trained, world = growing.trained, env.world

    # What is added to the bias is added to what the layer gives, of one example alone.
    @jax.jit
    @jax.vmap
    def gradient(x, y):
        def loss_of(bias):
            host = {**trained.host, "layers.0": {**trained.host["layers.0"], "bias": bias}}
            logits, _ = world.forward(
                host, trained.kernels, growing.code, growing.seeds, x[None], shape.depth
            )
            return -jax.nn.log_softmax(logits)[0, y]

        return jax.grad(loss_of)(trained.host["layers.0"]["bias"])

    found = np.asarray(state.readings.follows)
    by_hand = follows(data.x, gradient(data.x, data.y), jnp)
    assert difference(found[0], np.asarray(by_hand)).within
    assert np.isnan(found[env.depth :]).all()
    assert np.isfinite(np.asarray(step.graph.nodes)).all()
