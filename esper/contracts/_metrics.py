"""A measurement of a run at a decision boundary."""

from typing import Literal, Self

from pydantic import model_validator

from esper.contracts._data import Count, Data, Fraction, Name, Seconds
from esper.contracts._ledger_entry import SeedStage


class TrainingMetrics(Data):
    """What a run measured at a boundary, and where its seeds are; None where it is not finite."""

    schema_version: Literal[1] = 1
    step: Count
    train_loss: float | None
    """Mean over the steps since the last boundary."""
    validation_loss: float | None
    validation_accuracy: Fraction | None
    """None for regression."""
    test_loss: float | None
    test_accuracy: Fraction | None
    stages: tuple[tuple[SeedStage, ...], ...]
    """Of each layer's seeds."""
    alphas: tuple[tuple[Fraction, ...], ...]
    health: tuple[tuple[float | None, ...], ...]
    parameters: Count
    compilations: Count
    learning_rate: Seconds
    flops: Seconds
    """All that the run has computed so far, counted."""
    rollbacks: Count
    seconds: dict[Name, Seconds]
    """Where the run's time went."""

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        shapes = [tuple(map(len, columns)) for columns in (self.stages, self.alphas, self.health)]
        if len(set(shapes)) > 1:
            raise ValueError(
                "stages, alphas and health are of the same layers and seeds: got shapes"
                f" {', '.join(map(str, shapes))}"
            )
        return self
