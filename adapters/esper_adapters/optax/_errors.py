"""The one error of optimiser surgery."""

from esper_functional import KasminaException


class OptimizerSurgeryError(KasminaException, ValueError):
    """An optimiser's state cannot be fitted to other parameters without harm."""
