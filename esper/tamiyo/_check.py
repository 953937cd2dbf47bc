"""Values that are given to controllers, triggers and safety, and their bounds."""

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from esper.errors import InputError


def require(
    what: str,
    value: object,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    whole: bool = False,
) -> None:
    """Refuse what is no finite number in [least, most].

    Args:
        what: whose argument it is, and its name.
        whole: only whole numbers will do.

    Raises:
        InputError: saying what was expected.
    """
    kinds = int if whole else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if number and math.isfinite(value) and least <= value <= most:  # pyright: ignore[reportArgumentType, reportOperatorIssue]
        return
    kind = "a whole number" if whole else "a finite number"
    low = f" of at least {least:g}" if least > -math.inf else ""
    high = f"{' and' if low else ' of'} at most {most:g}" if most < math.inf else ""
    raise InputError(f"{what} must be {kind}{low}{high}, got {value!r}")


def require_one_of(what: str, value: object, known: Iterable[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        InputError: listing those that are, and naming the nearest.
    """
    names = list(known)
    if value in names:
        return
    near = get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{what} must be one of {', '.join(names)}, got {value!r}{hint}")


def require_keys(what: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse keys that nobody asked for.

    Raises:
        InputError: listing those that may be given.
    """
    names = list(known)
    for key in given:
        if key not in names:
            near = get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            may = f"it takes {', '.join(names)}" if names else "it takes nothing"
            raise InputError(f"{what} does not take {key!r}: {may}{hint}")
