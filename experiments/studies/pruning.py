"""Is growing better than beginning large and pruning, at equal FLOPs and equal final size?

    grown         the host, growing by a controller
    pruned        the host with a kernel in every seed from the start; after a part of the FLOPs the
                  kernels whose removal costs least are taken out, until as many are left as the
                  grown run of that seed kept; then it trains on
    static-small  the host alone

All arms use the training FLOPs of the grown run of their seed. Kernels have one shape, so grown and
pruned networks end with equally many parameters. What finding the removal costs takes (forward
passes over the validation part) is counted for neither arm.

The pruned runs are found in two parts: one is stopped where it is to be pruned, and measured; the
other is the same from step 0 and is pruned there, so that it is an ordinary run.

    python -m experiments.studies.pruning [--seeds N] [--task NAME] [--out DIR] [--quick]
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from esper.checkpoints import load_checkpoint
from esper.errors import EsperError, Interrupted
from esper.nissa import half_width, read_metrics
from esper.tolaria import (
    GrowConfig,
    Hooks,
    RunFolder,
    load_task,
    make_config,
    make_trainee,
    open_run,
    start_run,
)
from esper.tolaria.comparison import Design, Outcome, judge, read_outcome, write_comparison
from esper.tolaria.worth import removal_costs
from esper.urza import Library
from esper_functional import running_seeds
from experiments.studies._study import Found, Study, Table, run


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run."""

    seeds: int = 16
    task: str = "spirals"
    controller: str = "fixed"
    """By a timetable, all runs have about one size; a heuristic may keep nothing at all, and
    then there are too few FLOPs to begin large."""
    large: int = 8
    """Kernels of the network that begins large; the grown one may have as many."""
    prune_at: float = 0.25
    """Part of the training FLOPs after which, at the second decision boundary, it is pruned."""
    steps: int | None = None
    """Null takes the task's own."""
    decide_every: int = 50
    variants: int = 8
    """Kernels to choose from; a seed of the large network has each in turn."""
    smallest_effect: float = 0.02
    """The least difference in test accuracy that would matter."""
    values: tuple[tuple[str, Any], ...] = (("graft_every", 500), ("max_grafts", 4))
    """Keys of a configuration that all arms share but where they say otherwise."""


TREATMENT = "grown"
CONTROLS = ("pruned", "static-small")


def shared(settings: Settings, out: Path, seed: int) -> dict[str, Any]:
    """What the configurations of all arms have in common."""
    own: dict[str, Any] = {
        "task": settings.task,
        "backend": "jax",
        "seed": seed,
        "library": out / "library",
        "seeds_per_layer": settings.large,
        "variants": settings.variants,
        "decide_every": settings.decide_every,
        "checkpoint_every": 10 * settings.decide_every,
        **dict(settings.values),
    }
    return own if settings.steps is None else own | {"steps": settings.steps}


def train(settings: Settings, out: Path, seed: int) -> dict[str, Outcome]:
    """One run of each arm."""
    common = shared(settings, out, seed)
    grown = start_run(
        out / TREATMENT / f"seed-{seed}", make_config(**common, controller=settings.controller)
    )
    came_to = read_outcome(grown.path, TREATMENT, "flops")
    assert came_to.training_flops is not None
    rows = [row for row in read_metrics(grown.metrics) if row["step"]]
    host_step = min(row["flops"] / row["step"] for row in rows)
    budget = {
        "max_training_flops": came_to.training_flops,
        "steps": math.ceil(came_to.training_flops / host_step),
    }
    small = start_run(
        out / "static-small" / f"seed-{seed}",
        make_config(**common | budget | {"controller": "none"}),
    )
    pruned = begin_large_and_prune(settings, out, common | budget, grown, came_to.kept)
    return {
        TREATMENT: came_to,
        "pruned": read_outcome(pruned.path, "pruned", "flops"),
        "static-small": read_outcome(small.path, "static-small", "flops"),
    }


