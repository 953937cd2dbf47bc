"""The benchmark of trust runs for every blueprint; no time is looked at."""

import pytest

from esper.tezzeret import blueprint_names, resolve
from experiments.bench._paired import Sampling
from experiments.bench.trust import Settings, job_of, measure

SETTINGS = Settings(sampling=Sampling(rounds=1, builds=1), features=8, length=4, children=1)


@pytest.mark.parametrize("name", blueprint_names())
def test_every_blueprint_has_a_signature(name):
    assert resolve(*job_of(name, Settings())).nodes


def test_it_measures_what_it_says():
    results = measure(SETTINGS, "attention")
    names = [name for name in blueprint_names() if "attention" in name]
    assert "attention" in names
    assert [figure.name for figure in results.figures] == [
        f"{name}: {what}"
        for name in names
        for what in ("before the child", "whole scan", "is trusted")
    ]
    verdicts = measure(SETTINGS, "residual_mlp: verify")
    assert [check.met for check in verdicts.checks] == [True]
    assert [figure.unit for figure in verdicts.figures] == ["s", "ms"]
    assert all(figure.value > 0 for figure in (*results.figures, *verdicts.figures))
