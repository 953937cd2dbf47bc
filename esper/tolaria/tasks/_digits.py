"""Handwritten digits."""

import numpy as np

from esper.tolaria.tasks._check import make_task
from esper.tolaria.tasks._mlp_host import MLPHost
from esper.tolaria.tasks._task import Task


def digits() -> Task:
    """Scikit-learn's 1,797 handwritten digits of 8×8, one fixed split: 997, 400 and 400.

    From the test part of Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI,
    1998. Examples `[64]` in 0 to 1, 10 classes.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (bunch.data / 16.0).astype(np.float32)  # pyright: ignore[reportAttributeAccessIssue]
    y = bunch.target.astype(np.int32)  # pyright: ignore[reportAttributeAccessIssue]
    order = np.random.default_rng(20_260).permutation(len(x))
    train, validation, test = order[:997], order[997:1397], order[1397:]
    return make_task(
        "digits",
        train=(x[train], y[train]),
        validation=(x[validation], y[validation]),
        test=(x[test], y[test]),
        host=MLPHost((64, 8, 10)),
    )