def begin_large_and_prune(
    settings: Settings, out: Path, common: dict[str, Any], grown: RunFolder, keep: int
) -> RunFolder:
    """A run that begins large and is pruned to `keep` kernels.

    Raises:
        EsperError: where the run that is pruned is not the one that was measured.
    """
    seed = grown.config.seed
    site = next(iter(grown.kernels))
    begin = [
        {"step": 0, "action": "graft", "site": site, "seed": place,
         "candidate": place % settings.variants}
        for place in range(settings.large)
    ]  # fmt: skip
    at_once = {"controller": "fixed", "loading_steps": 1, "ramp_steps": 1, "incubation_steps": 0}
    whole = make_config(**common | at_once | {"max_grafts": None}, schedule_of_grafts=begin)
    large, prune_at = begin_large(
        out / "large" / f"seed-{seed}", whole, settings.prune_at * common["max_training_flops"]
    )
    costs = measure_costs(large, prune_at)
    dearest = sorted(costs, key=lambda place: costs[place], reverse=True)
    sites = large.host.sites if large.host is not None else ()
    out_goes = [
        {"step": prune_at, "action": "unload", "site": sites[layer], "seed": place}
        for layer, place in sorted(dearest[keep:])
    ]
    config = make_config(
        **common | at_once | {"max_grafts": None}, schedule_of_grafts=begin + out_goes
    )
    pruned = start_run(out / "pruned" / f"seed-{seed}", config)
    check_beginning(pruned, large, prune_at)
    return pruned


def check_beginning(pruned: RunFolder, large: RunFolder, prune_at: int) -> None:
    """Refuse a pruned run that is another than the measured one before it is pruned.

    Raises:
        EsperError: where losses differ.
    """
    was, now = (losses_before(folder, prune_at) for folder in (large, pruned))
    if was != now:
        raise EsperError(
            f"the run {pruned.path} is not the one whose removal costs were measured: expected the"
            f" losses of {large.path} before step {prune_at}, got others; run the study again"
        )


def begin_large(path: Path, config: GrowConfig, flops: float) -> tuple[RunFolder, int]:
    """A run that is stopped, and saved, at the second boundary after some FLOPs; and its step.

    Raises:
        EsperError: where it ends before.
    """
    done = 0
    stop_at: int | None = None

    def count(now: int, loss: Any) -> None:
        nonlocal done
        del loss
        done = now + 1

    def look(row: Any) -> None:
        nonlocal stop_at
        if stop_at is None and row["flops"] >= flops:
            stop_at = int(row["step"]) + config.decide_every

    def stop() -> bool:
        return stop_at is not None and done >= stop_at

    try:
        start_run(path, config, hooks=Hooks(stop=stop, on_step=count, on_boundary=look))
    except Interrupted:
        return open_run(path), done
    raise EsperError(
        f"the large network {path} used up the grown one's training FLOPs before it could be"
        " pruned: expected a second decision boundary after its part of them; give a larger"
        " network less time with a smaller `decide_every` or `prune_at`, or grow more"
    )


def measure_costs(folder: RunFolder, step: int) -> dict[tuple[int, int], float]:
    """The removal cost of each kernel that runs at a checkpoint, by (layer row, seed)."""
    tree = load_checkpoint(folder.checkpoints, step)[0]
    trainee = make_trainee(load_task(folder.config.task), folder.config)
    library = Library(folder.library, create=False)
    try:
        per_layer = folder.config.seeds_per_layer
        by_slot = {
            trainee.sites.index(own.site) * per_layer + (own.seed or 0):
                library.get(folder.kernels[own.site][own.candidate])
            for own in folder.config.schedule_of_grafts
        }  # fmt: skip
    finally:
        library.close()
    trainee.restore(tree, {slot: by_slot[slot] for slot in map(int, tree["kernels"])})
    places = [(int(layer), int(seed)) for layer, seed in running_seeds(trainee.seeds)]
    return {place: worth.value for place, worth in removal_costs(trainee, places).items()}


