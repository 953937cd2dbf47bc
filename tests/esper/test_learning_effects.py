"""Decisions that judge what was learned of effects are of episodes that none was learned from."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import InputError
from esper.tamiyo.learning import Decisions, learn_effects
from esper.tamiyo.learning._measured_effects import _by_episode
from esper.tamiyo.policy import Choice


def decisions_of(episode: np.ndarray) -> Decisions:
    # Which decision it is, in place of its graph: that leaves are cut alike shows there.
    rows: Any = np.arange(len(episode))
    return Decisions(
        graph=rows,
        choice=Choice(*(rows for _ in Choice._fields)),
        effect=rows.astype(np.float32),
        own=rows % 2 == 0,
        episode=episode,
    )


@given(st.lists(st.integers(0, 40), min_size=5).filter(lambda own: len(set(own)) >= 5))
def test_each_decision_is_in_one_part_and_each_episode_too(episode):
    found = decisions_of(np.asarray(episode))
    episodes = np.unique(found.episode)
    parts = _by_episode(found, episodes, jax.random.key(len(episode)))
    rows: list[Any] = [part.graph for part in parts]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(episode)))
    held = [set(part.episode.tolist()) for part in parts]
    assert sum(len(own) for own in held) == len(episodes)
    assert [len(own) for own in held] == [
        int(0.6 * len(episodes)),
        int(0.8 * len(episodes)) - int(0.6 * len(episodes)),
        len(episodes) - int(0.8 * len(episodes)),
    ]
    for own, part in zip(rows, parts, strict=True):
        assert all(np.array_equal(own, leaf) for leaf in part.choice)
        assert np.array_equal(found.episode[own], part.episode)


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        (np.arange(49), "effects are learned from 50 decisions or more, got 49"),
        (np.arange(60) % 4, "from decisions of 5 episodes or more, so that some can be held out;"),
    ],
)
def test_too_little_to_learn_from_is_refused(episode, message):
    policy: Any = None
    with pytest.raises(InputError, match=message):
        learn_effects(policy, decisions_of(episode), jax.random.key(0))
