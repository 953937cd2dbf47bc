"""Growth on the task that needs it, as the demonstration does it, for one seed."""

import pytest

from esper.nissa import read_run
from esper.tolaria import make_config, replay_run, start_run


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_spirals_are_learnt_by_growing_and_not_without(tmp_path, backend):
    common = {"task": "spirals", "backend": backend, "library": tmp_path / "library"}
    start_run(tmp_path / "small", make_config(**common, controller="none"))
    start_run(tmp_path / "grown", make_config(**common))
    small, grown = read_run(tmp_path / "small"), read_run(tmp_path / "grown")
    assert small.accuracy < 0.7
    assert grown.accuracy >= 0.97
    assert grown.metrics[-1]["step"] == small.metrics[-1]["step"] == 2_500
    kinds = [event["kind"] for event in grown.events]
    assert kinds.count("load") == kinds.count("activate") >= 1
    assert "fossilize" in kinds
    assert set(grown.regions) == {"before", "after"}
    assert replay_run(tmp_path / "grown").step == 2_500
