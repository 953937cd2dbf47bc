"""The parity of some bits among others."""

import numpy as np

from esper.errors import InputError
from esper.tolaria.tasks._check import make_task
from esper.tolaria.tasks._mlp_host import MLPHost
from esper.tolaria.tasks._task import Task

_LARGEST = 12
DISTRACTORS = 6
"""Bits beside the relevant ones."""
_MOST = 4_096
"""Examples in all parts together."""


def parity(bits: int) -> Task:
    """`xor-N`: the parity of N bits among 6 others that mean nothing.

    Bits are -1 or 1; which N of the N + 6 count is drawn for each N. No input is in two
    parts: of all 2^(N+6), or of 4,096 of them drawn without replacement where there are
    more, half train, a quarter each validate and test. Parity is what no network without a
    hidden layer can tell (Minsky and Papert, Perceptrons, 1969). Examples `[N + 6]`, 2 classes.

    Args:
        bits: that count, N, 2 to 12.

    Raises:
        InputError: for another number.
    """
    if not 2 <= bits <= _LARGEST:
        raise InputError(f"xor-{bits} is not a task: expected xor-2 to xor-{_LARGEST}")
    width = bits + DISTRACTORS
    random = np.random.default_rng([20_261, bits])
    counting = random.permutation(width)[:bits]
    codes = random.permutation(2**width)[:_MOST]
    ones = (codes[:, None] >> np.arange(width)) & 1
    x = (2 * ones - 1).astype(np.float32)
    y = (ones[:, counting].sum(axis=1) % 2).astype(np.int32)
    half, rest = len(x) // 2, len(x) // 4
    validation, test = slice(half, half + rest), slice(half + rest, None)
    return make_task(
        f"xor-{bits}",
        train=(x[:half], y[:half]),
        validation=(x[validation], y[validation]),
        test=(x[test], y[test]),
        host=MLPHost((width, bits - 1, 2)),
    )
