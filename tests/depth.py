"""How far the tests look: `--hypothesis-profile=thorough` looks further, and takes hours."""

from collections.abc import Sequence
from typing import TypeVar

from hypothesis import settings

T = TypeVar("T")


def depth(usual: T, thorough: T) -> T:
    """One value for the usual tests, and one for thorough ones."""
    return thorough if settings.get_current_profile_name() == "thorough" else usual


def some(cases: Sequence[T], *usual: T) -> Sequence[T]:
    """All cases for thorough tests, and for the usual ones some of them.

    Raises:
        ValueError: for one that is no case.
    """
    for case in usual:
        if case not in cases:
            raise ValueError(f"{case!r} is none of the cases {list(cases)}")
    return depth(list(usual), list(cases))