def losses_before(folder: RunFolder, step: int) -> list[float]:
    """The validation losses of the boundaries before a step."""
    return [row["validation_loss"] for row in read_metrics(folder.metrics) if row["step"] < step]


def measure(settings: Settings, out: Path) -> Found:
    """All runs, in folders of their own, and what the comparison says of them."""
    found = [train(settings, out, seed) for seed in range(settings.seeds)]
    design = Design(
        treatment=TREATMENT,
        controls=CONTROLS,
        seeds=tuple(range(settings.seeds)),
        smallest_effect=settings.smallest_effect,
        budget="flops",
    )
    outcomes = [own for arms in found for own in arms.values()]
    verdict = judge(design, outcomes)
    write_comparison(out / "comparison", [verdict], outcomes)
    numbers: dict[str, Any] = {
        arm: [
            {name: getattr(arms[arm], name) for name in (
                "seed", "test_accuracy", "test_loss", "parameters", "training_flops", "steps",
                "kept", "removed", "seconds")}
            for arms in found
        ]
        for arm in (TREATMENT, *CONTROLS)
    }  # fmt: skip
    numbers["refusals"] = list(verdict.refusals)
    numbers["pairs"] = [dataclasses.asdict(pair) for pair in verdict.pairs]
    pairs = {pair.control: pair for pair in verdict.pairs}
    rows: list[tuple[str, ...]] = []
    for arm in (TREATMENT, *CONTROLS):
        accuracy = 100.0 * np.array([own["test_accuracy"] for own in numbers[arm]])
        words = "refused" if verdict.refused else ""
        if arm in pairs:
            pair = pairs[arm]
            words = (
                f"{100 * pair.mean:+.2f} ({100 * pair.low:+.2f} to {100 * pair.high:+.2f}):"
                f" {pair.word.value}"
            )
        rows.append((
            arm,
            f"{accuracy.mean():.2f} ± {float(half_width(accuracy)):.2f}",
            f"{np.median([own['parameters'] for own in numbers[arm]]):.0f}",
            f"{np.median([own['training_flops'] for own in numbers[arm]]):.3g}",
            f"{np.median([own['steps'] for own in numbers[arm]]):.0f}",
            "–" if arm == TREATMENT else words,
        ))  # fmt: skip
    columns = (
        "arm", "test accuracy in %, mean ± 95 %", "parameters, median", "training FLOPs, median",
        "steps, median", "grown minus this, in points, by seed",
    )  # fmt: skip
    notes = [f"{settings.task}, over {settings.seeds} seeds, at equal training FLOPs."]
    notes += [f"No verdict: {reason}." for reason in verdict.refusals]
    return Found(numbers, Table(columns, tuple(rows)), draw(numbers), tuple(notes))


def draw(numbers: dict[str, Any]) -> Figure:
    """Each seed's accuracy by arm, joined."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    arms = (TREATMENT, *CONTROLS)
    accuracy = 100.0 * np.array([[own["test_accuracy"] for own in numbers[arm]] for arm in arms])
    axes.plot(range(len(arms)), accuracy, "-o", color="0.6", linewidth=0.8, markersize=3.0)
    axes.errorbar(range(len(arms)), accuracy.mean(axis=1), yerr=half_width(accuracy.T),
                  fmt="D", color="C0")  # fmt: skip
    axes.set_xticks(range(len(arms)), arms)
    axes.set_ylabel("test accuracy in %: seeds, mean and 95 % interval")
    return figure


STUDY = Study(
    name="pruning",
    doc=__doc__,
    full=Settings(),
    quick=Settings(
        seeds=1,
        controller="fixed",
        large=2,
        steps=30,
        decide_every=5,
        variants=1,
        values=(("graft_every", 10), ("max_grafts", 1), ("loading_steps", 1), ("ramp_steps", 5)),
    ),
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(run(STUDY))
