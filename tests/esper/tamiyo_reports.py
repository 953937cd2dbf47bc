"""Reports and health of models, for tests of Tamiyo as a service."""

from typing import Any

import numpy as np

from esper.contracts import HealthSignalBatch, ModelReport

KERNEL = "a" * 64
ACTIVE, FAILED = 2, 3


def report(step: int = 10, *, count: int = 3, seeds: int = 2, **changes: Any) -> ModelReport:
    """Of a chain of sites; `changes` replace columns, or one value for all of one."""
    shapes: dict[str, Any] = {
        "stage": 0, "alpha": 0.0, "health": None, "health_before": None, "worth": None,
        "worth_half": None, "age": 0, "held": None,
    }  # fmt: skip
    by_site: dict[str, Any] = {
        "kinds": "linear", "site_parameters": 12, "site_inputs": 3, "site_outputs": 4,
        "grows": True, "gradient_norm": 0.5, "weight_norm": 1.0, "follows": (0.1, 0.4),
    }  # fmt: skip
    data: dict[str, Any] = {name: (value,) * count for name, value in by_site.items()}
    for name, value in shapes.items():
        data[name] = ((changes.pop(name) if _is_one(changes, name) else value,) * seeds,) * count
    data |= {
        "step": step,
        "steps": 1_000,
        "sites": tuple(f"site-{row}" for row in range(count)),
        "depths": tuple(range(count)),
        "senders": tuple(range(count - 1)),
        "receivers": tuple(range(1, count)),
        "train_loss": (1.0,),
        "validation_loss": (1.0,),
        "validation_accuracy": 0.5,
        "first_loss": 2.0,
        "loss_spread": 0.1,
        "rollbacks": (),
        "host_parameters": 100,
        "host_flops": 200.0,
        "parameters": 100,
        "flops": 200.0,
        "descriptions": ((0.5,) * 14,),
        "fits": ((0,),) * count,
        "kernel_ids": (KERNEL,),
        "kernel_parameters": (7,),
        "kernel_flops": (9,),
    }
    return ModelReport(**(data | changes))


def _is_one(changes: dict[str, Any], name: str) -> bool:
    return name in changes and not isinstance(changes[name], tuple)


def placed(value: Any, at: tuple[int, int], other: Any, *, sites: int = 3, seeds: int = 2) -> Any:
    """A column `[sites, seeds]` with one value at a place and another one everywhere else."""
    return tuple(
        tuple(value if (row, seed) == at else other for seed in range(seeds))
        for row in range(sites)
    )


def signals(count: int, **columns: Any) -> HealthSignalBatch:
    """A batch without a check, as a training loop makes them; one value stands for all."""
    values: dict[str, Any] = {
        "layer_id": 0, "seed_id": 0, "chunk_id": 0, "epoch": 0, "step": tuple(range(count)),
        "stage": ACTIVE, "activation_variance": 1.0, "dead_neuron_ratio": 0.0,
        "avg_correlation": 0.0, "health_score": 0.9, "error_count": 0,
        "is_ready_for_transition": False,
    } | columns  # fmt: skip
    listed = (tuple, list, range, np.ndarray)
    columns = {
        name: tuple(value) if isinstance(value, listed) else (value,) * count
        for name, value in values.items()
    }
    return HealthSignalBatch.model_construct(**columns)
