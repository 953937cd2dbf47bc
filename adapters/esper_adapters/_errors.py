"""Errors that several faces raise."""

from esper_functional import FoldError


def tied_weights(name: str) -> FoldError:
    """The error for a fold into weights that another layer has too."""
    return FoldError(
        f"fold: layer {name!r} shares its weights with another layer, whose output would change as"
        " well: fossilise the kernel instead"
    )
