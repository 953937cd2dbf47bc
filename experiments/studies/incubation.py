"""What happens at the moment of blending, after incubating straight through and in a shadow?

One kernel incubates beside a host that has trained alone, and is then blended at alpha 1 at once.
Test loss and accuracy are measured at every step around that. The overshoot is the greatest test
loss after blending, over the last before it; 1 or less is none.

Straight-through incubation, h + (k - stop(k)), is left out of Esper on purpose; the study has it
as a kernel's program.

    python -m experiments.studies.incubation [--seeds N] [--out DIR] [--quick]
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from esper.nissa import half_width
from experiments.studies._core import Growing, Incubation, Problem, make_problem
from experiments.studies._study import Found, Study, Table, run


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run."""

    seeds: int = 8
    tasks: tuple[tuple[str, int | None], ...] = (("digits", 64), ("spirals", None))
    """Names, and examples a step; null takes all."""
    alone: int = 300
    """Steps of the host before the kernel comes."""
    incubation: int = 200
    before: int = 20
    """Steps measured before blending."""
    after: int = 100
    """Steps measured from blending on."""
    width: int = 32
    learning_rate: float = 1e-2


ARMS: tuple[Incubation, ...] = ("straight_through", "shadow")


def train(problem: Problem, settings: Settings, arm: Incubation, seed: int) -> dict[str, Any]:
    """Test loss and accuracy of one run, at each step around blending."""
    network = Growing(problem, seed)
    curve: list[tuple[float, float]] = []
    blending = settings.alone + settings.incubation
    for step in range(blending + settings.after):
        if step == settings.alone:
            network.graft(0, arm)
        if step > blending - settings.before:
            curve.append(network.test())
        if step == blending:
            network.blend(0)
            curve.append(network.test())
        network.step()
    curve.append(network.test())
    # The host's own last measurement is at the step of blending, before the kernel counts.
    last = settings.before - 1
    loss = [own[0] if math.isfinite(own[0]) else math.inf for own in curve]
    return {
        "loss": [own if math.isfinite(own) else None for own in loss],
        "accuracy": [own[1] for own in curve],
        "overshoot": max(loss[last + 1 :]) / loss[last],
        "accuracy_before": curve[last][1],
        "accuracy_at_blending": curve[last + 1][1],
        "accuracy_after": curve[-1][1],
    }


def measure(settings: Settings, out: Path) -> Found:
    """All runs; they leave no folders."""
    del out
    numbers: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for task, batch_size in settings.tasks:
        problem = make_problem(
            task,
            batch_size=batch_size,
            width=settings.width,
            slots=1,
            learning_rate=settings.learning_rate,
        )
        for arm in ARMS:
            runs = [train(problem, settings, arm, seed) for seed in range(settings.seeds)]
            over = [own["overshoot"] for own in runs]
            for own in runs:
                own["overshoot"] = own["overshoot"] if math.isfinite(own["overshoot"]) else None
            numbers[f"{task}, {arm}"] = runs
            rows.append(
                (task, arm.replace("_", "-"),
                 f"{np.median(over):.3g} ({min(over):.3g} to {max(over):.3g})",
                 *(_percent([own[name] for own in runs]) for name in (
                     "accuracy_before", "accuracy_at_blending", "accuracy_after")))
            )  # fmt: skip
    columns = (
        "task", "incubation", "overshoot, median (range)", "accuracy in % before, mean ± 95 %",
        "at blending", f"{settings.after} steps later",
    )  # fmt: skip
    notes = (
        (
            f"Over {settings.seeds} seeds. Overshoot: greatest test loss in the"
            f" {settings.after} steps from blending on, over that just before."
        ),
    )
    return Found(numbers, Table(columns, tuple(rows)), draw(settings, numbers), notes)


def _percent(values: list[float]) -> str:
    own = 100.0 * np.array(values)
    return f"{own.mean():.1f} ± {float(half_width(own)):.1f}"


def draw(settings: Settings, numbers: dict[str, Any]) -> Figure:
    """Loss and accuracy around blending, each run a line."""
    figure = Figure(figsize=(7.2, 1.0 + 2.2 * len(settings.tasks)), layout="constrained")
    panels = figure.subplots(len(settings.tasks), 2, squeeze=False, sharex=True)
    for row, (task, _) in enumerate(settings.tasks):
        for paint, arm in enumerate(ARMS):
            for nth, own in enumerate(numbers[f"{task}, {arm}"]):
                # Two measurements at the step of blending: without the kernel, and with it.
                steps = [*range(1 - settings.before, 1), *range(settings.after + 1)]
                loss = [math.nan if value is None else value for value in own["loss"]]
                style: dict[str, Any] = {"color": f"C{paint}", "linewidth": 0.8, "alpha": 0.7}
                style["label"] = arm.replace("_", "-") if nth == 0 else None
                panels[row, 0].plot(steps, loss, **style)
                panels[row, 1].plot(steps, 100.0 * np.array(own["accuracy"]), **style)
        panels[row, 0].set_yscale("log")
        panels[row, 0].set_title(f"{task}: test loss")
        panels[row, 1].set_title(f"{task}: test accuracy in %")
    panels[0, 0].legend(frameon=False)
    for axes in panels[-1]:
        axes.set_xlabel("steps from blending")
    return figure


STUDY = Study(
    name="incubation",
    doc=__doc__,
    full=Settings(),
    quick=Settings(seeds=2, alone=10, incubation=30, before=3, after=5),
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(run(STUDY))
