"""Along which curve alpha runs from one value to another.

A curve is a table of 4,097 values, made once by numpy: a cosine or an exponential
computed by two libraries would differ in the last bit, and so would the digests of
states that both of them advance.
"""

import difflib
from enum import IntEnum

import numpy as np

from esper_functional._errors import KasminaException


class RampShape(IntEnum):
    """The curve of a ramp; stored as uint8."""

    LINEAR = 0
    """The same change in every step."""
    COSINE = 1
    """(1 - cos πt) / 2: slow at both ends (Loshchilov and Hutter, 2017, read upwards)."""
    SIGMOID = 2
    """The logistic curve from t = -6 to 6, stretched to begin at 0 and end at 1: steeper in the
    middle than the cosine."""


RESOLUTION = 4_096
"""Values of a curve per ramp; longer ramps hold each for several steps."""

SCALE = 65_536.0
"""What the curves' values are multiples of: dividing by a power of two is exact, so a compiler
may contract what follows without changing a bit."""


def _curves() -> np.ndarray:
    t = np.linspace(0.0, 1.0, RESOLUTION + 1)
    logistic = 1.0 / (1.0 + np.exp(-12.0 * (t - 0.5)))
    curves = [t, (1.0 - np.cos(np.pi * t)) / 2.0, (logistic - logistic[0]) / np.ptp(logistic)]
    # The very ends are exact whatever the exponential's last bit.
    return np.clip(np.stack(curves) * SCALE, 0.0, SCALE).astype(np.float32).reshape(-1)


CURVES = _curves()
"""f32 `[shapes * (RESOLUTION + 1)]`."""


def ramp_shape(shape: RampShape | int | str) -> RampShape:
    """A shape by its name, such as "cosine", or its number.

    Raises:
        KasminaException: for an unknown one.
    """
    names = [known.name.lower() for known in RampShape]
    if isinstance(shape, str) and shape in names:
        return RampShape[shape.upper()]
    if not isinstance(shape, str) and shape in set(RampShape):
        return RampShape(shape)
    near = difflib.get_close_matches(str(shape), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise KasminaException(
        f"unknown shape of a ramp {shape!r}: expected one of {', '.join(names)}{hint}"
    )
