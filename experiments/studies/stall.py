"""How long does a graft hold training up, on each backend?

A kernel is grafted by a timetable, several times in a run. What is measured is the time from the
end of one step to the end of the next, each waited for; a graft's stall is the longest of them from
the decision to the end of a window after the graft, in multiples of the median of all steps. The
first graft is left out: what it meets for the first time is not steady state.

    jax, background   the program compiles while the seed is loading
    jax, foreground   the seed loads for one step, so that training waits for the compiler
    torch             compiles nothing
    …, no graft       windows of the same place and length in a run without grafts: what decision
                      boundaries and the machine take by themselves

Every run has a process of its own: compiled programs are kept as long as a process lives.

    python -m experiments.studies.stall [--seeds N] [--out DIR] [--quick]
"""

import dataclasses
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from esper.tolaria import Hooks, make_config, start_run
from experiments.studies._study import Found, Study, Table, run


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run."""

    seeds: int = 3
    task: str = "shapes"
    """Its steps take milliseconds. On a host whose steps take a tenth of one, as on the digits,
    400 of them are over before a compiler has begun."""
    steps: int = 3_200
    graft_every: int = 800
    grafts: int = 3
    loading_steps: int = 500
    """Of what compiles in the background: as many as the compiler may take."""
    window: int = 100
    """Steps after a graft."""
    ramp_steps: int = 50
    decide_every: int = 50
    arms: tuple[str, ...] = (
        "jax, background", "jax, foreground", "jax, no graft", "torch", "torch, no graft",
    )  # fmt: skip


ARMS: dict[str, tuple[str, bool, bool]] = {
    "jax, background": ("jax", True, True),
    "jax, foreground": ("jax", False, True),
    "jax, no graft": ("jax", True, False),
    "torch": ("torch", True, True),
    "torch, no graft": ("torch", True, False),
}
"""Backend, whether a kernel has time to load, and whether there is one."""


def train(settings: Settings, out: Path, arm: str, seed: int) -> dict[str, Any]:
    """The stalls of one run, in step times."""
    backend, background, grafting = ARMS[arm]
    loading = settings.loading_steps if background else 1
    ends: list[float] = []
    decided: list[int] = []

    def on_step(step: int, loss: Any) -> None:
        del step
        float(loss)  # waits for the device
        ends.append(time.perf_counter())

    def on_entry(entry: Any) -> None:
        if entry["kind"] == "load":
            decided.append(int(entry["step"]))

    config = make_config(
        task=settings.task,
        backend=backend,
        seed=seed,
        library=out / "library",
        steps=settings.steps,
        controller="fixed" if grafting else "none",
        graft_every=settings.graft_every,
        max_grafts=settings.grafts,
        loading_steps=loading,
        ramp_steps=settings.ramp_steps,
        decide_every=settings.decide_every,
        checkpoint_every=settings.steps * settings.decide_every,
        variants=1,
    )
    folder = out / arm.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
    start_run(folder, config, hooks=Hooks(on_step=on_step, on_entry=on_entry))
    gaps = np.diff(ends)
    median = float(np.median(gaps))
    if not grafting:
        decided = [settings.graft_every * (nth + 1) for nth in range(settings.grafts)]
    # gaps[i] is the time from the end of step i to that of step i + 1.
    stalls = [
        float(gaps[max(0, step - 1) : step + loading + settings.window].max()) / median
        for step in decided[1:]
    ]
    return {"seed": seed, "decided": decided, "step_ms": 1e3 * median, "stalls": stalls}


def measure(settings: Settings, out: Path) -> Found:
    """All runs, the arms in turn."""
    numbers: dict[str, Any] = {arm: [] for arm in settings.arms}
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as process:
        for seed in range(settings.seeds):
            for arm in settings.arms:
                numbers[arm].append(process.apply(train, (settings, out, arm, seed)))
    rows: list[tuple[str, ...]] = []
    for arm, runs in numbers.items():
        stalls = [stall for own in runs for stall in own["stalls"]]
        step = np.median([own["step_ms"] for own in runs])
        rows.append(
            (arm, f"{step:.3f}", str(len(stalls)), f"{np.median(stalls):.1f}", f"{max(stalls):.1f}")
        )
    columns = ("arm", "step in ms, median", "grafts", "longest gap in step times, median", "worst")
    notes = (f"{settings.task}, {settings.seeds} runs of each arm; the first graft is left out.",)
    return Found(numbers, Table(columns, tuple(rows)), draw(numbers), notes)


def draw(numbers: dict[str, Any]) -> Figure:
    """Each graft's stall by arm."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for row, arm in enumerate(reversed(numbers)):
        stalls = [stall for own in numbers[arm] for stall in own["stalls"]]
        axes.plot(stalls, [row] * len(stalls), "o", color="C0", alpha=0.6)
    axes.set_xscale("log")
    axes.set_yticks(range(len(numbers)), list(reversed(numbers)))
    axes.set_xlabel("longest gap between steps around a graft, in median steps")
    return figure


STUDY = Study(
    name="stall",
    doc=__doc__,
    full=Settings(),
    quick=Settings(
        seeds=1, steps=50, graft_every=15, grafts=2, loading_steps=5, window=5, ramp_steps=2,
        decide_every=5, arms=("jax, background", "torch"),
    ),
    measure=measure,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run(STUDY))
