"""Does growth help a convolutional network, and what does it cost?

    static-small  the host alone
    grown         the host, growing by a controller
    static-final  the host with the kernels that the grown run of that seed kept, there from step 0

at equal steps. The default task is Esper's drawn shapes, blown up to the size of CIFAR's images,
with the host that `cifar10:FOLDER` has; `--task cifar10:FOLDER` takes the real ones.

    python -m experiments.studies.convolution [--seeds N] [--task NAME] [--out DIR] [--quick]
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from esper.errors import InputError
from esper.nissa import half_width
from esper.tolaria import Task, load_task, make_config, start_run
from esper.tolaria.comparison import Outcome, kept_kernels, read_outcome
from esper.tolaria.tasks import ConvHost, Split
from experiments.studies._study import Found, Study, Table, run


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run."""

    seeds: int = 8
    task: str = "shapes"
    steps: int = 3_000
    batch_size: int = 64
    evaluation_batch: int = 256
    widths: tuple[int, ...] = (2, 2, 2)
    """Of the host on the shapes; CIFAR's tasks have their own. With (8, 16, 16) it learns all by
    itself, to 99.4 % in 3,000 steps, and the heuristic controller rightly grafts nothing."""
    controller: str = "heuristic"
    seeds_per_layer: int = 2
    variants: int = 4
    decide_every: int = 100
    values: tuple[tuple[str, Any], ...] = ()
    """Keys of a configuration that all arms share."""


ARMS = ("static-small", "grown", "static-final")


def load(settings: Settings) -> Task:
    """The task; shapes are blown up to three channels of 32×32.

    Raises:
        InputError: for a task that has no convolutional host.
    """
    task = load_task(settings.task)
    if not isinstance(task.host, ConvHost):
        raise InputError(
            f"the task {settings.task!r} has the host {task.host.name!r}: expected one of images,"
            " with a convolutional host; give --task shapes or cifar10:FOLDER"
        )
    if settings.task != "shapes":
        return task
    size = (1, 3, 2, 2)
    splits = {
        name: Split(np.kron(split.x, np.ones(size, np.float32)), split.y)
        for name, split in task.splits.items()
    }
    host = dataclasses.replace(task.host, channels=3, size=32, widths=settings.widths)
    return dataclasses.replace(task, name="shapes-32", host=host, **splits)


def train(settings: Settings, out: Path, task: Task, seed: int) -> dict[str, Outcome]:
    """One run of each arm."""
    common: dict[str, Any] = {
        "task": task.name,
        "backend": "jax",
        "seed": seed,
        "library": out / "library",
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "evaluation_batch": settings.evaluation_batch,
        "blueprints": ["conv_bottleneck"],
        "variants": settings.variants,
        "seeds_per_layer": settings.seeds_per_layer,
        "decide_every": settings.decide_every,
        "checkpoint_every": 10 * settings.decide_every,
        **dict(settings.values),
    }
    arms = {"static-small": {"controller": "none"}, "grown": {"controller": settings.controller}}
    found: dict[str, Outcome] = {}
    for arm, own in arms.items():
        found[arm] = make(out, arm, common | own, task)
    kept = kept_kernels(Path(found["grown"].folder))
    final = {"controller": "none", "initial_grafts": [own._asdict() for own in kept]}
    found["static-final"] = make(out, "static-final", common | final, task)
    return found


def make(out: Path, arm: str, values: dict[str, Any], task: Task) -> Outcome:
    """One run."""
    config = make_config(**values)
    folder = start_run(out / arm / f"seed-{config.seed}", config, task=task)
    return read_outcome(folder.path, arm, "steps")


_COLUMNS = ("seed", "test_accuracy", "test_loss", "parameters", "training_flops", "kept",
            "compilations", "seconds")  # fmt: skip


def measure(settings: Settings, out: Path) -> Found:
    """All runs, in folders of their own."""
    task = load(settings)
    found = [train(settings, out, task, seed) for seed in range(settings.seeds)]
    numbers: dict[str, Any] = {
        arm: [{name: getattr(arms[arm], name) for name in _COLUMNS} for arms in found]
        for arm in ARMS
    }
    rows = tuple(
        (
            arm,
            _interval([own["test_accuracy"] for own in numbers[arm]]),
            f"{np.median([own['parameters'] for own in numbers[arm]]):.0f}",
            f"{np.median([own['training_flops'] for own in numbers[arm]]):.3g}",
            f"{np.median([own['seconds'] for own in numbers[arm]]):.1f}",
            " ".join(str(own["kept"]) for own in numbers[arm]),
        )
        for arm in ARMS
    )
    columns = (
        "arm", "test accuracy in %, mean ± 95 %", "parameters, median", "training FLOPs, median",
        "seconds, median", "kernels at the end, by seed",
    )  # fmt: skip
    paired = {
        arm: _interval([
            grown["test_accuracy"] - own["test_accuracy"]
            for grown, own in zip(numbers["grown"], numbers[arm], strict=True)
        ])
        for arm in ("static-small", "static-final")
    }  # fmt: skip
    notes = (
        (
            f"{task.name}, host {task.host.name}, over {settings.seeds} seeds, at"
            f" {settings.steps:,} steps."
        ),
        *(f"Grown minus {arm}, paired over seeds: {text} points." for arm, text in paired.items()),
    )
    return Found(numbers, Table(columns, rows), draw(found), notes)


def _interval(values: list[float]) -> str:
    own = 100.0 * np.array(values)
    return f"{own.mean():.2f} ± {float(half_width(own)):.2f}"


def draw(found: list[dict[str, Outcome]]) -> Figure:
    """Test accuracy over steps and over training FLOPs, each run a line."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for paint, arm in enumerate(ARMS):
        for nth, arms in enumerate(found):
            curve = arms[arm].curve
            accuracy = [np.nan if y is None else 100.0 * y for y in curve.test_accuracy]
            flops = [np.nan if f is None else f for f in curve.flops]
            style: dict[str, Any] = {"color": f"C{paint}", "linewidth": 0.9, "alpha": 0.7}
            left.plot(curve.steps, accuracy, label=arm if nth == 0 else None, **style)
            right.plot(flops, accuracy, **style)
    left.set_xlabel("steps")
    left.set_ylabel("test accuracy in %")
    left.legend(frameon=False)
    right.set_xlabel("training FLOPs")
    return figure


STUDY = Study(
    name="convolution",
    doc=__doc__,
    full=Settings(),
    quick=Settings(
        seeds=1,
        steps=6,
        batch_size=16,
        widths=(2,),
        controller="fixed",
        seeds_per_layer=1,
        variants=1,
        decide_every=2,
        values=(("graft_every", 2), ("max_grafts", 1), ("loading_steps", 1), ("ramp_steps", 1)),
    ),
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(run(STUDY))
