"""A model's report as arrays, and as what the rules of safety look at."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from esper.contracts import KernelRecord, ModelReport
from esper.errors import InputError
from esper.tamiyo._controller import Cost, Observation, Worth
from esper.tamiyo._probe import Probe
from esper_functional import SeedState, init_seeds


@dataclasses.dataclass(frozen=True)
class Report:
    """A `ModelReport`, of which what is asked for often becomes an array once."""

    data: ModelReport

    @property
    def shape(self) -> tuple[int, int]:
        """Sites, and seeds of each."""
        return len(self.data.sites), self.data.seeds

    @functools.cached_property
    def stage(self) -> np.ndarray:
        """u8 `[sites, seeds]`."""
        return np.array(self.data.stage, np.uint8)

    @functools.cached_property
    def alpha(self) -> np.ndarray:
        """f32 `[sites, seeds]`."""
        return np.array(self.data.alpha, np.float32)

    @functools.cached_property
    def health(self) -> np.ndarray:
        """f32 `[sites, seeds]`; NaN where none was measured."""
        return numbers(self.data.health)

    @functools.cached_property
    def kernels(self) -> tuple[KernelRecord, ...]:
        """The kernels that may be grafted, of which no more is known than the report says."""
        columns = zip(
            self.data.kernel_ids, self.data.kernel_parameters, self.data.kernel_flops, strict=True
        )
        return tuple(
            KernelRecord.model_construct(kernel_id=own, parameter_count=parameters, flops=flops)
            for own, parameters, flops in columns
        )


def numbers(values: Sequence[Any]) -> np.ndarray:
    """Nested numbers as f32; NaN for None, and infinite beyond what it can hold."""
    with np.errstate(over="ignore"):
        return np.array(values, np.float64).astype(np.float32)


def seeds_now(report: Report, health: np.ndarray) -> SeedState:
    """The seeds as a report has them, and as they were seen since.

    Args:
        health: `HEALTH` `[rows]`: one for each seed, all of them within the report's shape.
    """
    stage, scores = report.stage.copy(), report.health.copy()
    errors = np.zeros(report.shape, np.int32)
    at = health["layer"], health["seed"]
    errors[at] = np.minimum(health["errors"], np.iinfo(np.int32).max)
    # Signals of a step are sent before its boundary: what the boundary changed, they do not know.
    newer = health[health["step"] > report.data.step]
    at = newer["layer"], newer["seed"]
    stage[at], scores[at] = newer["stage"], newer["health"]
    return init_seeds(*report.shape).replace(
        stage=stage, alpha=report.alpha, health=scores, error_count=errors
    )


def observation_of(report: Report, seeds: SeedState) -> Observation:
    """What a report tells a controller and the rules of safety.

    `probe` raises InputError: a report holds no activations.
    """
    data = report.data

    def worth(layer: int, seed: int) -> Worth:
        value, half = data.worth[layer][seed], data.worth_half[layer][seed]
        middle = np.nan if value is None else value
        width = np.nan if half is None else half
        return Worth(middle, middle - width, middle + width)

    def probe(layer: int) -> Probe:
        raise InputError(
            f"what {data.sites[layer]} sees was not reported: a report holds no activations. Ask"
            " where the model trains."
        )

    return Observation(
        step=data.step,
        steps=data.steps,
        train_loss=_known(data.train_loss[0]),
        validation_loss=_known(data.validation_loss[0]),
        validation_accuracy=_known(data.validation_accuracy),
        seeds=seeds,
        sites=data.sites,
        candidates={
            row: [report.kernels[own] for own in fits if own is not None]
            for row, fits in enumerate(data.fits)
            if data.grows[row]
        },
        host=Cost(data.host_parameters, data.host_flops),
        now=Cost(data.parameters, data.flops),
        rollbacks=data.rollbacks,
        worth=worth,
        probe=probe,
        random=np.random.default_rng(data.step),
        first_loss=_known(data.first_loss),
        loss_spread=_known(data.loss_spread),
    )


def _known(value: float | None) -> float:
    return np.nan if value is None else value
