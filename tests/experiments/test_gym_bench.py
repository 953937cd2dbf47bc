"""The gym's benchmark measures what it says, at its smallest."""

import jax

from experiments.bench._paired import Sampling
from experiments.bench.gym import Settings, measure


def test_mapped_environments_are_the_looped_ones_and_both_are_timed():
    settings = Settings(
        sampling=Sampling(rounds=2, builds=1), counts=(3,), looped=2, steps=1, depth=1, offers=1
    )
    with jax.numpy_dtype_promotion("standard"):
        results = measure(settings)
    assert [check.found for check in results.checks] == ["yes"]
    extra = results.rows[0].extra
    assert extra["loop steps/s"] > 0
    assert extra["vmap steps/s"] > 0
