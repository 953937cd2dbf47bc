"""The jax trainee keeps the laws of trainees."""

import pytest

from esper.tolaria import load_task
from esper.tolaria._jax_trainee import JaxTrainee
from tests.esper.trainee_laws import LAWS


def make(**options):
    given = {"seed": 0, "seeds_per_layer": 4, "blend": "residual", **options}
    return JaxTrainee(load_task("spirals"), **given)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_jax_keeps_the_law(law, artifact):
    law(make, artifact)
