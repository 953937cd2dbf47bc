"""Grow networks on two tasks, beside the control arms without which growth proves nothing.

Two spirals on both backends and sklearn's digits on jax; for each, five seeds of

    static-small  the host alone
    grown         the host, growing by the heuristic controller
    static-final  the host with the kernels that the grown run of that seed kept, there from
                  step 0 and trained throughout

at equal steps. Prints a table and the path of a report.

    python -m experiments.demo [--seeds N] [--out DIR]
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from esper.errors import InputError
from esper.nissa import ProgressView, RunRecord, half_width, read_run, write_report
from esper.oona import InProcessBus
from esper.tolaria import GrowConfig, Hooks, make_config, start_run
from esper.tolaria.comparison import kept_kernels
from esper_functional import KasminaException


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the demonstration runs."""

    out: Path
    seeds: int = 5
    sections: tuple[tuple[str, str], ...] = (
        ("spirals", "jax"),
        ("spirals", "torch"),
        ("digits", "jax"),
    )


ARMS = ("static-small", "grown", "static-final")

console = Console()


def train(path: Path, config: GrowConfig, label: str) -> RunRecord:
    bus = InProcessBus()
    with ProgressView(bus, label, config.steps, console) as view:
        start_run(
            path,
            config,
            bus=bus,
            hooks=Hooks(on_boundary=lambda _: view.refresh()),
            tell=lambda text: console.print(f"[dim]{text}[/]", highlight=False),
        )
    return read_run(path)


def run_section(settings: Settings, task: str, backend: str) -> dict[str, list[RunRecord]]:
    arms: dict[str, list[RunRecord]] = {arm: [] for arm in ARMS}
    folder = settings.out / f"{task}-{backend}"
    common = {"task": task, "backend": backend, "library": settings.out / "library"}
    for seed in range(settings.seeds):
        small = make_config(**common, seed=seed, controller="none")
        growing = make_config(**common, seed=seed)
        for arm, config in (("static-small", small), ("grown", growing)):
            label = f"{task} · {backend} · {arm} · seed {seed}"
            arms[arm].append(train(folder / arm / f"seed-{seed}", config, label))
        final = make_config(
            **common,
            seed=seed,
            controller="none",
            initial_grafts=[own._asdict() for own in kept_kernels(arms["grown"][-1].path)],
        )
        label = f"{task} · {backend} · static-final · seed {seed}"
        arms["static-final"].append(train(folder / "static-final" / f"seed-{seed}", final, label))
    return arms


def summary(sections: dict[str, dict[str, list[RunRecord]]]) -> Table:
    table = Table(
        "task", "arm", "median", "min–max", "mean ± 95 %", "params", "kept",
        box=None, padding=(0, 1, 0, 0),
        title="test accuracy in %, at equal steps; kernels kept, by seed",
    )  # fmt: skip
    for title, arms in sections.items():
        for arm, runs in arms.items():
            accuracy = 100 * np.array([run.accuracy for run in runs])
            parameters = [run.metrics[-1]["parameters"] for run in runs]
            table.add_row(
                title,
                arm,
                f"{np.median(accuracy):.1f}",
                f"{accuracy.min():.1f}–{accuracy.max():.1f}",
                f"{accuracy.mean():.1f} ± {float(half_width(accuracy)):.1f}",
                f"{np.median(parameters):.0f}",
                " ".join(str(len(kept_kernels(run.path))) for run in runs),
            )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description="Grow networks beside their control arms.")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm (default 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="a folder for them")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    out = options.out
    number = 2
    # A second demonstration does not write over the first.
    while out.exists() and any(out.glob("*-*/")):
        out = options.out.with_name(f"{options.out.name}-{number}")
        number += 1
    settings = Settings(out=out, seeds=options.seeds)
    begin = time.perf_counter()
    try:
        sections = {
            f"{task}, {backend}": run_section(settings, task, backend)
            for task, backend in settings.sections
        }
    except (KasminaException, OSError) as error:
        console.print(f"demo: {error}", highlight=False, markup=False, soft_wrap=True)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        console.print("demo: interrupted")
        return 130
    report = settings.out / "report.html"
    write_report(report, sections, title="Esper: growing beside its control arms")
    console.print(summary(sections))
    console.print(f"{time.perf_counter() - begin:.0f} s on {sys.platform}")
    console.print(f"report: {report.absolute()}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
