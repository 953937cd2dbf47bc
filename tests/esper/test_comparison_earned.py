"""What a run earned, by hand."""

import dataclasses
import math

import pytest

from esper.tolaria.comparison import Curve
from esper.tolaria.comparison._earned import earned
from tests.esper.comparison_outcomes import SETTING

HOST = dataclasses.replace(SETTING, host_parameters=100, host_step_flops=10.0)


def curve(*losses, flops):
    steps = tuple(range(0, 100 * len(losses), 100))
    return Curve(steps=steps, flops=flops, test_accuracy=losses, test_loss=losses)


def test_a_host_that_learned_nothing_earns_what_costs_alone_come_to():
    still = curve(1.0, 1.0, flops=(0.0, 1_000.0))
    assert earned(HOST, still, 100) == pytest.approx(8.0 / 2 + 1.0 / 2 + 0.5 / 2)


def test_growth_pays_by_its_loss_and_costs_by_its_size_and_by_how_long_it_is_large():
    grown = curve(1.0, 0.5, 0.25, flops=(0.0, 1_000.0, 5_000.0))
    expected = 8.0 / 1.25 + 1.0 / (1 + 4.0) + 0.5 / (1 + 3.0) - 0.1 * (0.0 + math.log2(4.0)) / 2
    assert earned(HOST, grown, 300) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("setting", "own", "parameters"),
    [
        (dataclasses.replace(HOST, host_step_flops=None), curve(1.0, 0.5, flops=(0.0, 1.0)), 100),
        (HOST, curve(1.0, 0.5, flops=(0.0, None)), 100),
        (HOST, curve(1.0, None, flops=(0.0, 1.0)), 100),
        (HOST, curve(1.0, flops=(0.0,)), 100),
        (HOST, curve(1.0, 0.5, flops=(0.0, 1.0)), None),
    ],
)
def test_what_was_not_recorded_earns_nothing_that_is_known(setting, own, parameters):
    assert earned(setting, own, parameters) is None
