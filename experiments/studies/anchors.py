"""Two small tasks, five arms: do the figures that this project began with come out again?

    static-small       the host alone
    static-full        the host with all its kernels from step 0
    zero-output        kernels one after another, whose output is 0 when they come
    straight-through   the same, incubating as k - stop(k) first; left out of Esper on purpose
    shadow             the same, incubating in a shadow forward pass

The anchors are figures of an earlier program, whose timetable and split of the data are not known:
here a kernel comes at equal distances, and is at alpha 1 at once, or after its incubation.

    python -m experiments.studies.anchors [--seeds N] [--out DIR] [--quick]
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from esper.nissa import half_width
from experiments.studies._core import Growing, Incubation, Problem, make_problem
from experiments.studies._study import Found, Study, Table, run


@dataclasses.dataclass(frozen=True)
class Section:
    """One task."""

    task: str
    steps: int
    batch_size: int | None
    """Null takes all examples in every step."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run."""

    seeds: int = 8
    sections: tuple[Section, ...] = (
        Section("digits", 1_500, 64),
        Section("spirals", 2_500, None),
    )
    width: int = 32
    slots: int = 4
    learning_rate: float = 1e-2
    incubation: float = 0.08
    """Part of the steps for which a kernel incubates."""


ARMS: dict[str, Incubation | None] = {
    "static-small": None,
    "static-full": None,
    "zero-output": "none",
    "straight-through": "straight_through",
    "shadow": "shadow",
}

ANCHORS = {
    "digits": {
        "static-small": (95.81, 0.70),
        "static-full": (94.50, 1.80),
        "zero-output": (96.00, 0.82),
        "straight-through": (95.86, 0.67),
        "shadow": (95.83, 1.07),
    },
    "spirals": {
        "static-small": (59.47, 2.24),
        "static-full": (99.42, 0.70),
        "zero-output": (98.32, 2.09),
        "straight-through": (53.22, 6.22),
        "shadow": (95.43, 7.20),
    },
}
"""Test accuracy in %, and what stood behind its ±, which is taken for half of an interval."""


def train(problem: Problem, section: Section, settings: Settings, arm: str, seed: int) -> float:
    """The test accuracy of one run at its end, in %."""
    network = Growing(problem, seed)
    incubation = ARMS[arm]
    every = section.steps // (settings.slots + 1)
    comes = {every * (slot + 1): slot for slot in range(settings.slots)}
    takes = max(1, round(settings.incubation * section.steps))
    if arm == "static-full":
        for slot in range(settings.slots):
            network.graft(slot)
    for step in range(section.steps):
        if incubation is not None and step in comes:
            network.graft(comes[step], incubation)
        if incubation not in (None, "none") and step - takes in comes:
            network.blend(comes[step - takes])
        network.step()
    return 100.0 * network.test()[1]


def meets(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two intervals, each a middle and half of a width, have a point in common."""
    return abs(a[0] - b[0]) <= a[1] + b[1]


def measure(settings: Settings, out: Path) -> Found:
    """All runs; they leave no folders."""
    del out
    numbers: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for section in settings.sections:
        problem = make_problem(
            section.task,
            batch_size=section.batch_size,
            width=settings.width,
            slots=settings.slots,
            learning_rate=settings.learning_rate,
        )
        for arm in ARMS:
            found = np.array(
                [train(problem, section, settings, arm, seed) for seed in range(settings.seeds)]
            )
            own = float(found.mean()), float(half_width(found))
            anchor = ANCHORS[section.task][arm]
            met = meets(own, anchor)
            numbers[f"{section.task}, {arm}"] = {
                "test_accuracy": found.tolist(),
                "mean": own[0],
                "half_width": own[1],
                "anchor": anchor,
                "intervals_meet": met,
            }
            rows.append(
                (section.task, arm, f"{own[0]:.2f} ± {own[1]:.2f}",
                 f"{anchor[0]:.2f} ± {anchor[1]:.2f}", "yes" if met else "no")
            )  # fmt: skip
    columns = ("task", "arm", "test accuracy in %, mean ± 95 %", "anchor", "intervals meet")
    notes = (
        (
            f"Over {settings.seeds} seeds. Straight-through incubation is no part of Esper: the"
            " study has it as a kernel's program, k - stop(k)."
        ),
    )
    return Found(numbers, Table(columns, tuple(rows)), draw(settings, numbers), notes)


def draw(settings: Settings, numbers: dict[str, Any]) -> Figure:
    """Each arm's runs and mean, and its anchor."""
    figure = Figure(figsize=(7.2, 1.0 + 1.8 * len(settings.sections)), layout="constrained")
    panels = figure.subplots(len(settings.sections), 1, squeeze=False)[:, 0]
    for axes, section in zip(panels, settings.sections, strict=True):
        for row, arm in enumerate(reversed(ARMS)):
            own = numbers[f"{section.task}, {arm}"]
            runs = own["test_accuracy"]
            axes.plot(runs, [row + 0.15] * len(runs), "o", color="C0", alpha=0.5, markersize=3.0)
            axes.errorbar(own["mean"], row, xerr=own["half_width"], fmt="D", color="C0")
            axes.errorbar(*own["anchor"][:1], row - 0.2, xerr=own["anchor"][1],
                          fmt="s", color="0.5", markersize=4.0)  # fmt: skip
        axes.set_yticks(range(len(ARMS)), list(reversed(ARMS)))
        axes.set_title(section.task)
    panels[-1].set_xlabel("test accuracy in %: runs, mean and 95 % interval; the anchor in grey")
    return figure


STUDY = Study(
    name="anchors",
    doc=__doc__,
    full=Settings(),
    quick=Settings(
        seeds=2, sections=(Section("digits", 30, 64), Section("spirals", 30, None)), slots=1
    ),
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(run(STUDY))
