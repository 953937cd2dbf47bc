import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from esper.nissa import half_width
from esper_functional import difference

values = st.lists(st.floats(-100, 100), min_size=2, max_size=9).map(np.array)


@given(values)
def test_the_interval_is_that_of_the_t_distribution(sample):
    spread = float(half_width(sample))
    if sample.std() > 1e-6:
        low, high = stats.t.interval(
            0.95, len(sample) - 1, loc=sample.mean(), scale=stats.sem(sample)
        )
        assert difference(np.array([spread]), np.array([(high - low) / 2]), "float32").within
    else:
        assert spread < 1e-4


def test_one_value_has_no_interval():
    assert half_width(np.array([3.0])) == 0.0
