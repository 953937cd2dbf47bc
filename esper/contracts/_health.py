"""How seeds are: one signal each, or the columns of a whole model."""

from typing import Annotated, Literal

from pydantic import Field

from esper.contracts._columns import Columns
from esper.contracts._data import Count, Data, Fraction
from esper.contracts._ledger_entry import SeedStage

Correlation = Annotated[float, Field(ge=-1.0, le=1.0)]
Variance = Annotated[float, Field(ge=0.0)]


class HealthSignal(Data):
    """What was seen of one seed, or of one chunk of a layer's activations."""

    schema_version: Literal[1] = 1
    layer_id: Count
    """The row of the layer in the run's seed state."""
    seed_id: Count
    chunk_id: Count = 0
    epoch: Count = 0
    step: Count = 0
    stage: SeedStage = 0
    activation_variance: Variance
    dead_neuron_ratio: Fraction
    avg_correlation: Correlation
    health_score: Fraction = 1.0
    error_count: Count = 0
    """Consecutive failures."""
    is_ready_for_transition: bool = False


class HealthSignalBatch(Columns[HealthSignal]):
    """The signals of many seeds, such as those of a whole model."""

    ITEM = HealthSignal

    schema_version: Literal[1] = 1
    layer_id: tuple[Count, ...]
    seed_id: tuple[Count, ...]
    chunk_id: tuple[Count, ...]
    epoch: tuple[Count, ...]
    step: tuple[Count, ...]
    stage: tuple[SeedStage, ...]
    activation_variance: tuple[Variance, ...]
    dead_neuron_ratio: tuple[Fraction, ...]
    avg_correlation: tuple[Correlation, ...]
    health_score: tuple[Fraction, ...]
    error_count: tuple[Count, ...]
    is_ready_for_transition: tuple[bool, ...]
