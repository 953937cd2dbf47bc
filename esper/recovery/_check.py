"""Numbers that are given as arguments, and within which bounds they are to be."""

import sys
from numbers import Integral, Real

FINITE = sys.float_info.max
"""The highest number where any finite one will do."""


def require(
    name: str,
    value: object,
    least: float,
    most: float = FINITE,
    *,
    whole: bool = False,
    above: bool = False,
) -> None:
    """Refuse what is no number, or out of bounds.

    Args:
        name: of the argument, and whose it is.
        least: the lowest number; with `above`, the highest that is too low.
        most: the highest number.

    Raises:
        InputError: saying what was expected.
    """
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if number and least <= value <= most and not (above and value == least):  # pyright: ignore[reportOperatorIssue]
        return
    from esper.errors import InputError

    kind = "a whole number" if whole else "a number"
    low = f"above {least}" if above else f"of at least {least}"
    high = f" and at most {most}" if most < FINITE else ""
    raise InputError(f"{name} must be {kind} {low}{high}, got {value!r}")
