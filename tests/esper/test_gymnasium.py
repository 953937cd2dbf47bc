"""The gym as Gymnasium has environments: its checker's rules, and the same rewards."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper.errors import InputError
from esper.tamiyo.gym import Environment, Offered, gymnasium_env, gymnasium_vector_env
from esper.tamiyo.policy import Choice, Kind

ENV = Environment(
    families=("blobs",), offers=(Offered("low_rank", 2),), depth=1, seeds=1, boundaries=3, steps=2,
    ramp=2, batch=8, examples=16, validation=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def own():
    pytest.importorskip("gymnasium", reason="the extra 'gym' is not installed")
    return gymnasium_env(ENV)


def test_it_keeps_gymnasiums_rules(own):
    from gymnasium.utils.env_checker import check_env

    check_env(own, skip_render_check=True)


def test_an_episode_is_that_of_the_functional_environment(own):
    own.reset(seed=3)
    drawn = int(np.random.Generator(np.random.PCG64(np.random.SeedSequence(3))).integers(2**31))
    state, _ = jax.jit(ENV.reset)(jax.random.key(drawn))
    step = jax.jit(ENV.step)
    for boundary in range(ENV.boundaries):
        action = [Kind.GRAFT if boundary == 1 else Kind.WAIT, 0, 0, 0, 0]
        seen, reward, terminated, truncated, info = own.step(np.array(action))
        state, expected = step(state, Choice(*(jnp.int32(part) for part in action)))
        assert reward == pytest.approx(float(expected.reward), abs=1e-5)
        assert terminated == (boundary == ENV.boundaries - 1) == bool(expected.done)
        assert not truncated
        if not terminated:
            np.testing.assert_allclose(seen["run"], expected.graph.run, atol=1e-5)
    assert info["returned"] == pytest.approx(float(expected.info["returned"]), abs=1e-5)
    with pytest.raises(InputError, match=r"ended after its 3 steps: call reset\(\) before"):
        own.step(np.zeros(5, np.int64))


def test_steps_before_a_reset_and_a_missing_package_are_told(own, monkeypatch):
    with pytest.raises(InputError, match=r"no episode was begun: call reset\(\) before step\(\)"):
        gymnasium_env(ENV).step(np.zeros(5, np.int64))
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(InputError, match=r"gymnasium, which is not installed.*\[gym\]"):
        gymnasium_env(ENV)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([1, 0, 0, -1, 0], "the kernel of an action is from 0 to 0, and -1 was given"),
        ([1, 99, 0, 0, 0], "the node of an action is from 0 to .*, and 99 was given"),
        ([4, 0, 0, 0, 77], "the alpha of an action is from 0 to 4, and 77 was given"),
        ([9, 0, 0, 0, 0], "the kind of an action is from 0 to 4, and 9 was given"),
        ([1, 0, 0, 0], r"whole numbers of the shape \(5,\), .*; got int64 of the shape \(4,\)"),
        ([1.5, 0, 0, 0, 0], "; got float64 of the shape"),
    ],
    ids=str,
)
def test_actions_that_are_not_in_the_space_are_refused_and_change_nothing(own, action, message):
    own.reset(seed=1)
    with pytest.raises(InputError, match=message):
        own.step(np.array(action))
    assert not own.action_space.contains(np.array(action)) or np.array(action).dtype.kind == "f"
    _, reward, *_ = own.step(np.zeros(5, np.int64))
    assert reward == 0.0


def test_many_at_once_are_the_functional_environments_and_begin_anew_together(own):
    pytest.importorskip("gymnasium", reason="the extra 'gym' is not installed")
    from gymnasium.vector import AutoresetMode

    many = gymnasium_vector_env(ENV, 3)
    assert many.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    first, _ = many.reset(seed=3)
    assert many.observation_space.contains(first)
    drawn = int(np.random.Generator(np.random.PCG64(np.random.SeedSequence(3))).integers(2**31))
    state, _ = jax.jit(jax.vmap(ENV.reset))(jax.random.split(jax.random.key(drawn), 3))
    step = jax.jit(jax.vmap(ENV.step))
    for boundary in range(ENV.boundaries + 1):
        action = np.zeros((3, 5), np.int64)
        action[1, 0] = Kind.GRAFT if boundary == 1 else Kind.WAIT
        assert many.action_space.contains(action)
        seen, reward, terminated, truncated, info = many.step(action)
        state, expected = step(state, Choice(*jnp.asarray(action, jnp.int32).T))
        np.testing.assert_allclose(reward, expected.reward, atol=1e-5)
        np.testing.assert_array_equal(terminated, expected.done)
        np.testing.assert_allclose(seen["run"], expected.graph.run, atol=1e-5)
        assert many.observation_space.contains(seen)
        assert not truncated.any()
        ended = boundary == ENV.boundaries - 1
        assert ("final_obs" in info) == ended
        np.testing.assert_allclose(info["loss"], expected.info["loss"], atol=1e-5)
        assert info["_loss"].all()
        if ended:
            # One observation for each, as Gymnasium's own have them.
            assert info["final_obs"].shape == (3,)
            assert all(own.observation_space.contains(last) for last in info["final_obs"])
            assert not np.array_equal(info["final_obs"][0]["run"], seen["run"][0])
            np.testing.assert_array_equal(info["final_info"]["loss"], info["loss"])
    with pytest.raises(InputError, match=r"kernel of an action is from 0 to 0, and 2 was given"):
        many.step(np.array([[0, 0, 0, 0, 0], [1, 0, 0, 2, 0], [0, 0, 0, 0, 0]]))
    with pytest.raises(InputError, match=r"of the shape \(3, 5\), each a kind, .*the shape \(5,\)"):
        many.step(np.zeros(5, np.int64))
    with pytest.raises(InputError, match="count of environments"):
        gymnasium_vector_env(ENV, 0)
    with pytest.raises(InputError, match=r"call reset\(\) before step\(\)"):
        gymnasium_vector_env(ENV, 1).step(np.zeros((1, 5), np.int64))
