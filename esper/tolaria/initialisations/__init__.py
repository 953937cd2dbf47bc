"""The first parameters of a grafted kernel, found from what its layer sees."""

from esper.tolaria.initialisations._initialise import (
    INITIALISATIONS,
    Initialisation,
    initialise,
)

__all__ = ["INITIALISATIONS", "Initialisation", "initialise"]
