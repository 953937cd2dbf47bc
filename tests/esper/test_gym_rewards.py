"""What must not pay in the gym: none of it earns more than waiting, which earns nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper.nissa import half_width
from esper.tamiyo.gym import Environment, Offered
from esper.tamiyo.gym._controlled import play
from esper.tamiyo.policy import Choice, Kind

EPISODES = 24
ENV = Environment(
    families=("blobs", "noise"), offers=(Offered("bottleneck", 4),), depth=1, seeds=1,
    widths=(3, 8), boundaries=8, steps=10, ramp=10, batch=16, examples=128, validation=64,
)  # fmt: skip


def chosen(kind, alpha=0):
    count = EPISODES * len(ENV.families)
    return Choice(*(jnp.full(count, own, jnp.int32) for own in (kind, 0, 0, 0, alpha)))


def grafts_and_drops(boundary, _):
    return [chosen(Kind.GRAFT if boundary % 2 else Kind.UNLOAD)] if boundary < 7 else [
        chosen(Kind.UNLOAD)
    ]  # fmt: skip


def idles(boundary, _):
    return [chosen(Kind.GRAFT), chosen(Kind.RETARGET, 0)] if boundary == 1 else []


def polishes(boundary, _):
    if boundary == 1:
        return [chosen(Kind.GRAFT)]
    return [chosen(Kind.RETARGET, (1, 4)[boundary % 2])]


def grows_late(boundary, _):
    return [chosen(Kind.GRAFT)] if boundary == 5 else []


@pytest.mark.parametrize("trick", [grafts_and_drops, idles, polishes, grows_late])
def test_a_trick_earns_less_than_waiting(trick):
    """In tasks that need no growth, or give none a chance; means over episodes, with intervals."""
    played = play(ENV, jax.random.key(0), EPISODES, trick, each_family=True)
    returned = played.returned.astype(np.float64)
    assert played.grafts.all()
    assert returned.mean() + half_width(returned) < 0.0


def test_an_idle_seed_costs_what_it_is_in_every_episode():
    """At alpha 0 the network is its twin, so nothing is left but what the kernel costs."""
    played = play(ENV, jax.random.key(1), EPISODES, idles, each_family=True)
    np.testing.assert_allclose(played.loss, played.twin_loss, rtol=1e-5)
    assert (played.flops > 1.0).all()
    assert (played.returned < -0.05).all()


def test_what_was_dropped_was_not_free():
    """Potentials come back, up to what training made of the host meanwhile; the rent does not."""
    played = play(ENV, jax.random.key(2), EPISODES, grafts_and_drops, each_family=True)
    np.testing.assert_array_equal(played.flops, 1.0)
    gained = 8.0 / (1.0 + played.loss / played.twin_loss) - 4.0
    assert np.corrcoef(gained, played.returned)[0, 1] > 0.5
    assert (played.returned - gained).mean() < 0.0
